"""Random keys, values and queries with the traits of a real model's, and caches filled with them."""

from __future__ import annotations

import torch

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import CachePreset

SCORE_STD = 2.0
"""Standard deviation of the scores q.k / sqrt(D), without what all keys share."""
OUTLIERS = 1 / 32
"""Share of key channels that are eight times as large as the rest."""


class Source:
    """An endless stream of tokens of one layer: channels of unequal scale, a few outliers, a mean that all keys share.

    Streams with the same arguments give the same numbers, if drawn in pieces of the same sizes (`chunks`); queries are
    a stream of their own.

    Args:
        batch, heads, group, dim: sequences, KV heads, query heads a KV head, channels.
    """

    def __init__(
        self, batch: int, heads: int, group: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.batch, self.heads, self.group, self.dim, self.dtype, self.device = batch, heads, group, dim, dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._query_generator = torch.Generator(device).manual_seed(seed + 2**32)
        keys = self._normal(heads, 1, dim).mul(0.5).exp()
        outliers = max(1, round(dim * OUTLIERS))
        keys.scatter_(-1, self._normal(heads, 1, dim).topk(outliers, dim=-1).indices, 8.0)
        self._key_scale = keys / keys.square().mean(-1, keepdim=True).sqrt()
        self._key_mean = 2.0 * self._key_scale * self._normal(heads, 1, dim)
        queries = self._normal(heads, 1, dim).mul(0.5).exp()
        self._query_scale = queries * SCORE_STD / (queries * self._key_scale).square().mean(-1, keepdim=True).sqrt()
        self._value_scale = self._normal(heads, 1, dim).mul(0.25).exp()

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def keys_and_values(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, tokens, D] each."""
        shape = (self.batch, self.heads, tokens, self.dim)
        options = {"generator": self._generator, "device": self.device, "dtype": self.dtype}
        keys = torch.randn(shape, **options).mul_(self._key_scale.to(self.dtype)).add_(self._key_mean.to(self.dtype))
        return keys, torch.randn(shape, **options).mul_(self._value_scale.to(self.dtype))

    def queries(self, tokens: int) -> torch.Tensor:
        """[B, H * group, tokens, D]."""
        scale = self._query_scale.repeat_interleave(self.group, dim=0).to(self.dtype)
        shape = (self.batch, self.heads * self.group, tokens, self.dim)
        options = {"generator": self._query_generator, "device": self.device, "dtype": self.dtype}
        return torch.randn(shape, **options).mul_(scale)


def chunks(batch: int, tokens: int, most: int = 65536) -> list[int]:
    """Sizes of the pieces in which `tokens` tokens of `batch` sequences are made."""
    piece = max(most // batch // 128 * 128, 128)
    return [min(piece, tokens - start) for start in range(0, tokens, piece)]


def packed_layer(preset: CachePreset, source: Source, tokens: int) -> TurboQuantLayer:
    """A cache layer that holds `tokens` tokens of `source`, encoded by the preset's own quantizers.

    Raises:
        ValueError: `tokens` are too few for this preset to pack anything.
    """
    if tokens < preset.first_encode:
        raise ValueError(f"tokens={tokens} is not supported with {preset.name}; allowed: from {preset.first_encode}")
    layer = TurboQuantLayer(preset, preset.keys, preset.values, returns_handles=lambda: True)
    for count in chunks(source.batch, tokens):
        layer.update(*source.keys_and_values(count))
        layer.observe(source.queries(count))
        layer.commit()
    return layer


def tile_nbytes(layer: TurboQuantLayer) -> int:
    """Bytes that one decode step must read of a layer: tiles, sinks and tail."""
    return sum(part.nbytes for part in (*layer.tiles, layer.tail, layer.sinks))
