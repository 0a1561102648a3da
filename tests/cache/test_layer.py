"""One layer: the cost of an append, the layer protocol, and refused input."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.tagged import Lossless, Tagged
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.cache.measuring import MeasuringLayer
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.cache.sides import SIDES
from turboquant_hf.config import CachePreset, load_preset
from turboquant_hf.kernels.decode import History, RawTokens, Scoring, decode_attention


class Counting(Lossless):
    """A quantizer that counts the tiles that it encodes, in a list of the test."""

    counted: list[int] = []

    def encode(self, tiles, state, weight=None):
        Counting.counted.append(tiles.shape[2])
        return super().encode(tiles, state, weight)


def make_layer(keys=None, values=None, handles=False, **options) -> TurboQuantLayer:
    options = {"tile": 8, "recent_window": 8, "sinks": 4, "min_statistics": 0, **options}
    preset = CachePreset(keys=keys or Lossless(), values=values or Lossless(), **options)
    return TurboQuantLayer(preset, preset.keys, preset.values, lambda: handles)


def preset_layer(name, handles=False, offloader=None, **overrides) -> TurboQuantLayer:
    preset = load_preset(name, **{"recent_window": 0, "min_statistics": 0, **overrides})
    kind = MeasuringLayer if preset.encode_first else TurboQuantLayer
    return kind(preset, preset.keys, preset.values, lambda: handles, offloader)


def states(tokens, batch=1, heads=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype) for _ in range(2))


def test_every_tile_is_encoded_once():
    Counting.counted.clear()
    layer = make_layer(keys=Counting())
    for keys, values in [states(50), *(states(1, seed=seed) for seed in range(200))]:
        layer.update(keys, values)
    assert sum(Counting.counted) == layer.tiles[0].count == (250 - 8) // 8
    assert len(Counting.counted) == 1 + layer.tiles[0].count - (50 - 8) // 8


def test_appending_a_token_copies_no_history():
    layer = make_layer()
    layer.update(*states(800))
    moved = 0
    for seed in range(400):
        capacity = [store.capacity for store in layer.tiles]
        pointers = [x.data_ptr() for store in layer.tiles for x in store.arrays.values()]
        layer.update(*states(1, seed=seed))
        if [store.capacity for store in layer.tiles] == capacity:
            assert [x.data_ptr() for store in layer.tiles for x in store.arrays.values()] == pointers
        else:
            moved += 1
    assert moved <= 400 / 8 / 4, "grows by several tiles at a time"


def test_growth_is_geometric():
    layer = make_layer(tile=8, recent_window=0)
    layer.update(*states(8 * 1000))
    moves, capacity = 0, layer.tiles[0].capacity
    for _ in range(250):
        layer.update(*states(8))
        moves += layer.tiles[0].capacity != capacity
        capacity = layer.tiles[0].capacity
    assert moves <= 5


def test_appending_a_token_keeps_the_tail_in_place():
    layer = make_layer()
    layer.update(*states(50))
    pointers = [x.data_ptr() for x in layer.tail.arrays]
    layer.update(*states(1))
    assert [x.data_ptr() for x in layer.tail.arrays] == pointers


def test_what_update_returned_survives_the_commit():
    """A commit moves the front of the tail into a tile while attention may still read the dense view of it."""
    layer = make_layer(recent_window=8, tile=8)
    expected = []
    for seed in range(40):
        keys, values = states(1, seed=seed)
        expected.append(keys.clone())
        dense, _ = layer.update(keys, values)
        assert torch.equal(dense, torch.cat(expected, dim=2)), seed


def test_what_the_model_passes_is_not_kept_or_changed():
    """Keys may be a view of a fused projection. A block that waits for statistics must not keep it in memory."""
    layer = make_layer(keys=Tagged(), min_statistics=500, recent_window=0)
    fused = torch.randn(1, 2, 100, 48)
    keys, values = fused[..., :16], fused[..., 16:32]
    before = fused.clone()
    layer.update(keys, values)
    layer.update(*states(3))
    assert torch.equal(fused, before)
    assert all(x.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr() for x in layer.tail.arrays)
    fused.zero_()
    assert torch.equal(layer.keys[:, :, :100], before[..., :16])


def test_handles_know_their_shape_without_decoding():
    layer = make_layer(handles=True)
    keys, _ = layer.update(*states(30, batch=3))
    layer.dense = None
    assert keys.shape == keys.size() == (3, 2, 30, 16)
    assert keys.size(2) == 30 and keys.shape[-2] == 30 and keys.dim() == keys.ndim == 4 and len(keys) == 3
    assert keys.dtype == torch.float32 and keys.device.type == "cpu"
    assert keys.to(torch.float32) is keys and keys.to("cpu") is keys
    assert "[3, 2, 30, 16]" in repr(keys)


USES = {
    "slice": lambda x: x[:, :, 3:5],
    "left of a product": lambda x: x @ torch.ones(16, 2),
    "right of a product": lambda x: torch.ones(2, 30) @ x,
    "sum": lambda x: x * 2 + x - 1,
    "right of a difference": lambda x: 1 - x / 3,
    "transpose": lambda x: x.transpose(2, 3),
    "cat": lambda x: torch.cat([x, x], dim=2),
    "sdpa": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "to": lambda x: x.to(torch.float64),
    "repeat": lambda x: x.repeat_interleave(2, dim=1),
    "einsum": lambda x: torch.einsum("bhtd,bhsd->bhts", x, x),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_handles_are_tensors_to_code_that_does_not_know_them(use):
    layer = make_layer(handles=True)
    x = states(30)
    keys, _ = layer.update(*x)
    layer.commit()
    assert layer.tiles[0].count
    assert torch.equal(use(keys), use(x[0]))


def test_an_old_handle_keeps_its_length():
    layer = make_layer(handles=True)
    x = states(30)
    keys, _ = layer.update(*x)
    layer.update(*states(20, seed=1))
    assert keys.shape[2] == 30 and torch.equal(keys.dense(), x[0])


def test_nothing_is_encoded_before_enough_tokens_were_seen():
    layer = make_layer(keys=Tagged(), min_statistics=64)
    layer.note_padding([20, 40])
    layer.update(*states(83, batch=2))
    assert layer.tiles[0].count == 0, "the longest sequence has 63 real tokens"
    layer.update(*states(1, batch=2))
    assert layer.tiles[0].count == (84 - 8) // 8


def test_statistics_are_frozen_at_the_first_encode():
    layer = preset_layer("k4v4", tile=16, min_statistics=64)
    layer.update(*states(64))
    first = copy.deepcopy(layer.states)
    layer.update(*(3 * x for x in states(200, seed=1)))
    for before, after in zip(first, layer.states, strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_queries_reach_the_first_fit():
    """Queries that never read a channel change its balance, so the state differs with and without queries."""
    plain, seen = (preset_layer("k4v4", handles=True, tile=16, min_statistics=64) for _ in range(2))
    for layer in (plain, seen):
        layer.update(*states(64))
    seen.observe(torch.randn(1, 4, 64, 16) * torch.linspace(0.1, 4, 16))
    for layer in (plain, seen):
        layer.commit()
    assert not torch.allclose(plain.states[0]["balance"], seen.states[0]["balance"], rtol=0.05)


def test_padding_is_in_no_statistic():
    layers = [preset_layer("k4v4", handles=True, tile=16, min_statistics=16) for _ in range(2)]
    x, query = states(80), torch.randn(1, 4, 80, 16)
    for layer, filler in zip(layers, (0.0, 1000.0), strict=True):
        layer.note_padding([32])
        layer.update(*(torch.cat([torch.full_like(y[:, :, :32], filler), y], dim=2) for y in x))
        layer.observe(torch.cat([torch.full_like(query[:, :, :32], filler), query], dim=2))
        layer.commit()
    for index in (0, 1):
        torch.testing.assert_close(layers[0].dense(SIDES[index])[:, :, 32:], layers[1].dense(SIDES[index])[:, :, 32:])


def test_learned_padding_equals_noted_padding():
    x = states(60, batch=2)
    noted, learned = make_layer(handles=True), make_layer(handles=True)
    noted.note_padding([0, 17])
    for layer in (noted, learned):
        layer.update(*x)
    learned.learn_padding([0, 17])
    for name in ("first", "starts"):
        assert str(getattr(noted.sinks, name)) == str(getattr(learned.sinks, name))
    for a, b in zip(noted.sinks.arrays, learned.sinks.arrays, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tokens", [30, 200], ids=["tail", "tiles"])
def test_crop_to_an_absolute_length(tokens):
    """A positive number is an absolute length (legacy). A number above the length changes nothing."""
    layer = make_layer()
    x = states(tokens)
    layer.update(*x)
    layer.crop(tokens + 5)
    assert layer.get_seq_length() == tokens
    layer.crop(21)
    assert torch.equal(layer.keys, x[0][:, :, :21]) and torch.equal(layer.values, x[1][:, :, :21])


def test_crop_inside_a_tile_brings_its_rest_back_to_the_tail():
    layer = make_layer(recent_window=0)
    x = states(40)
    layer.update(*x)
    assert layer.tiles[0].count == 5 and layer.tail.count == 0
    layer.crop(-3)
    assert layer.tiles[0].count == 4 and layer.tail.count == 5
    layer.update(x[0][:, :, 37:], x[1][:, :, 37:])
    assert torch.equal(layer.keys, x[0])


def test_crop_to_nothing_serves_another_batch():
    layer = make_layer()
    layer.update(*states(40))
    layer.crop(-40)
    assert layer.get_seq_length() == 0
    layer.update(*states(40, batch=3))
    assert layer.batch_size == 3


@pytest.mark.parametrize("batch", [0, 3])
def test_every_operation_serves_an_empty_batch(batch):
    layer = make_layer()
    x = states(40, batch=batch)
    layer.update(*x)
    layer.update(*states(0, batch=batch))
    layer.reorder_cache(torch.arange(batch))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.arange(2 * batch))
    layer.crop(-1)
    assert layer.keys.shape == (2 * batch, 2, 39, 16)
    assert layer.nbytes >= 0


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2"])
def test_an_empty_batch_is_encoded_too(name):
    layer = preset_layer(name, tile=16, handles=True)
    layer.update(*states(40, batch=0))
    layer.observe(torch.empty(0, 4, 40, 16))
    layer.commit()
    assert layer.keys.shape == (0, 2, 40, 16)


def test_early_initialization_comes_before_any_token():
    layer = make_layer()
    layer.lazy_initialization(torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16))
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(7) == (7, 0)
    x = states(40, batch=2)
    assert torch.equal(layer.update(*x)[0], x[0])


def test_operations_before_the_first_update_change_nothing():
    layer = make_layer()
    layer.note_padding([0, 3])
    for change in (
        lambda: layer.crop(-3),
        lambda: layer.crop(0),
        lambda: layer.reorder_cache(torch.tensor([1, 0])),
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.offload(),
        lambda: layer.prefetch(),
        lambda: layer.commit(),
    ):
        change()
    assert layer.get_seq_length() == 0 and layer.keys is None and layer.values is None
    layer.update(*states(20, batch=4))
    assert layer.sinks.first == [3, 3, 0, 0], "padding noted ahead follows its sequences"


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int32, torch.float8_e4m3fn, torch.bool, torch.complex64], ids=str
)
def test_an_unsupported_dtype_is_named_in_the_error(dtype):
    keys = torch.zeros(1, 2, 8, 16).to(dtype)
    with pytest.raises(ValueError, match=f"keys: dtype={dtype}.*allowed: torch.float16, torch.bfloat16, torch.float32"):
        make_layer().update(keys, keys)


@pytest.mark.parametrize(
    ("shape", "value_shape"),
    [
        ((2, 8, 16), (2, 8, 16)),
        ((1, 2, 8, 16), (2, 8, 16)),
        ((1, 2, 8, 16), (1, 2, 7, 16)),
        ((1, 2, 8, 16), (1, 4, 8, 16)),
        ((), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_wrong_shapes_are_refused_and_nothing_is_lost(shape, value_shape, first):
    layer = make_layer()
    if not first:
        layer.update(*states(20))
    length = layer.get_seq_length()
    with pytest.raises(ValueError, match="keys|values"):
        layer.update(torch.zeros(shape), torch.zeros(value_shape))
    assert layer.get_seq_length() == length
    layer.update(*states(3))
    assert layer.get_seq_length() == length + 3


@pytest.mark.parametrize(
    "change", [{"batch": 2}, {"heads": 4}, {"dim": 8}, {"dtype": torch.bfloat16}], ids=lambda change: str(*change)
)
def test_a_later_block_must_continue_the_first(change):
    layer = make_layer()
    layer.update(*states(20))
    with pytest.raises(ValueError, match="does not continue"):
        layer.update(*states(3, **change))
    assert layer.get_seq_length() == 20


def test_padding_of_another_batch_is_refused():
    layer = make_layer()
    layer.note_padding([0, 1, 2])
    with pytest.raises(ValueError, match="3 sequences.*batch has 1"):
        layer.update(*states(20))


def test_backward_through_a_packed_cache_is_refused():
    layer = make_layer()
    keys, values = (x.requires_grad_() for x in states(40))
    dense, _ = layer.update(keys, values)
    assert torch.equal(dense, keys)
    with pytest.raises(RuntimeError, match="keeps no gradients.*use_cache=False"):
        dense.sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")], ids=str)
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
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
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


@pytest.mark.parametrize("recent_window", [0, 2])
def test_encode_first_reads_tokens_that_fill_no_tile_through_the_quantizer(recent_window):
    keys, values = states(29, dim=64)
    layer = preset_layer("paper-mse-3", encode_first=True, recent_window=recent_window, tile=8, sinks=2)
    dense = layer.update(keys[:, :, :27], values[:, :, :27])
    whole = preset_layer("paper-mse-3", tile=8, sinks=2)
    expected = whole.update(*(torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in (keys, values)))
    rounded = 27 - recent_window
    for read, codes, raw in zip(dense, (whole.dense("keys"), whole.dense("values")), (keys, values), strict=True):
        # One vector's code does not depend on its tile, so the trial encode equals that of the full tile.
        torch.testing.assert_close(read[:, :, :rounded], codes[:, :, :rounded])
        assert torch.equal(read[:, :, rounded:], raw[:, :, rounded:27])
        assert not torch.equal(read[:, :, 24:rounded], raw[:, :, 24:rounded])
    assert expected[0].shape[2] == 32 and layer.tiles[0].count == rounded // 8


def test_encode_first_centres_a_few_tokens_by_a_whole_tile():
    """The mean of a single new token would store that token exactly."""
    keys, values = states(129, dim=64)
    layer = preset_layer("k3v3", encode_first=True, tile=64, min_statistics=64)
    read, _ = layer.update(keys, values)
    error = (read[:, :, 128] - keys[:, :, 128]).norm() / keys[:, :, 128].norm()
    assert error > 0.05


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
