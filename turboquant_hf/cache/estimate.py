"""Estimates the memory of a cache from a model's configuration, a preset and a number of tokens.

There is no formula of a layer's bytes here. A real cache is filled with tensors on the meta device, which have shapes
and take no memory. The cache then reports its bytes by the same properties as any cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from turboquant_hf.cache.base import Compression, check_config, is_latent, raw_nbytes
from turboquant_hf.cache.cache import TurboQuantCache
from turboquant_hf.cache.encoder import Encoder
from turboquant_hf.cache.growing import fill_indexers, is_indexed, token_nbytes, unpacked
from turboquant_hf.cache.hybrid import RECURRENT, map_state, packed_part
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cache.probe import probed_layers
from turboquant_hf.cache.sides import Sides
from turboquant_hf.cache.static import TurboQuantStaticCache
from turboquant_hf.cache.storage import DTYPES
from turboquant_hf.checks import check_whole
from turboquant_hf.config import CachePreset
from turboquant_hf.quantizers import Quantizer

MOST = 1 << 31
"""The largest number of tokens that `longest_context` tries."""


@dataclass(frozen=True)
class LayerMemory:
    """The layers of one kind, and the bytes that they hold together.

    Attributes:
        kind: "packed", "packed + recurrent", "sliding window", "recurrent", "sliding window + recurrent", "indexed"
            (sparse attention), "raw" (another kind of transformers', left as it is) or "none" (nothing of its own).
        layers: how many.
        kv_heads, head_dims: of keys and values; 0 and (0, 0) without any.
        window: of a sliding-window layer.
        nbytes, resident_nbytes: in use, and with the room allocated ahead. Matrices that layers share are left out.
        dense_nbytes: of the same tokens in a 16-bit cache.
    """

    kind: str
    layers: int
    kv_heads: int
    head_dims: tuple[int, int]
    window: int | None
    nbytes: int
    resident_nbytes: int
    dense_nbytes: int


@dataclass(frozen=True)
class MemoryEstimate(Compression):
    """The bytes of a cache that holds a prompt.

    Attributes:
        preset: the label of the preset.
        tokens: tokens of every sequence.
        batch: number of sequences.
        nbytes: bytes in use, as `cache.nbytes`.
        resident_nbytes: `nbytes` and the room allocated ahead, as `cache.resident_nbytes`.
        dense_nbytes: bytes of the same tokens in a 16-bit cache, as `cache.dense_nbytes`.
        released_nbytes: the part of the three above that sliding-window layers free with the next token. Transformers
            keeps a slice of the last tensor that it read, and the slice keeps the whole tensor in memory.
        shared_nbytes: the part of `nbytes` that layers share (rotations).
        token_nbytes, dense_token_nbytes: what one more token of one sequence takes in packed tiles, and in 16 bit; and
            in layers that grow and are not packed.
        cross_token_nbytes: of encoder-decoders, what cross-attention keeps per token of the encoder, uncompressed. None
            of the other figures counts it.
        layers: the same by kind of layer.
    """

    preset: str
    tokens: int
    batch: int
    nbytes: int
    resident_nbytes: int
    dense_nbytes: int
    released_nbytes: int
    shared_nbytes: int
    token_nbytes: float
    dense_token_nbytes: int
    cross_token_nbytes: int
    layers: tuple[LayerMemory, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**dataclasses.asdict(self), "compression_ratio": self.compression_ratio}


class MemoryPlan:
    """Estimates for one model. The plan finds out once what the layers keep.

    Args:
        config: the model's configuration.
        dtype: the model's dtype; None takes the configuration's, or bfloat16 if it names none.

    Raises:
        ValueError: `config` is not a configuration, or does not tell what the model caches.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> None:
        check_config(config)
        own = dtype or config.dtype or config.get_text_config(decoder=True).dtype
        self.config, self.dtype = config, own if own in DTYPES else torch.bfloat16
        self.probed, self.cross = probed_layers(config, self.dtype)

    def estimate(self, tokens: int, preset: CachePreset, batch: int = 1, **options: Any) -> MemoryEstimate:
        """See `TurboQuantCache.estimate`; `options` as for `cache_behind`."""
        return self._read(self.cache_behind(tokens, preset, batch, **options), tokens, batch)

    def cache_behind(
        self,
        tokens: int,
        preset: CachePreset,
        batch: int = 1,
        max_cache_len: int | None = None,
        chunk: int | None = None,
        observed: bool = True,
    ) -> TurboQuantCache | TurboQuantStaticCache:
        """A cache on the meta device that holds a prompt.

        Args:
            tokens: tokens of every sequence.
            preset: the cache's preset.
            batch: number of sequences.
            max_cache_len: room of a preallocated cache; None makes a growing cache.
            chunk: tokens of the prompt that are read at a time; None reads it at once.
            observed: whether our attention reads the prompt. It counts queries until the first tile is packed.
        """
        check_whole("tokens", tokens, 1)
        check_whole("batch", batch, 1)
        if max_cache_len is None:
            cache = TurboQuantCache(self.config, preset)
        else:
            check_whole("max_cache_len", max_cache_len, tokens)  # the prompt must fit
            cache = TurboQuantStaticCache(self.config, max_cache_len, preset)
        if chunk is not None:
            check_whole("chunk", chunk, 1)
        last = tokens if chunk is None else (tokens - 1) % chunk + 1
        observed = observed and not is_latent(self.config)
        fill_indexers(cache.layers, self.probed, batch, tokens)
        filled: dict[tuple, Any] = {}
        for index, seen in enumerate(self.probed[: len(cache.layers)]):
            layer, pair = cache.layers[index], _pair(seen, batch, tokens)
            packed = packed_part(layer)
            if pair is not None and packed is not None:
                # Equal packed layers are filled once, and one object then stands for all of them.
                what = packed.quantizers, *(x.shape for x in pair)
                if what not in filled:
                    filled[what] = _fill(packed, *pair, observed)
                if packed is layer:
                    cache.layers[index] = filled[what]
                else:
                    layer.packed = filled[what]
            elif pair is not None:
                _fill_raw(layer, *pair, last)
            for name in RECURRENT:
                if hasattr(seen, name):
                    widened = map_state(lambda x: x.new_empty((batch, *x.shape[1:])), getattr(seen, name))
                    setattr(layer, name, widened)
        return cache

    def _read(self, cache: TurboQuantCache | TurboQuantStaticCache, tokens: int, batch: int) -> MemoryEstimate:
        packed = [layer for layer in cache.packed_layers if layer.is_initialized]
        growth = sum(token_nbytes(seen) for seen in unpacked(cache.layers, self.probed))
        total = {
            "nbytes": cache.nbytes,
            "resident_nbytes": cache.resident_nbytes,
            "dense_nbytes": cache.dense_nbytes,
            "shared_nbytes": cache.nbytes - sum(layer.nbytes for layer in packed) - cache._raw_nbytes(),
        }
        return MemoryEstimate(
            preset=cache.preset.label,
            tokens=tokens,
            batch=batch,
            layers=self._by_kind(cache),
            token_nbytes=sum(_token_nbytes(layer) for layer in packed) + growth,
            dense_token_nbytes=sum(2 * layer.num_heads * sum(layer.head_dims) for layer in packed) + growth,
            cross_token_nbytes=sum(map(token_nbytes, self.cross)),
            released_nbytes=_released_nbytes(cache),
            **total,
        )

    def _by_kind(self, cache: TurboQuantCache | TurboQuantStaticCache) -> tuple[LayerMemory, ...]:
        found: dict[tuple, list] = {}
        for layer, seen in zip(cache.layers, self.probed, strict=False):
            pair = _pair(seen, 1, 1)
            heads, dims = (pair[0].shape[1], tuple(x.shape[3] for x in pair)) if pair else (0, (0, 0))
            packed = packed_part(layer)
            raw = 0 if packed is layer else raw_nbytes([layer])
            used, ahead, dense = (packed.nbytes, packed.spare_nbytes, packed.dense_nbytes) if packed else (0, 0, 0)
            window = getattr(seen, "sliding_window", None)
            what = found.setdefault((_kind(packed is not None, pair, window, seen), heads, dims, window), [0, 0, 0, 0])
            for index, value in enumerate((1, raw + used, raw + used + ahead, raw + dense)):
                what[index] += value
        return tuple(
            LayerMemory(kind, count, heads, dims, window, *nbytes)
            for (kind, heads, dims, window), (count, *nbytes) in found.items()
        )


def longest_context(nbytes: int, held: Callable[[int], int]) -> int:
    """The largest number of tokens whose bytes, `held(tokens)`, fit into `nbytes`; from 0 to `MOST`."""
    low = next((n for n in (1 << power for power in range(MOST.bit_length() - 1, -1, -1)) if held(n) <= nbytes), 0)
    high = min(2 * low, MOST)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) <= nbytes else (low, middle)
    return low


def _kind(held: bool, pair: Any, window: int | None, seen: Any) -> str:
    recurrent = any(hasattr(seen, name) for name in RECURRENT)
    own = "sliding window" if window else "indexed" if is_indexed(seen) else "raw"
    keeps = "" if pair is None else "packed" if held else own
    return " + ".join([*([keeps] if keeps else []), *(["recurrent"] if recurrent else [])]) or "none"


def _pair(seen: Any, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values [batch, H, tokens, D] in the shape of a probed layer; None if it keeps none."""
    keys, values = getattr(seen, "keys", None), getattr(seen, "values", None)
    if not isinstance(keys, torch.Tensor) or keys.dim() != 4:
        return None
    return tuple(x.new_empty((batch, x.shape[1], tokens, x.shape[3])) for x in (keys, values))


def _fill(layer: TurboQuantLayer, keys: torch.Tensor, values: torch.Tensor, observed: bool) -> TurboQuantLayer:
    """Put a prompt into a packed layer."""
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    layer.encoder = encoder = ShapesEncoder(layer.encoder.quantizers, layer.encoder.min_statistics)
    if observed and encoder.observes:
        encoder.energy = keys.new_empty((*keys.shape[:2], keys.shape[3]), dtype=torch.float32)
        encoder.count = keys.new_empty((keys.shape[0], 1, 1), dtype=torch.float32)
    layer.tail.append(keys, values)
    layer.commit()
    return layer


class ShapesEncoder(Encoder):
    """An encoder for meta tensors: it takes room for tiles and for what is learned, and writes nothing."""

    def fit(self, tiles: Sides, weight: torch.Tensor, length: int) -> None:
        self.states = self.quantizers.map(_empty_state, tiles)
        self.fitted, self.energy, self.count = True, None, None

    def encode(self, tiles: Sides, weight: torch.Tensor, stores: Sides) -> None:
        for store, x in zip(stores, tiles, strict=True):
            store.extend(x.shape[2])


def _empty_state(quantizer: Quantizer, tiles: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arrays in the shapes of what a quantizer learns from tiles [B, H, N, T, D]; one head shows the shapes."""
    learned = quantizer.fit(torch.zeros(1, 1, 1, *tiles.shape[3:]), torch.ones(1, 1, tiles.shape[3]), None)
    return {name: tiles.new_empty((*tiles.shape[:2], *x.shape[2:]), dtype=x.dtype) for name, x in learned.items()}


def _fill_raw(layer: Any, keys: torch.Tensor, values: torch.Tensor, last: int) -> None:
    """Put the same prompt into a layer of transformers; the newest `last` tokens come in a call of their own."""
    if hasattr(layer, "max_cache_len"):
        layer.lazy_initialization(keys, values)
        return
    first = keys.shape[2] - last
    for part in (slice(0, first), slice(first, None)):
        if keys[:, :, part].shape[2]:
            layer.update(keys[:, :, part], values[:, :, part])


def _token_nbytes(layer: Any) -> float:
    sides = zip(layer.quantizers, layer.head_dims, strict=True)
    bits = sum(dim * quantizer.bits_per_channel(dim, layer.preset.tile, layer.dtype) for quantizer, dim in sides)
    return layer.num_heads * bits / 8


def _released_nbytes(cache: Any) -> int:
    """The bytes that growing sliding-window layers free with the next token. Stores that token."""
    released = 0
    for layer in cache.layers:
        if getattr(layer, "is_sliding", False) and not hasattr(layer, "max_cache_len"):
            before = raw_nbytes([layer])
            layer.update(*(x[:, :, :1] for x in (layer.keys, layer.values)))
            released += max(before - raw_nbytes([layer]), 0)
    return released
