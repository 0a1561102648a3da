"""Sequences that begin with copies of one token: what was learned of them is learned again from the tokens behind."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.packaged import needs_packaged
from turboquant_hf.cache import TurboQuantLayer, serialization
from turboquant_hf.cache.encoder import AGAIN
from turboquant_hf.cache.fixed import FixedStep
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.commands.perplexity import with_repeats
from turboquant_hf.evaluation.harness.fidelity import measure_window
from turboquant_hf.evaluation.harness.models import load_model
from turboquant_hf.evaluation.harness.texts import packaged_text
from turboquant_hf.kernels.statistics import effective_rank

HEADS, DIM = 2, 64
PRESET = load_preset("k4v4", recent_window=0)


def rotary(x: torch.Tensor, start: int) -> torch.Tensor:
    """x [..., T, D] at positions from `start` on."""
    angle = torch.arange(start, start + x.shape[-2])[:, None] * 10_000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], dim=-1)


def tokens(count: int, *, same: bool, start: int = 0, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Keys, values and queries [1, H, T, D]; `same`: of one token repeated."""
    scales = torch.randn(2, HEADS, 1, DIM, generator=torch.Generator().manual_seed(9)).exp()
    noise = torch.randn(3, 1, HEADS, 1 if same else count, DIM, generator=torch.Generator().manual_seed(seed))
    keys, values, queries = (x.expand(1, HEADS, count, DIM) for x in noise)
    return rotary(keys * scales[0], start), values.clone(), rotary(queries * scales[1], start)


def joined(*parts: tuple[torch.Tensor, ...], dim: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(same, dim=dim) for same in zip(*parts, strict=True))


def prompt(repeats: int, others: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    return joined(tokens(repeats, same=True, seed=seed), tokens(others, same=False, start=repeats, seed=seed + 1))


def new_layer(**options) -> TurboQuantLayer:
    return TurboQuantLayer(PRESET, PRESET.keys, PRESET.values, lambda: True, **options)


def feed(layer: TurboQuantLayer, states: tuple[torch.Tensor, ...], piece: int = 128) -> TurboQuantLayer:
    """As attention does: append, count the queries, encode."""
    for keys, values, queries in zip(*(x.split(piece, dim=2) for x in states), strict=True):
        layer.append(keys, values)
        layer.observe(queries)
        layer.commit()
    return layer


def score_error(layer: TurboQuantLayer, states: tuple[torch.Tensor, ...], start: int, row: int = 0) -> float:
    """Relative error of what queries make of the keys from position `start` on, what softmax ignores left out.

    Tiles that hold repeats too are left out: most of their mean is that of the repeats.
    """
    start = -(-start // PRESET.tile) * PRESET.tile
    keys, _, queries = (x[row : row + 1, :, start:] for x in states)
    found = queries @ (layer.held("keys")[row : row + 1, :, start:] - keys).transpose(-1, -2)
    wanted = queries @ keys.transpose(-1, -2)
    found, wanted = (x - x.mean(dim=-1, keepdim=True) for x in (found, wanted))
    return (found.square().mean() / wanted.square().mean()).sqrt().item()


def arrays(layer: TurboQuantLayer) -> dict[str, torch.Tensor]:
    return layer.export()[1]


def assert_same(layer: TurboQuantLayer, other: TurboQuantLayer) -> None:
    one, two = arrays(layer), arrays(other)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_effective_rank_counts_different_tokens(count):
    values = torch.randn(3, HEADS, count, DIM)[:, :, torch.arange(512) % count]
    rank = effective_rank(values.unflatten(2, (4, 128)) * 1e15, torch.ones(3, 4, 128))
    assert rank.shape == (3, HEADS) and (rank <= count + 1e-4).all() and (rank >= 0.6 * count).all()


def test_effective_rank_leaves_out_what_does_not_count():
    values, weight = torch.randn(2, HEADS, 40, 16, DIM), torch.ones(2, 40, 16)
    values[0, :, 1:] = values[0, :, :1, :1]
    weight[0, 0], weight[1] = 0.0, 0.0
    values[0, :, 0], values[0, 0] = torch.nan, torch.nan  # padding, and a head
    rank = effective_rank(values, weight)
    assert rank[0, 0].isnan() and (rank[0, 1:] - 1.0).abs().max() < 1e-4 and rank[1].isnan().all()


@pytest.mark.parametrize("repeats", [256, 384, 500, 1000])
def test_keys_behind_repeats_are_as_good_as_others(repeats):
    states, alone = prompt(repeats, 640), tokens(640, same=False, seed=1)
    layer = feed(new_layer(), states)
    ordinary = score_error(feed(new_layer(), alone), alone, 0)
    assert score_error(layer, states, repeats) < 1.3 * ordinary
    assert layer.encoder.unsettled is None and layer.encoder.energy is None and not layer.encoder.observes


def test_repeats_keep_their_own_error():
    states = prompt(384, 256)
    keys = states[0][:, :, 4:384]
    found = feed(new_layer(), states).held("keys")[:, :, 4:384]
    assert (found - keys).square().mean() < 0.01 * keys.square().mean()


def test_each_sequence_of_a_batch_is_what_it_is_alone():
    one, two = prompt(384, 384), prompt(0, 768, seed=5)
    # Of fewer than 256 tokens, a sequence would borrow from its batch.
    batch = feed(new_layer(), joined(one, two, dim=0), piece=384)
    for row, states in enumerate((one, two)):
        alone = arrays(feed(new_layer(), states, piece=384))
        for name, x in arrays(batch).items():
            torch.testing.assert_close(x[row], alone[name][0], rtol=0, atol=0, msg=name)


def test_padding_does_not_count():
    states = prompt(384, 512)
    padded = joined(tuple(torch.full((1, HEADS, 100, DIM), 1e4) for _ in states), states)
    other = prompt(0, 996, seed=5)
    layer = new_layer()
    layer.note_padding([100, 0])
    both = joined(padded, other, dim=0)
    feed(layer, both)
    ordinary = score_error(layer, both, 484, row=1)
    assert score_error(layer, both, 484) < 1.5 * ordinary


def test_every_kind_of_layer_stores_the_same_bytes():
    states = prompt(384, 384)
    plain = feed(new_layer(), states)
    offloaded = feed(new_layer(offloader=Offloader()), states)
    assert_same(offloaded, plain)
    static = TurboQuantStaticLayer(PRESET, PRESET.keys, PRESET.values, 1024, lambda: True)
    assert_same(feed(static, states), plain)


def test_a_file_of_repeats_goes_on_learning():
    states = prompt(384, 384)
    first, rest = tuple(x[:, :, :384] for x in states), tuple(x[:, :, 384:] for x in states)
    layer = feed(new_layer(), first)
    assert layer.encoder.unsettled.tolist() == [AGAIN]
    tensors: dict = {}
    described = json.loads(json.dumps(serialization._describe_packed(layer, "0.", tensors)))
    loaded = new_layer()
    serialization._fill_packed(loaded, described, "0.", lambda name: tensors[name].clone(), None)
    assert_same(feed(loaded, rest), feed(layer, rest))
    described.pop("unsettled")  # as files were before
    settled = new_layer()
    serialization._fill_packed(settled, described, "0.", lambda name: tensors[name].clone(), None)
    assert settled.encoder.unsettled is None


def test_a_batch_may_change_while_it_waits():
    one, two = prompt(384, 384), prompt(0, 768, seed=5)
    both = joined(two, one, dim=0)
    layer = feed(new_layer(), tuple(x[:, :, :384] for x in both))
    layer.reorder_cache(torch.tensor([1, 0, 1]))
    assert layer.encoder.unsettled.tolist() == [AGAIN, 0, AGAIN]
    states = tuple(x[[1, 0, 1]] for x in both)
    feed(layer, tuple(x[:, :, 384:] for x in states))
    ordinary = score_error(layer, states, 384, row=1)
    assert score_error(layer, states, 384, row=0) < 1.3 * ordinary
    assert score_error(layer, states, 384, row=2) < 1.3 * ordinary


def test_steps_on_the_device_count_queries_until_the_repeats_end():
    states = prompt(384, 256)
    plain = feed(new_layer(), tuple(x[:, :, :384] for x in states))
    stepped = feed(new_layer(), tuple(x[:, :, :384] for x in states))
    rest = tuple(x[:, :, 384:] for x in states)
    feed(plain, rest, piece=1)
    for keys, values, queries in zip(*(x.split(1, dim=2) for x in rest), strict=True):
        fixed = stepped.fix(1, 4, {})
        with FixedStep(fixed.counts, 1, fixed.room, None):
            stepped.append(keys, values)
            fixed.observe(queries)
        stepped.replayed(1)
    assert stepped.encoder.unsettled is None
    stepped.unfix()
    for name, x in arrays(plain).items():
        torch.testing.assert_close(arrays(stepped)[name], x, rtol=1e-5, atol=0, msg=name)


@pytest.fixture(scope="module")
def packaged():
    model, tokenizer = load_model(attn_implementation="turboquant")
    text = tokenizer(packaged_text()[:4000], return_tensors="pt").input_ids
    return model, tokenizer, text


def divergence(packaged, preset: str, repeated: str, before: int = 0) -> float:
    """KL over 128 tokens of text behind a run that fills the first 256 tokens, as `perplexity --repeat` measures it."""
    model, tokenizer, text = packaged
    run = tokenizer(repeated, add_special_tokens=False, return_tensors="pt").input_ids
    window = with_repeats(text[:, :384], run, 256 - before, before)
    how = load_preset(preset, recent_window=0, encode_first=True, min_statistics=256)
    record = measure_window(model, window, [how], 256, scored=256)
    return record["presets"][0]["kl"] / record["baseline"]["tokens"]


@pytest.mark.slow
@needs_packaged
@pytest.mark.parametrize(
    ("repeated", "before"), [("\n", 0), (" word", 0), ("\n", 5)], ids=["newlines", "word", "in the middle"]
)
def test_text_behind_repeats_costs_no_more_than_other_text(packaged, repeated, before):
    assert divergence(packaged, "k4v4", repeated, before) < 0.03
