"""`Storage` by itself: when a tile is encoded, what is read back, and what happens to all arrays at once."""

from __future__ import annotations

import pytest
import torch

from tests.support.generating import TILES
from tests.support.updates import states
from turboquant_hf.cache.sides import SIDES
from turboquant_hf.cache.storage import Storage
from turboquant_hf.config import load_preset

TILE, WINDOW, SINKS = TILES["tile"], TILES["recent_window"], TILES["sinks"]


def make_storage(preset="lossless", starts=None, **options):
    preset = load_preset(preset, **{**TILES, **options})
    storage = Storage(preset, *preset.layer_quantizers(0, 1))
    storage.noted_starts = starts
    return storage


def filled(tokens, storage=None, step=1, seed=0):
    """A storage that got `tokens` tokens in steps, and these tokens."""
    storage, given = storage or make_storage(), states(tokens, seed=seed)
    storage.lazy_initialization(*(x[:, :, :0] for x in given))
    for start in range(0, tokens, step):
        append(storage, *(x[:, :, start : start + step] for x in given))
    return storage, given


def append(storage, keys, values):
    storage.sinks.write(keys, values, storage.tokens)
    storage.tail.append(keys, values)
    storage.commit()


@pytest.mark.parametrize("step", [1, 5, 60])
@pytest.mark.parametrize("tokens", [0, 8, 15, 16, 17, 60])
def test_a_tile_is_encoded_once_it_is_full_and_older_than_the_recent_window(tokens, step):
    storage, given = filled(tokens, step=step)
    assert storage.tiles.keys.count == storage.tiles.values.count == max(tokens - WINDOW, 0) // TILE
    assert storage.tokens == tokens == storage.stored + storage.tail.count
    for side, x in zip(SIDES, given, strict=True):
        assert torch.equal(storage.held(side), x)


@pytest.mark.parametrize(("tokens", "tiles"), [(29, 0), (30, 2), (33, 3)])
def test_nothing_is_encoded_before_enough_tokens_are_seen(tokens, tiles):
    storage, _ = filled(tokens, make_storage("k8v4", min_statistics=30))
    assert storage.tiles.keys.count == tiles and storage.encoder.fitted == bool(tiles)


def test_padding_does_not_count_as_seen():
    for starts, tiles in (([5, 0], 2), ([5, 3], 0)):
        storage, _ = filled(30, make_storage("k8v4", starts, min_statistics=30))
        assert storage.tiles.keys.count == tiles


def test_padding_and_sinks_have_no_weight():
    storage, _ = filled(40, make_storage(starts=[0, 6]))
    weight = storage.weight(0, 2)
    assert weight.shape == (2, 2, TILE)
    assert weight.flatten(1).tolist() == [[float(p >= start + SINKS) for p in range(2 * TILE)] for start in (0, 6)]


@pytest.mark.parametrize(("start", "stop"), [(0, 50), (0, 3), (5, 21), (16, 24), (33, 50), (45, 47), (20, 20)])
def test_any_range_is_read_as_it_was_written(start, stop):
    storage, given = filled(50)
    for side, x in zip(SIDES, given, strict=True):
        assert torch.equal(storage.held(side, start, stop), x[:, :, start:stop])


def test_sinks_are_read_exactly_whatever_the_quantizer():
    storage, given = filled(50, make_storage("k2v2", starts=[0, 6]))
    for side, x in zip(SIDES, given, strict=True):
        read = storage.held(side)
        for row, start in enumerate((0, 6)):
            assert torch.equal(read[row, :, start : start + SINKS], x[row, :, start : start + SINKS])
            assert not torch.equal(read[row, :, start + SINKS : 30], x[row, :, start + SINKS : 30])


@pytest.mark.parametrize("keep", [50, 45, 40, 39, 17, 16, 3, 0])
def test_a_cut_keeps_the_first_tokens_and_writing_goes_on(keep):
    storage, given = filled(50)
    storage.cut(keep)
    assert storage.tokens == keep and storage.tiles.keys.count == min(keep // TILE, (50 - WINDOW) // TILE)
    more = states(30, seed=1)
    append(storage, *more)
    for side, old, new in zip(SIDES, given, more, strict=True):
        assert torch.equal(storage.held(side), torch.cat([old[:, :, :keep], new], dim=2))


def test_map_changes_every_array():
    storage, given = filled(50, make_storage("k8v4", starts=[0, 6]))
    before = [storage.held(side) for side in SIDES]
    storage.step = object()
    storage.map(lambda x: x.index_select(0, torch.tensor([1, 1, 0])))
    assert storage.batch_size == 3 and storage.step is None
    for side, x in zip(SIDES, before, strict=True):
        assert torch.equal(storage.held(side), x[[1, 1, 0]])


def test_bytes_are_those_of_the_arrays():
    storage, _ = filled(50)
    packed = 2 * 2 * 2 * storage.stored * 16 * 4  # sides, sequences, heads, tokens, channels, bytes of float32
    raw = 2 * 2 * 2 * (storage.tail.count + SINKS) * 16 * 4
    assert 0 <= storage.nbytes - packed - raw <= 2 * 8, "and the starts"
    assert storage.dense_nbytes == 2 * 2 * 2 * 50 * 32
    storage.clear()
    assert storage.nbytes == storage.spare_nbytes == storage.dense_nbytes == storage.tokens == 0


@pytest.mark.parametrize("preset", ["lossless", "k4v4"])
def test_what_is_exported_restores_the_same_layer(preset):
    storage, _ = filled(50, make_storage(preset, starts=[0, 6]))
    described, arrays = storage.export()
    other = make_storage(preset)
    other.restore(described, lambda name, *_: arrays[name].clone(), torch.device("cpu"))
    assert other.tokens == 50 and other.sinks.first == [0, 6]
    for side in SIDES:
        assert torch.equal(other.held(side), storage.held(side))


def test_what_does_not_continue_the_arrays_is_named():
    storage, (keys, values) = filled(20)
    for name, pair in {"keys": (keys.half(), values), "values": (keys, values[:1])}.items():
        with pytest.raises(ValueError, match=f"{name}: .* does not continue this layer's torch.float32"):
            storage.check(*pair)
    with pytest.raises(ValueError, match="padding was noted for 3 sequences, but the batch has 2"):
        make_storage(starts=[0, 0, 0]).lazy_initialization(keys, values)
    with pytest.raises(ValueError, match="keys: dtype=torch.float64 is not supported"):
        make_storage().lazy_initialization(keys.double(), values.double())
