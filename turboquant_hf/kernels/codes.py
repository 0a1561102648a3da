"""How a vector of `head_dim` channels is cut into coded groups, and what a tile of them takes.

These are the only descriptions that kernels share with their callers; kernels never see a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_hf.primitives import Codebook, packed_size

SCALE_RULES = ("norm", "norm-corrected", "mse", "unbiased")


@dataclass(frozen=True)
class CodeGroup:
    """`size` consecutive rotated channels that share one codebook.

    A decoded channel is gain * codebook level * the token's scale.
    """

    size: int
    codebook: Codebook
    gain: float = 1.0

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


def store_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored, fp16; what does not fit saturates."""
    return scale.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
