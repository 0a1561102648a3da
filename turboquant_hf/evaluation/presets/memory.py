"""Bits per channel and bytes of a preset, computed from its byte layout."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import LlamaConfig

from turboquant_hf.cache.estimate import MemoryEstimate, MemoryPlan
from turboquant_hf.config import CachePreset


def bits_per_channel(preset: CachePreset, head_dim: int, layers: int) -> tuple[float, float]:
    """Bits per channel of packed keys and values, averaged over `layers` KV layers."""
    pairs = [preset.layer_quantizers(ordinal, layers) for ordinal in range(layers)]
    keys, values = (
        sum(q.bits_per_channel(head_dim, preset.tile) for q in side) / layers for side in zip(*pairs, strict=True)
    )
    return keys, values


def average_bits(cache) -> tuple[float, float]:
    """Bits per channel of keys and of values in packed tiles, averaged over the layers of a filled cache."""
    layers = cache.packed_layers
    bits = [
        [
            quantizer.bits_per_channel(dim, layer.preset.tile, layer.dtype)
            for quantizer, dim in zip(layer.quantizers, layer.head_dims, strict=True)
        ]
        for layer in layers
    ]
    keys, values = (sum(side) / len(layers) for side in zip(*bits, strict=True))
    return keys, values


def resident_compression(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> float:
    """Bytes of a 16-bit cache divided by the bytes allocated for this cache, for a prompt of bfloat16 tokens.

    This is `TurboQuantCache.compression_ratio` of one sequence. Below 1, the cache is larger than a 16-bit cache.
    """
    return _estimate(preset, head_dim, tokens, layers, kv_heads).compression_ratio


def used_compression(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> float:
    """The same without the room allocated ahead: `TurboQuantCache.compression_ratio_in_use`."""
    return _estimate(preset, head_dim, tokens, layers, kv_heads).compression_ratio_in_use


MEMORY_NOTE = (
    "Times smaller than a 16-bit cache behind a prompt of so many tokens. First what the cache takes, the room "
    "allocated ahead included; in brackets the bytes in use."
)
"""The explanation of `memory_cell` for readers."""


def memory_cell(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> str:
    """The cell of a table: compression by resident bytes, and in brackets by bytes in use; see `MEMORY_NOTE`."""
    place = (head_dim, tokens, layers, kv_heads)
    resident = resident_compression(preset, *place)
    larger = ": larger than 16 bit" if resident < 1 else ""
    return f"{resident:.2f}x{larger} ({used_compression(preset, *place):.2f}x)"


@lru_cache(maxsize=256)
def _estimate(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> MemoryEstimate:
    return _plan(head_dim, layers, kv_heads).estimate(tokens, preset, observed=False)


@lru_cache(maxsize=8)
def _plan(head_dim: int, layers: int, kv_heads: int) -> MemoryPlan:
    """The memory plan of a model with these sizes. The other fields of the model do not matter."""
    heads = {"num_attention_heads": kv_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    return MemoryPlan(LlamaConfig(num_hidden_layers=layers, vocab_size=8, **heads), torch.bfloat16)
