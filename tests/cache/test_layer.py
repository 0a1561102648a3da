"""One layer: the cost of an append, and the layer protocol."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.layers import make_layer, preset_layer, states
from tests.support.tagged import Lossless, Tagged
from turboquant_hf.cache.sides import SIDES


class Counting(Lossless):
    """A quantizer that counts the tiles that it encodes, in a list of the test."""

    counted: list[int] = []

    def encode(self, tiles, state, weight=None):
        Counting.counted.append(tiles.shape[2])
        return super().encode(tiles, state, weight)


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
