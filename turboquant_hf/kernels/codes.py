"""How a vector of `head_dim` channels is cut into coded groups, and how scales become bytes.

These are the only descriptions that kernels share with their callers; kernels never see a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_hf.primitives import Codebook, packed_size

SCALE_RULES = ("norm", "norm-corrected", "mse", "unbiased")
SCALE_FORMATS = {"fp16": torch.float16, "e4m4": torch.uint8}

# An e4m4 byte, shifted left by six, is the bit pattern of a half in [0, 2); 64 moves the range to [0, 128).
_E4M4_SHIFT, _E4M4_UNIT = 6, 64.0


@dataclass(frozen=True)
class CodeGroup:
    """`size` consecutive rotated channels that share one codebook and one scale per token."""

    size: int
    codebook: Codebook

    @property
    def bits(self) -> int:
        return self.codebook.bits


def tile_bytes(groups: tuple[CodeGroup, ...], tile: int, channel_major: bool) -> int:
    """Bytes of the codes of one tile of `tile` tokens.

    Token-major: `tile` rows, each the packed groups of one token side by side. Channel-major: group after group,
    each `size` rows that hold one channel's `tile` codes. `primitives.packing` describes a row.
    """
    if channel_major:
        return sum(group.size * packed_size(tile, group.bits) for group in groups)
    return tile * sum(packed_size(group.size, group.bits) for group in groups)


def store_scale(scale: torch.Tensor, scale_format: str) -> torch.Tensor:
    """Round non-negative float32 scales to their stored form (`fp16`, or `e4m4`: 4 exponent and 4 mantissa bits).

    `e4m4` covers [2**-12, 126] with a relative error of at most 2**-5 above 2**-8; larger scales saturate. NaN
    has no e4m4 pattern and saturates too, so the `fp16` format is the one for unchecked input.
    """
    if scale_format == "fp16":
        return scale.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    bits = (scale / _E4M4_UNIT).clamp(0.0, 1.96875).to(torch.float16).view(torch.int16).to(torch.int32)
    return ((bits + (1 << (_E4M4_SHIFT - 1))) >> _E4M4_SHIFT).clamp(max=255).to(torch.uint8)


def load_scale(stored: torch.Tensor) -> torch.Tensor:
    """The float32 scales behind `store_scale`'s result; the dtype tells the format."""
    if stored.dtype == torch.uint8:
        return (stored.to(torch.int16) << _E4M4_SHIFT).view(torch.float16).float() * _E4M4_UNIT
    return stored.float()
