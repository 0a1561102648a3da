"""Puts transformers' own QuantizedCache (quanto, HQQ) into the harness that measures presets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import QuantizedCache

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.config import CachePreset


def make_cache(config, preset: CachePreset):
    """The cache of a preset of either kind."""
    if isinstance(preset, ForeignPreset):
        return MeasuredQuantizedCache(config=config, **dict(preset.options))
    return TurboQuantCache(config, preset)


@dataclass(frozen=True)
class ForeignPreset(CachePreset):
    """A preset that stands for a QuantizedCache with these options. Only its sizes are read from the preset fields."""

    options: tuple[tuple[str, Any], ...] = ()


class MeasuredQuantizedCache(QuantizedCache):
    """transformers' QuantizedCache with the byte counts that `fidelity.measure` reads, from its real tensors."""

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.itemsize for layer in self.layers for x in _tensors(layer))

    spare_nbytes = 0

    @property
    def compression_ratio_in_use(self) -> float:
        shapes = [self._dense(layer) for layer in self.layers]
        return 2 * sum(shapes) / self.nbytes

    @property
    def packed_layers(self) -> list[_PackedView]:
        return [_PackedView(layer) for layer in self.layers]

    @staticmethod
    def _dense(layer) -> int:
        packed = layer._dequantize(layer._quantized_keys).numel() + layer._dequantize(layer._quantized_values).numel()
        return packed + layer.keys.numel() + layer.values.numel()


class _PackedView:
    """The part of a layer that `average_bits` reads: each side reports its bytes and elements."""

    def __init__(self, layer) -> None:
        self.preset, self.dtype, self.head_dims = CachePreset(), layer.keys.dtype, (0, 0)
        self.quantizers = [_StoredBits(layer, x) for x in (layer._quantized_keys, layer._quantized_values)]


class _StoredBits:
    def __init__(self, layer, packed) -> None:
        stored = sum(x.numel() * x.itemsize for x in _inner_tensors(packed))
        self.bits = 8 * stored / layer._dequantize(packed).numel()

    def bits_per_channel(self, *_) -> float:
        return self.bits


def _tensors(layer) -> Iterator[torch.Tensor]:
    for stored in (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values):
        yield from _inner_tensors(stored)


def _inner_tensors(stored) -> Iterator[torch.Tensor]:
    """The plain tensors inside a tensor subclass (quanto) or a (tensor, metadata) pair (HQQ)."""
    if isinstance(stored, tuple):
        yield stored[0]
        yield from (x for x in stored[1].values() if isinstance(x, torch.Tensor))
    elif hasattr(stored, "__tensor_flatten__") and type(stored) is not torch.Tensor:
        for name in stored.__tensor_flatten__()[0]:
            yield from _inner_tensors(getattr(stored, name))
    else:
        yield stored
