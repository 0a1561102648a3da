"""Tiles in host memory: equal tokens, at most two layers on the device, and only packed bytes are copied."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig

from tests.support.families import available, build, family_named, prompt
from tests.support.generating import TILES, generate, turboquant
from tests.support.updates import feed, make_config
from turboquant_hf import TurboQuantCache
from turboquant_hf.cache.offload import HostTileStore, Offloader

LAYERS = 5


def make_cache(preset="k4v4", offloading=True, **options):
    config = make_config(num_hidden_layers=LAYERS)
    return TurboQuantCache(config, preset, offloading=offloading, **{**TILES, **options})


@pytest.fixture
def staged(monkeypatch):
    """[(layer that is entered or None, layer that is copied)], one entry per copy to the device."""
    copies, occasion = [], []
    stage, enter = Offloader._stage, Offloader.enter

    def entering(self, layer):
        occasion.append(self.layers.index(layer))
        enter(self, layer)
        occasion.pop()

    def staging(self, stores, keep):
        before = stores[0].staged
        stage(self, stores, keep)
        if before is None:
            index = next(i for i, layer in enumerate(self.layers) if layer.tiles is stores)
            copies.append((occasion[-1] if occasion else None, index))

    monkeypatch.setattr(Offloader, "enter", entering)
    monkeypatch.setattr(Offloader, "_stage", staging)
    return copies


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3n", "gemma4", "gpt_oss", "deepseek_v3", "qwen3_next", "t5"])
@pytest.mark.parametrize("preset", ["lossless", "k4v4"])
@pytest.mark.parametrize("attention", ["auto", "keep"])
def test_generation_is_the_same(name, preset, attention):
    family = family_named(name)
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    model, inputs = build(family), prompt(family)
    for options in ({}, {"num_beams": 3}):
        outputs = []
        for offloading in (False, True):
            packed = turboquant(preset, attention=attention, offloading=offloading)
            outputs.append(generate(model, inputs, new=20, **options, **packed))
        assert torch.equal(*outputs)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lossless", "k4v4"])
def test_every_operation_is_the_same(preset):
    caches = [make_cache(preset, offloading) for offloading in (True, False)]
    for cache in caches:
        feed(cache, 100)
        feed(cache, 1, seed=1)
        cache.crop(-37)
        feed(cache, 30, seed=2)
        cache.reorder_cache(torch.tensor([1, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3, 1]))
        cache.layers[0].offload(), cache.layers[0].prefetch()
        for seed in range(50):
            feed(cache, 1, seed=3 + seed, batch=3)
    assert caches[0].nbytes == caches[1].nbytes
    for a, b in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_the_next_layer_is_copied_while_one_attends(staged):
    """In the steady state, no layer waits for its own tiles, and each layer is copied once per step."""
    cache = feed(make_cache(recent_window=64), 200)
    feed(cache, 1, seed=1)
    staged.clear()
    feed(cache, 1, seed=2)
    assert staged == [(index, (index + 1) % LAYERS) for index in range(LAYERS)]


def test_at_most_two_layers_are_on_the_device(staged):
    cache = feed(make_cache(), 300)
    for seed in range(60):
        feed(cache, 1, seed=seed)
        on_device = [layer for layer in cache.layers if layer.tiles[0].staged is not None]
        assert 1 <= len(on_device) <= 2
        largest = max(sum(s.nbytes + s.spare_nbytes for s in layer.tiles) for layer in cache.layers)
        assert cache.offloader.staging_nbytes <= 2 * (largest + 5 * 256)
    assert staged


def test_only_packed_bytes_are_copied_to_the_device(staged):
    """The device copies have the bytes of the packed arrays, and none of the decoded tensors is kept."""
    cache = feed(make_cache("k4v4", recent_window=64), 1000, batch=1)
    dense = 1000 * 2 * 2 * 16 * 4
    assert all(isinstance(store, HostTileStore) for layer in cache.layers for store in layer.tiles)
    staging = cache.offloader.staging_nbytes
    assert 0 < staging < 2 * dense / 3 and staging <= cache.spare_nbytes
    packed = sum(store.nbytes for layer in cache.layers for store in layer.tiles)
    assert cache.offloaded_nbytes == packed > 0.5 * cache.nbytes
    assert make_cache(offloading=False).offloaded_nbytes == 0


def test_a_new_tile_is_added_to_the_staged_tiles(staged):
    """A tile that is encoded while its layer is on the device is not fetched again, unless storage had to grow."""
    cache = make_cache()
    layer = cache.layers[0]
    feed(cache, 100)
    for _ in range(40):
        before = layer.tiles[0].count, layer.tiles[0].capacity
        new = [torch.randn(2, 2, 1, 16) for _ in range(2)]
        layer.update(*new)
        if layer.tiles[0].count > before[0] and layer.tiles[0].capacity == before[1]:
            assert layer.tiles[0].staged is not None
        fresh = copy.deepcopy(layer)
        assert torch.equal(fresh.keys, layer.keys) and torch.equal(fresh.values, layer.values)


def test_copies_are_independent():
    cache = feed(make_cache(), 100)
    before = [layer.keys.clone() for layer in cache.layers]
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert twin.offloader is not cache.offloader and twin.offloader.layers == twin.packed_layers
        assert all(store.owner is twin.offloader for layer in twin.layers for store in layer.tiles)
        feed(twin, 60, seed=1)
        twin.crop(-100)
        feed(twin, 40, seed=2)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, cache.layers, strict=True))


def test_reset_frees_the_staging_buffers():
    cache = feed(make_cache(), 100)
    assert cache.offloader.staging_nbytes
    cache.reset()
    assert cache.offloader.staging_nbytes == cache.spare_nbytes == cache.nbytes == 0
    feed(cache, 100, batch=3)
    assert cache.layers[0].batch_size == 3


def test_save_and_load(tmp_path):
    cache = feed(make_cache(), 100)
    cache.save(tmp_path / "x")
    config = LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    for offloading in (True, False):
        loaded = TurboQuantCache.load(tmp_path / "x", config, offloading=offloading)
        assert bool(loaded.offloaded_nbytes) == offloading
        for a, b in zip(cache.layers, loaded.layers, strict=True):
            assert torch.equal(a.keys, b.keys)


def test_offloading_with_a_single_layer(staged):
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    cache = feed(TurboQuantCache(config, offloading=True, **TILES), 100)
    plain = feed(TurboQuantCache(config, **TILES), 100)
    for seed in range(20):
        feed(cache, 1, seed=seed), feed(plain, 1, seed=seed)
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)


@pytest.mark.parametrize("bad", ["cpu", 1, None], ids=str)
def test_an_invalid_offloading_value_is_named_in_the_error(llama, bad):
    with pytest.raises(ValueError, match=f"offloading={bad!r} is not supported; allowed: true, false"):
        TurboQuantCache(llama.config, offloading=bad)
    with pytest.raises(ValueError, match="offloading="):
        llama.generate(cache_implementation="turboquant", cache_config={"offloading": bad}, max_new_tokens=2)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["turboquant", "sdpa"])
@torch.inference_mode()
def test_on_a_gpu_the_logits_are_those_without_offload(small_llama, attention):
    """Copies run on their own stream. A race would change the logits."""
    options = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 8, "head_dim": 64}
    model = small_llama(**options, max_position_embeddings=9000).to("cuda", torch.bfloat16)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 199, (2, 8000), device="cuda")
    logits = []
    for offloading in (False, True):
        cache = TurboQuantCache(model.config, "k4v4", offloading=offloading)
        for piece in ids[:, :7000].split(1000, dim=1):
            model(piece, past_key_values=cache)
        logits.append(torch.stack([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7000, 7400)]))
        if offloading:
            assert all(x.is_pinned() for layer in cache.layers for store in layer.tiles for x in store.arrays.values())
            assert all(x.device.type == "cpu" for layer in cache.layers for s in layer.tiles for x in s.arrays.values())
            largest = max(sum(store.nbytes for store in layer.tiles) for layer in cache.layers)
            assert cache.offloader.staging_nbytes < 2.2 * largest + 4096
    assert torch.equal(*logits)
