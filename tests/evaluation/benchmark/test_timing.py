"""Random inputs, which are reproducible, and timing."""

import math

import pytest
import torch

from tests.support.toys import CPU
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.benchmark.data import Source, packed_layer, tile_nbytes
from turboquant_hf.evaluation.benchmark.timing import (
    Timing,
    copy_bandwidth,
    measure,
    relative_error,
    rotation_count,
    steadiest,
)


def test_source_repeats_itself_and_looks_like_keys():
    def draw(seed):
        source = Source(1, 2, 3, 64, torch.float32, CPU, seed=seed)
        source.queries(5)  # a stream of its own
        return source, *source.keys_and_values(4096)

    (source, keys, values), (_, again, _), (_, other, _) = draw(0), draw(0), draw(1)
    assert torch.equal(keys, again) and not torch.allclose(keys, other)
    spread = keys.std(dim=2)
    assert (spread.amax(-1) > 4 * spread.median(-1).values).all(), "outlier channels"
    assert (keys.mean(dim=2).norm(dim=-1) > keys.std(dim=2).norm(dim=-1)).all(), "a mean that all keys share"
    query = source.queries(256).view(1, 2, 3, 256, 64)
    scores = query @ (keys - keys.mean(dim=2, keepdim=True)).unsqueeze(2).transpose(-1, -2) / 8
    assert 1.5 < scores.std() < 2.5
    assert (values != 0).all() and values.mean().abs() < 0.05


def test_packed_layer_holds_its_tokens():
    layer = packed_layer(load_preset("k4v4"), Source(2, 2, 2, 64, torch.float32, CPU), 640)
    assert layer.get_seq_length() == 640 and layer.tiles[0].count == 4 and layer.encoder.fitted
    stored = sum(x.numel() * x.itemsize for store in layer.tiles for x in store.view().values())
    raw = sum(x.numel() * x.itemsize for x in (*layer.tail.view(), *layer.sinks.arrays))
    assert stored + raw <= tile_nbytes(layer) <= stored + raw + 64
    with pytest.raises(ValueError, match="from 256"):
        packed_layer(load_preset("k4v4"), Source(1, 2, 2, 64, torch.float32, CPU), 200)


def test_measure_counts_each_call_once():
    order = []
    timing = measure([lambda: order.append(0), lambda: order.append(1)], CPU, seconds=0.0)
    assert timing.method == "host" and timing.seconds > 0
    assert order[:6] == [0, 1, 0, 1, 0, 1]
    assert rotation_count(1, CPU) == 1
    assert rotation_count(40 * 2**20, torch.device("cuda")) == 4


@pytest.mark.parametrize(
    ("spreads", "kept", "taken"), [((0.01, 0.0), 0, 1), ((0.24, 0.02, 0.01), 1, 2), ((0.4, 0.2, 0.3, 0.01), 1, 3)]
)
def test_disturbed_measurements_are_taken_again(spreads, kept, taken):
    timings = [Timing(1.0 + i, spread, "graph") for i, spread in enumerate(spreads)]
    left = iter(timings)
    assert steadiest(lambda: next(left)) is timings[kept]
    assert len(list(left)) == len(spreads) - taken


def test_copy_bandwidth_is_plausible_for_memory():
    assert 1e8 < copy_bandwidth(CPU) < 1e13


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_relative_error(bad):
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact * 1.01, exact) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(torch.tensor([3.0, bad]), exact) == math.inf
