"""Caches whose codes follow a trellis: the tests of other presets, with tiles of whole 32-bit words."""

from __future__ import annotations

import pytest
import torch

from tests.support.updates import feed, feed_layer, held, make_config, make_static_layer, states
from turboquant_hf import TurboQuantCache, load_preset
from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation.presets.memory import bits_per_channel

PRESETS = ["k4v4", "k3v3", "k2v2"]
BITS = {
    "k4v4": (4.38, 4.13), "k4v3": (4.38, 3.13), "k3v3": (3.50, 3.13),
    "k3v2": (3.50, 2.13), "k25v25": (2.85, 2.63), "k2v2": (2.50, 2.13),
}  # fmt: skip
"""The most bits per channel, keys and values, at a head dim of 64."""
TILES = {"tile": 32, "recent_window": 8, "sinks": 4, "min_statistics": 40}


def make_cache(preset, **options):
    return TurboQuantCache(make_config(head_dim=64), preset, **{**TILES, **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_loaded_cache_holds_the_same(tmp_path, preset, dtype):
    cache = make_cache(preset)
    cache.note_padding(torch.tensor([[1, 1, 1], [0, 0, 1]]))
    feed(cache, 110, dtype=dtype)
    cache.save(tmp_path / "x")
    loaded = TurboQuantCache.load(tmp_path / "x", make_config(head_dim=64))
    for twin in (loaded, cache):
        feed(twin, 40, seed=1, dtype=dtype)
        twin.reorder_cache(torch.tensor([1, 0]))
        twin.crop(-60)
        feed(twin, 50, seed=2, dtype=dtype)
    assert cache.packed_layers[0].tiles[0].count >= 3 and loaded.preset == cache.preset
    for a, b in zip(held(cache), held(loaded), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("preset", PRESETS)
def test_offloading_changes_nothing(preset):
    caches = [make_cache(preset, offloading=offloading) for offloading in (False, True)]
    for cache in caches:
        feed(cache, 110)
        feed(cache, 40, seed=1)
    for a, b in zip(*(held(cache) for cache in caches), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_and_chunks_encode_alike(preset):
    keys, values = states(150, dim=64)
    layers = [make_static_layer(preset, **TILES) for _ in range(2)]
    for layer, split in zip(layers, ([60, *[1] * 90], [60, 90]), strict=True):
        feed_layer(layer, keys, values, split)
    assert layers[0].tiles[0].count == (150 - 8) // 32 and layers[0].get_seq_length() == 150
    for stepped, chunked in zip(*((layer.keys, layer.values) for layer in layers), strict=True):
        torch.testing.assert_close(stepped, chunked)
        assert stepped.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_static_and_growing_caches_encode_alike(preset):
    keys, values = states(150, dim=64)
    static = make_static_layer(preset, **TILES)
    feed_layer(static, keys, values, [100, 50])
    cache = make_cache(preset)
    for start, stop in ((0, 100), (100, 150)):
        cache.update(keys[:, :, start:stop], values[:, :, start:stop], 0)
    growing = cache.update(*(x[:, :, :1] for x in (keys, values)), 0)
    for mine, other, given in zip(growing, (static.keys, static.values), (keys, values), strict=True):
        torch.testing.assert_close(mine[:, :, :150], other[:, :, :150])
        assert 0.01 < (mine[:, :, :128] - given[:, :, :128]).abs().mean() < (0.4 if preset == "k2v2" else 0.2)


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_does_not_matter(preset):
    """The content of the padding changes nothing that is read of the sequence."""
    found = []
    for odd in (0.0, 50.0):
        keys, values = states(110, dim=64)
        keys[0, :, :5] = values[0, :, :5] = odd
        cache = make_cache(preset)
        cache.note_padding(torch.tensor([[0] * 5 + [1] * 105, [1] * 110]))
        cache.update(keys, values, 0)
        found.append([x[:, :, 5:] for x in cache.update(*(x[:, :, 100:101] for x in (keys, values)), 0)])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("side", [0, 1], ids=["key", "value"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_nan_is_seen_in_its_head(preset, side):
    x = states(110, dim=64)
    x[side][0, 1, 60, 3] = torch.nan
    cache = make_cache(preset)
    cache.update(*x, 0)
    dense = cache.update(*(y[:, :, :1] for y in states(1, dim=64, seed=1)), 0)
    assert dense[side].isnan().flatten(2).any(-1).tolist() == [[False, True], [False, False]]
    assert dense[side][0, 1, 4:64].isnan().all()


@pytest.mark.parametrize("layers", [2, 24, 26, 28, 30, 32, 80])
@pytest.mark.parametrize("preset", BITS)
def test_presets_keep_to_their_bits(preset, layers):
    for found, most in zip(bits_per_channel(load_preset(preset), 64, layers), BITS[preset], strict=True):
        assert found <= most


def test_layers_of_a_model_differ_as_the_preset_says():
    preset = load_preset("k25v25")
    widths = [(keys.widths[1][1], values.bits) for keys, values in (preset.layer_quantizers(n, 17) for n in range(17))]
    assert widths == [(1, 2), *7 * [(2, 3), (2, 2)], (2, 3), (1, 2)]


def test_a_file_of_an_earlier_version_keeps_what_its_names_meant(tmp_path):
    """`k4v4` meant the scalar preset: a file says with its quantizers what it holds, not with its name."""
    earlier = CachePreset.from_dict({**load_preset("k4v4-scalar").to_dict(), "name": "k4v4"})
    cache = make_cache(earlier)
    feed(cache, 110)
    cache.save(tmp_path / "x")
    loaded = TurboQuantCache.load(tmp_path / "x", make_config(head_dim=64))
    assert loaded.preset.name == "k4v4" and loaded.preset.keys == load_preset("k4v4-scalar").keys
    assert loaded.preset.keys != load_preset("k4v4").keys and "keys=conditioned" in loaded.preset.label
    for a, b in zip(held(cache), held(loaded), strict=True):
        assert torch.equal(a, b)
