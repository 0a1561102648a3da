"""KIVI (arXiv 2402.02750): min-max rounding, of keys along the tokens of a channel, of values along the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.quantizers.base import Field, Packed, check_bits, check_choice
from turboquant_hf.quantizers.scaled import ScaledQuantizer
from turboquant_hf.quantizers.uniform import affine_decode, affine_encode, affine_layout, check_group

AXES = ("channel", "token")


@dataclass(frozen=True)
class KIVI(ScaledQuantizer):
    """With axis "token" equivalent to `uniform`; with axis "channel" equivalent to `uniform` of the transposed tile.

    Attributes:
        bits: width of a code, 1 to 8.
        axis: "channel" (keys: each channel over groups of tokens) or "token" (values: each token over groups
            of channels).
        group: how many tokens, or channels, share a scale and a zero point. Along the tokens it must divide
            the tile; along the channels the last group may be shorter.
    """

    name: ClassVar[str] = "kivi"
    bits: int = 4
    axis: str = "channel"
    group: int = 32

    def __post_init__(self) -> None:
        check_bits(self.name, "bits", self.bits, 1, 8)
        check_choice(self.name, "axis", self.axis, AXES)
        check_group(self.name, self.group)

    def validate(self, head_dim: int, tile: int) -> None:
        if self.axis == "channel" and tile % self.group:
            raise ValueError(f"{self.name}: group={self.group} is not supported; allowed: divisors of tile={tile}")

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        shape = (head_dim, tile) if self.axis == "channel" else (tile, head_dim)
        return affine_layout(*shape, self.bits, self.group)

    def encode_scaled(self, tiles: torch.Tensor, weight: torch.Tensor | None) -> Packed:
        if self.axis == "channel" and weight is not None:
            tiles = self._without_outsiders(tiles, weight)
        return affine_encode(self._rows(tiles), self.bits, self.group)

    def decode_scaled(self, packed: Packed, head_dim: int) -> torch.Tensor:
        # A row of tokens is never padded, because tiles are whole groups and multiples of 8.
        length = packed["scale"].shape[-1] * self.group if self.axis == "channel" else head_dim
        return self._rows(affine_decode(packed, length, self.bits, self.group))

    def _without_outsiders(self, tiles: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Replace padding and sinks, which are never read from here, by their group's mean: it stretches no range."""
        x = tiles.unflatten(-2, (-1, self.group))
        w = weight[:, None, :, :, None].float().unflatten(-2, (-1, self.group))
        mean = (x * w).sum(dim=-2, keepdim=True) / w.sum(dim=-2, keepdim=True).clamp(min=1.0)
        return torch.where(w > 0, x, mean).flatten(-3, -2)

    def _rows(self, tiles: torch.Tensor) -> torch.Tensor:
        return tiles.transpose(-1, -2) if self.axis == "channel" else tiles
