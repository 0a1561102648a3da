"""Numbers of any size in one layer: NaN, infinity, numbers beyond half precision, later tokens of another size."""

from __future__ import annotations

import pytest
import torch

from tests.support.layers import preset_layer, states
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.cache.sides import SIDES
from turboquant_hf.config import load_preset
from turboquant_hf.kernels.decode import History, RawTokens, Scoring, decode_attention


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), -float("inf")], ids=["nan", "-nan", "-inf"])
@pytest.mark.parametrize(
    "name",
    ["lossless", "k4v4", "k2v2", "k8v4", "paper-mse-4", "paper-prod-3", "paper-2.5", "kivi-4", "int8", "nf4", "polar-4"]
    + ["qjl-3", "turbo4"],
)
def test_nan_and_infinity_do_not_become_plausible_numbers(name, bad):
    """A token with NaN or infinity is not finite when it is decoded.

    One-byte scales have no pattern for NaN. The whole head then becomes NaN, keys and values alike.
    """
    preset = load_preset(name)
    layer = preset_layer(name, tile=128, sinks=0, min_statistics=128, boundary_layers=0)
    x = states(256, dim=64)
    for y in x:
        y[0, 1, 200, 7] = bad
    layer.update(*(y[:, :, :128] for y in x))
    layer.update(*(y[:, :, 128:] for y in x))
    assert layer.tiles[0].count == 2
    marked = any("gain" in state for state in layer.states)
    for index, role in enumerate(("keys", "values")):
        got, own = layer.dense(SIDES[index]), "gain" in layer.states[index]
        assert not got[0, 1, 200].isfinite().all(), f"{preset.name} {role}"
        assert got[0, 0].isfinite().all(), f"{preset.name} {role}: another head"
        assert (not got[0, 1].isfinite().any()) if own else got[0, 1, :128].isfinite().all(), "another tile"
    assert marked == (name in ("k4v4", "k2v2", "k8v4", "paper-mse-4", "paper-prod-3", "paper-2.5", "turbo4"))


@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")], ids=["nan", "-nan", "inf"])
@pytest.mark.parametrize("name", ["k8v4", "k4v4", "k4v3", "k3v3", "k2v2"])
def test_a_bad_number_reaches_the_output_of_its_head(name, bad, side):
    """The attention output of that head is NaN, for keys and for values, as with raw tensors. Other heads are equal."""
    layer = preset_layer(name, handles=True, tile=32, min_statistics=32, boundary_layers=0)
    x = states(96, batch=2, dim=64)
    for start in range(0, 96, 32):
        block = [y[:, :, start : start + 32].clone() for y in x]
        if start == 32:
            block[side][1, 0, 9, 5] = bad
        layer.update(*block)
        layer.commit()
    raw = [RawTokens(*arrays) for arrays in (layer.sinks.arrays, layer.tail.view())]
    history = History(*layer.packed_sides(), *raw, layer.sinks.starts)
    output = decode_attention(torch.randn(2, 4, 1, 64), history, Scoring(0.125))
    assert output[1, :2].isnan().all()
    assert output[0].isfinite().all() and output[1, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k8v4", "k4v16", "paper-mse-4", "paper-prod-4", "kivi-4", "int8"])
def test_numbers_beyond_half_precision_keep_their_accuracy(name, dtype):
    """One head has keys with an offset of 1e5 in a channel, and values 1e5 times as large; other heads are ordinary."""

    def decoded(x):
        layer = preset_layer(name, tile=32, min_statistics=64, boundary_layers=0)
        layer.update(*x)
        assert layer.tiles[0].count == 3
        return layer, layer.dense("keys").float(), layer.dense("values").float()

    plain = tuple(x.to(dtype) for x in states(96, dim=64))
    large = tuple(x.clone() for x in plain)
    large[0][:, 1, :, 3] += 1e5
    large[1][:, 1] *= 2.0**17
    (_, *before), (layer, *after) = decoded(plain), decoded(large)
    for index, others in ((0, [c for c in range(64) if c != 3]), (1, list(range(64)))):
        usual = (before[index] - plain[index]).float()[..., others]
        found = (after[index] - large[index]).float()[..., others]
        assert torch.equal(found[:, 0], usual[:, 0]), "another head"
        unit = 2.0**17 if index else 1.0
        if index or name.startswith("k"):
            assert found[:, 1].norm() / unit <= 1.2 * usual[:, 1].norm() + 1e-6
        else:  # rounded by token: the offset is part of what their error is relative to
            assert found[:, 1].norm() <= 2 * usual[:, 1].norm() / plain[0][:, 1].norm() * large[0][:, 1].norm()
    if name in ("k4v4", "k8v4"):
        query = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
        raw = [RawTokens(*arrays) for arrays in (layer.sinks.arrays, layer.tail.view())]
        read = decode_attention(query, History(*layer.packed_sides(), *raw, layer.sinks.starts), Scoring(1e-5))
        scores = query.float().unflatten(1, (2, 2)).flatten(2, 3) @ after[0].transpose(-1, -2) * 1e-5
        wanted = scores.softmax(-1) @ after[1]
        torch.testing.assert_close(read.float().flatten(1, 2), wanted.flatten(1, 2), rtol=0.02, atol=0.02 * 2.0**17)


@pytest.mark.parametrize("offloading", [False, True])
def test_later_tokens_of_another_size_widen_their_head(offloading):
    """If the first tokens are equal or small, later tokens may be many times larger than the frozen unit."""
    small, large = (tuple(x.clone() for x in states(64, dim=64, seed=seed)) for seed in (0, 1))
    for x in large:
        x[:, 1] *= 1000.0
    layer = preset_layer("k4v4", tile=32, min_statistics=64, offloader=Offloader() if offloading else None)
    layer.update(*small)
    layer.update(*large)
    assert layer.tiles[0].count == 4
    for index in (0, 1):
        first, later = layer.dense(SIDES[index]).split(64, dim=2)
        for head in (0, 1):
            assert (later - large[index])[:, head].norm() < 0.2 * large[index][:, head].norm()
            assert (first - small[index])[:, head].norm() < 0.3 * small[index][:, head].norm()


def test_a_sequence_that_was_padding_at_the_first_encode_is_read_well():
    """The sequence has no statistics of its own. Statistics of nothing would give a unit in which values saturate."""
    layer = preset_layer("k4v4", tile=32, min_statistics=64)
    layer.note_padding([0, 60])
    first, later = states(64, batch=2, dim=64), states(64, batch=2, dim=64, seed=1)
    layer.update(*first)
    layer.update(*later)
    for index in (0, 1):
        read = layer.dense(SIDES[index])[1, :, 64:]
        assert (read - later[index][1]).norm() < 0.2 * later[index][1].norm()


@pytest.mark.parametrize("name", ["k4v4", "k8v4", "paper-mse-4", "int8"])
def test_numbers_that_cannot_be_stored_become_nan_with_a_warning(name, monkeypatch):
    said = []
    monkeypatch.setattr("turboquant_hf.cache.word.logger.warning_once", said.append)
    layer = preset_layer(name, tile=32, min_statistics=64, boundary_layers=0)
    layer.update(*states(64, dim=64))
    assert not said
    x = states(64, dim=64, seed=1)
    for y in x:
        y[:, 1] *= 1e15
    layer.update(*x)
    assert (
        layer.dense("keys")[:, 1, 64:].isnan().any(-1).all() and layer.dense("values")[:, 1, 64:].isnan().any(-1).all()
    )
    assert layer.dense("keys")[:, 0].isfinite().all() and layer.dense("values")[:, 0].isfinite().all()
    assert said and "too large" in said[0] and "lossless" in said[0] and layer.quantizers[0].name in said[0]
