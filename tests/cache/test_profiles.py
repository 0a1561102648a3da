"""Profiles in caches: the file, whose it is, where it is found, and what a cache that uses one holds."""

from __future__ import annotations

import gc
import json
import struct
import weakref

import pytest
import torch
from transformers import MistralConfig

from tests.support.profiles import random_profile, random_vectors
from tests.support.updates import feed, held, make_config
from turboquant_hf import CacheFileError, CachePreset, Profile, TurboQuantCache, TurboQuantStaticCache, load_preset
from turboquant_hf.cache.fixed import FixedLayer
from turboquant_hf.cache.profiles import FILE

TILES = {"tile": 32, "recent_window": 0, "min_statistics": 256}
PRESETS = ["k4v4", "k2v2", "k3v3-scalar"]


def cache_of(profile, preset="k4v4", **options):
    return TurboQuantCache(make_config(), preset, profile=profile, **{**TILES, **options})


@pytest.fixture
def profile():
    return random_profile(make_config(), heads=2, dim=16, layers=3)


@pytest.fixture
def path(profile, tmp_path):
    profile.save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def rewrite_header(path, change):
    """Change the metadata of a safetensors file and leave its tensors alone."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_a_file_gives_the_same_profile_back_and_is_read_once(profile, path):
    read = Profile.load(path)
    assert read is Profile.load(str(path)) and read.path == path.resolve()
    assert (read.model, read.about, read.checksum) == (profile.model, profile.about, profile.checksum)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    profile.layers[0][0].energy.mul_(2.0)
    profile.save(path)
    assert Profile.load(path).checksum != read.checksum


@pytest.mark.parametrize("preset", PRESETS)
def test_tiles_are_packed_from_the_first_full_one_on(preset, path):
    cache = feed(cache_of(path, preset), 32)
    assert [layer.tiles.keys.count for layer in cache.packed_layers] == [1, 1, 1]
    assert [layer.tiles.keys.count for layer in feed(cache_of(None, preset), 255).packed_layers] == [0, 0, 0]
    assert load_preset(preset, profile=str(path), **TILES).first_encode == 32


@pytest.mark.parametrize("preset", PRESETS)
def test_equal_prefixes_hold_equal_bytes_alone_and_in_a_batch(preset, path):
    """Whatever follows, whatever stands beside, and in whatever pieces it came."""
    tokens = torch.stack([random_vectors(2, 16, seed, 160, batch=3) for seed in (0, 2)])
    tokens[:, 1, :, :100] = tokens[:, 0, :, :100]  # two sequences with a prefix of 100 tokens, and a third

    def stored(batch, pieces):
        cache = cache_of(path, preset)
        for piece in torch.arange(160).split(pieces):
            cache.update(*(x[batch][:, :, piece] for x in tokens), 0)
        return [store.view(0, 3) for store in cache.packed_layers[0].tiles]

    together = stored([0, 1, 2], 160)
    for arrays in (stored([0], 160), stored([1], 7), stored([1, 2], [90, 70])):
        for whole, part in zip(together, arrays, strict=True):
            for name, x in part.items():
                assert torch.equal(x[:1], whole[name][:1]) and torch.equal(whole[name][:1], whole[name][1:2])
    assert not torch.equal(together[0]["codes"][2], together[0]["codes"][0])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_cache_brings_its_profile_along(preset, dtype, path, tmp_path):
    cache = feed(cache_of(path, preset), 150, dtype=dtype)
    cache.save(tmp_path / "x.cache")
    path.unlink()
    loaded = TurboQuantCache.load(tmp_path / "x.cache", make_config())
    assert (loaded.tokens, loaded.nbytes) == (cache.tokens, cache.nbytes)
    assert loaded.profile.checksum == cache.profile.checksum and loaded.profile.about == cache.profile.about
    for twin in (loaded, cache):
        feed(twin, 40, seed=1, dtype=dtype)
        twin.crop(-50)
        feed(twin, 20, seed=2, dtype=dtype)
    assert all(map(torch.equal, held(cache), held(loaded)))
    loaded.save(tmp_path / "x.cache")  # and again
    again = TurboQuantCache.load(tmp_path / "x.cache", make_config())
    assert all(map(torch.equal, held(again), held(loaded)))


def test_a_saved_cache_without_a_profile_stays_without_one(path, tmp_path, profile):
    config = make_config()
    config._name_or_path = str(tmp_path)
    cache = feed(TurboQuantCache(config, **TILES), 300)
    cache.save(tmp_path / "x.cache")
    profile.save(tmp_path / FILE)  # comes to the model's folder later
    loaded = TurboQuantCache.load(tmp_path / "x.cache", config)
    assert loaded.profile is None and all(map(torch.equal, held(cache), held(loaded)))


def test_a_cache_file_with_a_damaged_profile_is_refused(path, tmp_path):
    feed(cache_of(path), 40).save(tmp_path / "x.cache")
    rewrite_header(tmp_path / "x.cache", lambda header: header.update(version="3"))
    with pytest.raises(CacheFileError, match="version='3' is not supported; allowed: '1', '2'"):
        TurboQuantCache.load(tmp_path / "x.cache", make_config())
    rewrite_header(tmp_path / "x.cache", lambda header: header.update(version="2"))
    raw = (tmp_path / "x.cache").read_bytes()
    at = raw.index(Profile.load(path).layers[0][0].matrix.numpy().tobytes())
    (tmp_path / "x.cache").write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
    with pytest.raises(CacheFileError, match="damaged: profile.layers.0.keys.matrix"):
        TurboQuantCache.load(tmp_path / "x.cache", make_config())


def test_offloaded_and_preallocated_caches_hold_the_same(path):
    plain = feed(cache_of(path), 150)
    offloaded = feed(cache_of(path, offloading=True), 150)
    static = feed(TurboQuantStaticCache(make_config(), 160, profile=path, **TILES), 150)
    for other in (offloaded, static):
        for a, b in zip(plain.packed_layers, other.packed_layers, strict=True):
            for one, two in zip(a.tiles, b.tiles, strict=True):
                assert all(torch.equal(x, two.view()[name]) for name, x in one.view().items())


def test_memory_counts_the_maps_once_per_cache(path):
    cache = feed(cache_of(path), 150)
    bytes_of_maps = 2 * 3 * 2 * 2 * 16 * 16 * 4  # sides, layers, map and inverse, heads
    layers = sum(layer.nbytes for layer in cache.packed_layers)
    assert cache.nbytes == layers + bytes_of_maps
    assert TurboQuantCache.estimate(make_config(), 150, profile=path, dtype=torch.float32, **TILES).nbytes == (
        feed(cache_of(path), 150, batch=1).nbytes
    )


@pytest.mark.parametrize("cache", [TurboQuantCache, TurboQuantStaticCache])
def test_the_profile_in_the_models_folder_is_found_and_said_once(cache, profile, tmp_path, caplog):
    config = make_config()
    config._name_or_path = str(tmp_path)
    rest = {} if cache is TurboQuantCache else {"max_cache_len": 100}
    assert cache(config, **rest).profile is None
    profile.save(tmp_path / FILE)
    made = [cache(config, **rest) for _ in range(2)]
    assert all(x.profile.checksum == profile.checksum for x in made)
    assert [r.getMessage() for r in caplog.records if FILE in r.getMessage()] == [
        f"turboquant_hf: keys and values are conditioned by the model's profile, {tmp_path / FILE}."
    ]
    assert cache(config, profile=None, **rest).profile is None
    assert cache(config, preset="paper-mse-4", **rest).profile is None


REFUSED = {
    "model_type": ("mistral", lambda: make_config(MistralConfig)),
    "num_key_value_heads": (4, lambda: make_config(num_key_value_heads=4)),
    "head_dim": (32, lambda: make_config(head_dim=32)),
    "num_hidden_layers": (4, lambda: make_config(num_hidden_layers=4)),
    "rope_parameters": (
        "500000",
        lambda: make_config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    ),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_profile_of_another_model_is_refused_by_name(field, path):
    allowed, config = REFUSED[field]
    with pytest.raises(ValueError, match=rf"p\.safetensors.* {field}=.*allowed: {field}=.*{allowed}"):
        TurboQuantCache(config(), profile=path)


def test_a_larger_vocabulary_is_the_same_model(path):
    assert TurboQuantCache(make_config(vocab_size=77), profile=path).profile is not None


def test_files_that_are_no_profiles_are_refused_by_name(path, tmp_path):
    def load(match, kind=ValueError):
        with pytest.raises(kind, match=match):
            cache_of(path)

    rewrite_header(path, lambda header: header.update(version="9"))
    load("version='9' is not supported; allowed: '1'")
    rewrite_header(path, lambda header: header.update(version="1", content=header["content"].replace("llama", "mamba")))
    load("damaged: its header does not match")
    rewrite_header(path, lambda header: header.update(format="turboquant-cache"))
    load("is no profile: format='turboquant-cache'; allowed: 'turboquant-profile'")
    path.write_bytes(b"x" * 100)
    load("damaged or no profile")
    path.unlink()
    load("no such file", FileNotFoundError)
    with pytest.raises(ValueError, match="is a folder"):
        cache_of(tmp_path)


def test_a_damaged_tensor_is_named(path, profile):
    raw = path.read_bytes()
    at = raw.index(profile.layers[1][1].energy.numpy().tobytes())
    path.write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
    with pytest.raises(ValueError, match=r"damaged: layers\.1\.values\.energy does not match"):
        Profile.load(path)


@pytest.mark.parametrize("value", [3, "", True, b"x"])
def test_what_is_no_profile_is_refused(value):
    with pytest.raises(ValueError, match="profile=.* is not supported; allowed: a file's path, a Profile, 'auto'"):
        load_preset("k4v4", profile=value)


def test_presets_without_use_for_a_profile_refuse_one(path):
    with pytest.raises(ValueError, match="not supported by preset='kivi-4'; allowed: a preset whose keys"):
        cache_of(path, "kivi-4")


def test_presets_with_a_profile_survive_as_plain_data(path, profile):
    preset = load_preset("k4v4", profile=path)
    assert CachePreset.from_dict(json.loads(json.dumps(preset.to_dict()))).profile == str(path)
    assert load_preset("k4v4", profile=Profile.load(path)).to_dict()["profile"] == str(path)
    assert load_preset("k4v4", profile=None).to_dict()["profile"] is None
    with pytest.raises(ValueError, match=r"profile: one that is in no file .* allowed: profile\.save\(path\) first"):
        load_preset("k4v4", profile=profile).to_dict()


def test_layers_are_warmed_for_steps_once_per_map_and_keep_no_map_alive(monkeypatch):
    warmed, dense = [], FixedLayer.dense
    monkeypatch.setattr(FixedLayer, "dense", lambda self, side: warmed.append(side) or dense(self, side))

    def fix(profile):
        """Fix and warm the layers of a new cache, as on a GPU. Returns how many sides of layers were warmed."""
        before = len(warmed)
        for layer in feed(cache_of(profile), 64).packed_layers:
            layer.fix(1, 1, {})._warm(layer)
        return len(warmed) - before

    profiles = [random_profile(make_config(), heads=2, dim=16, layers=3) for _ in range(2)]
    assert [fix(profiles[i]) for i in (0, 0, 1, 1, 0)] == [6, 0, 6, 0, 0]
    maps = [weakref.ref(x) for profile in profiles for layer in profile.layers for x in layer]
    profiles.clear()
    gc.collect()
    assert [ref() for ref in maps] == [None] * 12
