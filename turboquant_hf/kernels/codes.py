"""How a vector of `head_dim` channels is cut into coded groups, and what a tile of them takes.

These are the only descriptions that kernels share with their callers; kernels never see a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_hf.primitives import Codebook, packed_size

SCALE_RULES = ("norm", "norm-corrected", "mse", "unbiased")
SCALE_FORMATS = {"fp16": (0, 1.0), "e4m4": (6, 64.0), "e3m5": (5, 2.0**11)}
"""name -> (left shift that makes a stored byte the pattern of a half, factor on that half)."""


@dataclass(frozen=True)
class CodeGroup:
    """`size` consecutive rotated channels that share one codebook and one scale per token."""

    size: int
    codebook: Codebook

    @property
    def bits(self) -> int:
        return self.codebook.bits


@dataclass(frozen=True, eq=False)
class TileCoding:
    """How the tiles of keys or of values are coded: y = transform @ (balance * (v - mean))[order] for a vector v.

    Attributes:
        transform: [D, D] or [B or 1, H, D, D]. One for all sequences is taken for a constant: kernels keep what they
            make of it.
        groups: how y is cut; sizes add up to D.
        scale_rule: "norm" |y| / sqrt(size), "norm-corrected" |y| / |c|, "mse" <y, c> / <c, c>, or "unbiased"
            |y|^2 / <y, c> (EDEN, RaBitQ), for the codebook vector c of a group.
        scale_format: see `store_scale`.
        channel_major: see `tile_bytes`.
        center: whether the mean is that of a tile's tokens, and is stored.
        gain: float32 [B, H], what scales are divided by before they are stored; None for ones.
        order: int16 [B, H, D], a permutation of the channels; None for the identity.
        balance: float32 [B, H, D], expected to bring the vectors near 1; None for ones.
    """

    transform: torch.Tensor
    groups: tuple[CodeGroup, ...]
    scale_rule: str = "norm"
    scale_format: str = "fp16"
    channel_major: bool = False
    center: bool = False
    gain: torch.Tensor | None = None
    order: torch.Tensor | None = None
    balance: torch.Tensor | None = None


def tile_bytes(groups: tuple[CodeGroup, ...], tile: int, channel_major: bool) -> int:
    """Bytes of the codes of one tile of `tile` tokens.

    Token-major: `tile` rows, each the packed groups of one token side by side. Channel-major: group after group,
    each `size` rows that hold one channel's `tile` codes. `primitives.packing` describes a row.
    """
    if channel_major:
        return sum(group.size * packed_size(tile, group.bits) for group in groups)
    return tile * sum(packed_size(group.size, group.bits) for group in groups)


HALF_MAX = torch.finfo(torch.float16).max


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 as float16, and NaN for what does not fit: clamped, it would pass for a number."""
    return torch.where(x.abs() <= HALF_MAX, x, torch.nan).to(torch.float16)


def store_scale(scale: torch.Tensor, scale_format: str = "fp16") -> torch.Tensor:
    """Non-negative float32 scales in their stored form. In fp16, what does not fit becomes NaN (`to_half`).

    One-byte formats are the high bits of a half's pattern: "e4m4" covers [2**-12, 126] with a relative error of at
    most 1/32 above 2**-8, "e3m5" [2**-8, 15.75] with at most 1/64 above 2**-3. They expect scales near 1. They have
    no pattern for NaN: NaN, and what does not fit, saturates.
    """
    if scale_format == "fp16":
        return to_half(scale)
    shift, unit = SCALE_FORMATS[scale_format]
    bits = (scale / unit).clamp(0.0, 65504.0).to(torch.float16).view(torch.int16).to(torch.int32)
    return ((bits + (1 << (shift - 1))) >> shift).clamp(max=255).to(torch.uint8)


def load_scale(stored: torch.Tensor, scale_format: str = "fp16") -> torch.Tensor:
    """The float32 scales behind `store_scale`'s result."""
    if scale_format == "fp16":
        return stored.float()
    shift, unit = SCALE_FORMATS[scale_format]
    return (stored.to(torch.int16) << shift).view(torch.float16).float() * unit
