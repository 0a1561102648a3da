"""Memory: the reported bytes are the bytes held, and they are as few as promised."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from tests.conftest import make_llama
from turboquant_hf import TurboQuantCache


def make_cache(preset, head_dim=64, heads=8, layers=2, **overrides):
    config = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim
    )
    return TurboQuantCache(config, preset=preset, **overrides)


def fill(cache, tokens, heads=8, head_dim=64, batch=1, dtype=torch.bfloat16, block=4096):
    generator = torch.Generator().manual_seed(0)
    for start in range(0, tokens, block):
        for layer in range(len(cache.layers)):
            shape = (batch, heads, min(block, tokens - start), head_dim)
            x = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
            cache.update(*x, layer)
    return cache


def held_nbytes(root) -> int:
    """Bytes of every tensor storage that can be reached from an object."""
    storages, seen, queue = {}, set(), [root]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type) or type(item).__module__.startswith(("torch.nn", "builtins.mod")):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            continue
        package = type(item).__module__.split(".")[0]
        if isinstance(item, (list, tuple, dict, set)) or package in ("turboquant_hf", "transformers"):
            queue.extend(gc.get_referents(item))
    return sum(storages.values())


@pytest.mark.parametrize("tokens", [1, 100, 300, 1000])
@pytest.mark.parametrize("preset", ["k4v4", "k3v3", "kivi-4", "lossless"])
def test_nbytes_is_what_is_held(preset, tokens):
    cache = fill(make_cache(preset), tokens, batch=2)
    shared = sum({(q, 64): q.shared_nbytes(64) for q in cache.layers[0].quantizers}.values())
    assert cache.nbytes + cache.spare_nbytes == held_nbytes(cache) + shared


def test_nbytes_is_what_is_held_while_queries_are_gathered():
    cache = make_cache("k4v4", layers=1)
    cache.layers[0]._returns_handles = lambda: True
    fill(cache, 100)
    cache.layers[0].observe(torch.randn(1, 16, 100, 64))
    shared = sum({(q, 64): q.shared_nbytes(64) for q in cache.layers[0].quantizers}.values())
    assert cache.nbytes + cache.spare_nbytes == held_nbytes(cache) + shared


def test_nbytes_follows_every_operation():
    cache = fill(make_cache("k4v4"), 1000)
    before = cache.nbytes
    cache.batch_repeat_interleave(2)
    shared = sum({(q, 64): q.shared_nbytes(64) for q in cache.layers[0].quantizers}.values())
    assert cache.nbytes - shared == 2 * (before - shared)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes == before
    cache.crop(-500)
    assert cache.nbytes < before
    cache.reset()
    assert (
        cache.nbytes == cache.spare_nbytes == held_nbytes(cache) == 0
        and cache.compression_ratio == cache.compression_ratio_in_use == 1.0
    )


def test_a_packed_prompt_is_held_once():
    """A prefill leaves no raw copy behind."""
    cache = fill(make_cache("k4v4"), 4096)
    assert held_nbytes(cache) < 0.4 * cache.dense_nbytes


def test_raw_layers_are_counted_as_they_are():
    config = Gemma2Config(
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, head_dim=64, sliding_window=32
    )
    cache = fill(TurboQuantCache(config), 1000, block=100)
    assert len(cache.packed_layers) == 1
    shared = sum({(q, 64): q.shared_nbytes(64) for q in cache.packed_layers[0].quantizers}.values())
    assert cache.nbytes + cache.spare_nbytes == held_nbytes(cache) + shared


@pytest.mark.parametrize(
    ("preset", "tokens", "heads", "head_dim", "least"),
    [
        ("k4v4", 4096, 8, 64, 3.2), ("k3v3", 4096, 8, 128, 3.9),
        ("k4v4", 32768, 1, 128, 3.6), ("k3v3", 32768, 1, 64, 4.5),
    ],
)  # fmt: skip
def test_compression_ratio(preset, tokens, heads, head_dim, least):
    cache = fill(make_cache(preset, head_dim, heads, layers=1), tokens, heads, head_dim)
    assert cache.dense_nbytes == 2 * 2 * heads * head_dim * tokens
    assert cache.compression_ratio_in_use >= least
    shared = sum({(q, head_dim): q.shared_nbytes(head_dim) for q in cache.layers[0].quantizers}.values())
    assert cache.compression_ratio == cache.dense_nbytes / (held_nbytes(cache) + shared)
    if tokens == 32768:
        assert held_nbytes(cache) <= cache.dense_nbytes / (0.92 * least)
        assert cache.spare_nbytes < 0.08 * cache.nbytes


@pytest.mark.parametrize("tokens", [100, 500, 1000, 4000])
def test_reported_memory_is_what_is_allocated(tokens):
    cache = TurboQuantCache(make_llama(head_dim=64).config)
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, 2, tokens, 64, dtype=torch.bfloat16))
    held = cache.nbytes + cache.spare_nbytes
    assert cache.resident_nbytes == held
    larger = held > cache.dense_nbytes
    told = f"{held / cache.dense_nbytes:.2f}x larger" if larger else f"{cache.dense_nbytes / held:.2f}x smaller"
    assert f"resident bytes={held:,}, {told} than 16 bit; {cache.nbytes:,} in use" in repr(cache)
    tiles = cache.packed_layers[0].tiles[0]
    assert tiles.capacity - tiles.count <= max(1, tiles.count // 20), "a twentieth, or one tile"


@pytest.mark.parametrize("block", [1000, 50])
def test_a_large_recent_window_takes_memory_as_it_fills(block):
    cache = fill(make_cache("k4v4", recent_window=131_072), 1000, block=block)
    assert cache.spare_nbytes < 0.2 * cache.nbytes
