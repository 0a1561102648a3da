"""Random keys, values and queries that resemble those of a real model, and layers filled with them."""

from __future__ import annotations

import torch

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import CachePreset

SCORE_STD = 2.0
"""Standard deviation of the scores q.k / sqrt(D), without the mean that all keys share."""
OUTLIERS = 1 / 32
"""Share of the key channels that are eight times as large as the others."""


class Source:
    """An endless stream of tokens of one layer: channels of unequal scale, a few outliers, a mean that all keys share.

    Streams with equal arguments give equal numbers if they are drawn in pieces of equal sizes (`chunks`). Queries are a
    separate stream.

    Args:
        batch, heads, group, dim: sequences, KV heads, query heads per KV head, channels per head.
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
        """The next keys and values, [B, H, tokens, D] each."""
        shape = (self.batch, self.heads, tokens, self.dim)
        options = {"generator": self._generator, "device": self.device, "dtype": self.dtype}
        keys = torch.randn(shape, **options).mul_(self._key_scale.to(self.dtype)).add_(self._key_mean.to(self.dtype))
        return keys, torch.randn(shape, **options).mul_(self._value_scale.to(self.dtype))

    def queries(self, tokens: int) -> torch.Tensor:
        """The next queries, [B, H * group, tokens, D]."""
        scale = self._query_scale.repeat_interleave(self.group, dim=0).to(self.dtype)
        shape = (self.batch, self.heads * self.group, tokens, self.dim)
        options = {"generator": self._query_generator, "device": self.device, "dtype": self.dtype}
        return torch.randn(shape, **options).mul_(scale)


def chunks(batch: int, tokens: int, most: int = 65536) -> list[int]:
    """The sizes of the pieces in which `tokens` tokens of `batch` sequences are drawn."""
    piece = max(most // batch // 128 * 128, 128)
    return [min(piece, tokens - start) for start in range(0, tokens, piece)]


def packed_layer(preset: CachePreset, source: Source, tokens: int) -> TurboQuantLayer:
    """A cache layer that holds `tokens` tokens of `source`, encoded by the preset's own quantizers.

    Raises:
        ValueError: there are too few tokens for this preset to pack any.
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
