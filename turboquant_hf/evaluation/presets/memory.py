"""Bits per channel and bytes of a preset, computed from its byte layout."""

from __future__ import annotations

from collections import Counter

import torch

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import CachePreset
from turboquant_hf.quantizers import Quantizer


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
    """Bytes of a 16-bit cache / bytes allocated for this one, behind a prompt of so many bfloat16 tokens.

    Counts tiles, sinks, the raw tail, statistics, the shared rotations and the room that is allocated ahead:
    `TurboQuantCache.compression_ratio` of one sequence. Below 1 the cache takes more than a 16-bit one.
    """
    tiles = packed_tiles(preset, tokens, layers)
    rest = torch.empty(1, 1, tokens - tiles * preset.tile, head_dim, dtype=torch.bfloat16)
    total = 0
    for pair, count in Counter(preset.layer_quantizers(ordinal, layers) for ordinal in range(layers)).items():
        layer = TurboQuantLayer(preset, *pair)
        layer.lazy_initialization(rest[:, :, :0])
        for store in layer.tiles:
            store.extend(tiles)
        layer.tail.append(rest, rest)
        if not tiles:
            layer.tail.own()
        learned = sum(_state_nbytes(quantizer, head_dim, preset.tile) for quantizer in pair) if tiles else 0
        total += count * kv_heads * (layer.nbytes + layer.spare_nbytes + learned)
    return 4 * head_dim * kv_heads * tokens * layers / (total + _shared_nbytes(preset, head_dim, layers))


def used_compression(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> float:
    """The same without the room that is allocated ahead: `TurboQuantCache.compression_ratio_in_use`."""
    tiles = packed_tiles(preset, tokens, layers)
    raw = 2 * head_dim * kv_heads * (tokens - tiles * preset.tile + min(preset.sinks, tokens))
    total = 0.0
    for quantizer in _quantizers(preset, layers):
        packed = quantizer.bits_per_channel(head_dim, preset.tile) / 8 * head_dim * preset.tile * tiles * kv_heads
        total += raw + packed + (_state_nbytes(quantizer, head_dim, preset.tile) * kv_heads if tiles else 0)
    return 4 * head_dim * kv_heads * tokens * layers / (total + _shared_nbytes(preset, head_dim, layers))


MEMORY_NOTE = (
    "Times smaller than a 16-bit cache behind a prompt of so many tokens. First what the cache takes, the room "
    "allocated ahead included; in brackets the bytes in use."
)
"""What a reader of `memory_cell` is told."""


def memory_cell(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> str:
    """Memory behind a prompt as a reader sees it: resident bytes first, those in use beside; see `MEMORY_NOTE`."""
    place = (head_dim, tokens, layers, kv_heads)
    resident = resident_compression(preset, *place)
    larger = ": larger than 16 bit" if resident < 1 else ""
    return f"{resident:.2f}x{larger} ({used_compression(preset, *place):.2f}x)"


def packed_tiles(preset: CachePreset, tokens: int, layers: int) -> int:
    """How many tiles of a sequence are packed behind a prompt."""
    waits = any(q.needs_statistics for q in preset.layer_quantizers(0, layers))
    ready = tokens >= preset.min_statistics or not waits
    return max(tokens - preset.recent_window, 0) // preset.tile if ready else 0


def _quantizers(preset: CachePreset, layers: int) -> list[Quantizer]:
    return [quantizer for ordinal in range(layers) for quantizer in preset.layer_quantizers(ordinal, layers)]


def _shared_nbytes(preset: CachePreset, head_dim: int, layers: int) -> int:
    return sum(quantizer.shared_nbytes(head_dim) for quantizer in set(_quantizers(preset, layers)))


def _state_nbytes(quantizer: Quantizer, head_dim: int, tile: int) -> int:
    state = quantizer.fit(torch.zeros(1, 1, 1, tile, head_dim), torch.ones(1, 1, tile), None)
    return sum(x.numel() * x.itemsize for x in state.values())
