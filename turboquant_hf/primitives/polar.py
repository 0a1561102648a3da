"""PolarQuant's recursive polar transform (arXiv 2502.02617, definition 1) and the codebooks of its angles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .codebook import Codebook
from .density import lloyd_max_levels, polar_density
from .memo import once


def to_polar(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Vectors of size 2^L as one radius and 2^L - 1 angles.

    Level 1 turns neighbouring pairs (x_0, x_1), (x_2, x_3), ... into angles atan2(x_1, x_0) and norms; every
    deeper level does the same to the norms of the level before. A zero pair has angle 0.

    Args:
        x: float [..., 2^L], L >= 1. Half precision is computed in float32.

    Returns: the norm of x [...], and one tensor of angles (radians) per level: [..., 2^(L-1)] in [0, 2 pi) at
        level 1, [..., 2^(L-l)] in [0, pi/2] at level l > 1.
    Raises: ValueError where the last dimension is not a power of two of at least 2.
    """
    size = x.shape[-1] if x.ndim else 0
    if size < 2 or size & (size - 1):
        raise ValueError(f"x.shape[-1]={size}: must be a power of two of at least 2")
    radius = x.to(torch.promote_types(x.dtype, torch.float32))
    angles = []
    while radius.shape[-1] > 1:
        first, second = radius[..., 0::2], radius[..., 1::2]
        angles.append(torch.atan2(second, first))
        radius = torch.hypot(first, second)
    angles[0] = _wrap(angles[0])
    return radius[..., 0], angles


def from_polar(radius: Tensor, angles: list[Tensor]) -> Tensor:
    """Inverse of `to_polar`: radius [...] and angles, level 1 first, to float [..., 2^L]. Exact to rounding.

    Raises: ValueError where there are no angles or their shapes do not halve from level to level.
    """
    if not angles:
        raise ValueError("angles=[]: must hold at least one level")
    out = radius[..., None]
    for angle in reversed(angles):
        if angle.shape != out.shape:
            raise ValueError(f"angles: a level has shape {tuple(angle.shape)}: must be {tuple(out.shape)}")
        out = torch.stack([out * angle.cos(), out * angle.sin()], dim=-1).flatten(-2)
    return out


@dataclass(frozen=True)
class CircularCodebook(Codebook):
    """Codebook of angles in [0, 2 pi). `encode` takes any angle (radians) and measures distances around the circle.

    The levels must be placed so that 0 lies midway between the last and the first.
    """

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(_wrap(x.to(torch.promote_types(x.dtype, torch.float32))))


@once(maxsize=64)
@torch.inference_mode(False)
def polar_codebook(level: int, bits: int) -> Codebook:
    """Codebook of least squared error for one level's angles of a Gaussian vector (arXiv 2502.02617).

    Level 1 is uniform on the circle: equal cells, codes that wrap. At level l > 1 the angle has density
    f(t) ~ sin(2 t)^(m - 1) on [0, pi/2], m = 2^(l - 1): Lloyd-Max levels, symmetric about pi / 4.

    Args:
        level: 1..10.
        bits: 1..8.

    Raises: ValueError outside these ranges.
    """
    if not 1 <= level <= 10:
        raise ValueError(f"level={level}: must be from 1 to 10")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be from 1 to 8")
    name = f"polar(level={level}, bits={bits})"
    if level == 1:
        return CircularCodebook(tuple(2 * math.pi * (i + 0.5) / 2**bits for i in range(2**bits)), name)
    centred = lloyd_max_levels(polar_density(2 ** (level - 1)), bits)
    return Codebook(tuple((centred + math.pi / 4).tolist()), name)


def _wrap(angle: Tensor) -> Tensor:
    """Angles in [0, 2 pi). The remainder of a small negative angle rounds up to 2 pi itself, which becomes 0."""
    angle = angle.remainder(2 * math.pi)
    return torch.where(angle < 2 * math.pi, angle, 0.0)
