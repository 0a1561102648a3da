"""Scalar codebooks for rotated coordinates, and their exact error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .density import Density, coordinate_density, lloyd_max_levels, mean_squared_error

# QLoRA's table (arXiv 2305.14314, appendix E): quantiles of the normal, scaled to [-1, 1], with an exact
# zero.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Codebook:
    """Levels that single numbers are rounded to.

    Args:
        levels: 2**bits increasing numbers, bits from 1 to 8.
        name: for messages and tables.

    Attributes:
        thresholds: the 2**bits - 1 midpoints between neighbouring levels.

    Raises: ValueError where the levels are not increasing or their count is not 2, 4, ... 256.
    """

    levels: tuple[float, ...]
    name: str
    thresholds: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.levels) not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"levels has {len(self.levels)} entries: must be a power of two from 2 to 256")
        if not all(low < high for low, high in pairwise(self.levels)):
            raise ValueError(f"levels={self.levels}: must be increasing")
        thresholds = tuple((low + high) / 2 for low, high in pairwise(self.levels))
        object.__setattr__(self, "thresholds", thresholds)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return len(self.levels).bit_length() - 1

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest levels, ties to the lower: uint8 of the shape of x (any dtype, any shape)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        thresholds = _constant(self.thresholds, x.device, x.dtype)
        return torch.bucketize(x, thresholds, out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels of the codes: `dtype`, the shape of codes (integers below 2**bits)."""
        return self.tensor(codes.device, dtype)[codes.int()]

    def tensor(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels as a tensor [2**bits], shared by all callers: do not write to it."""
        return _constant(self.levels, torch.empty(0, device=device).device, dtype)


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # a tensor made inside inference mode could never take part in autograd later
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=512)
@torch.inference_mode(False)
def lloyd_max(bits: int, dim: int | None = None) -> Codebook:
    """Codebook of least squared error for a coordinate of a random point of the sphere, scaled to variance 1.

    TurboQuant's codebook (arXiv 2504.19874, section 3.1) for f(x) ~ (1 - x^2 / dim)^((dim - 3) / 2): rotate a
    vector, divide by norm / sqrt(dim), encode. Exact for this dim; dim=None is the Gaussian limit.

    Args:
        bits: 1..8.
        dim: 2..1024, the size of what is rotated together (a channel group, not the head), or None.

    Raises: ValueError outside these ranges.
    """
    density = _density(dim)
    _check_bits(bits)
    return Codebook(tuple(lloyd_max_levels(density, bits).tolist()), f"lloyd_max(bits={bits}, dim={dim})")


@lru_cache(maxsize=512)
@torch.inference_mode(False)
def uniform(bits: int, dim: int | None = None) -> Codebook:
    """Mid-rise codebook (i - (2**bits - 1) / 2) * step of least squared error for `lloyd_max`'s density.

    Args and errors: as in `lloyd_max`.
    """
    density = _density(dim)
    _check_bits(bits)
    grid = torch.arange(2**bits, dtype=torch.float64, device="cpu") - (2**bits - 1) / 2
    # At dim=2 the error has a local minimum for every pair of levels that meets the poles: scan, then refine.
    pitch = 16 / 2**bits / 64
    best = min(range(1, 65), key=lambda i: mean_squared_error(density, grid * (i * pitch)))
    low, high = (best - 1) * pitch, (best + 1) * pitch
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(50):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if mean_squared_error(density, grid * left) < mean_squared_error(density, grid * right):
            high = right
        else:
            low = left
    return Codebook(tuple((grid * (low + high) / 2).tolist()), f"uniform(bits={bits}, dim={dim})")


def nf4() -> Codebook:
    """QLoRA's 4-bit NormalFloat, -1 to 1 (arXiv 2305.14314): for blocks divided by their absolute maximum."""
    return Codebook(_NF4, "nf4")


def distortion(codebook: Codebook, dim: int | None = None) -> float:
    """E[(x - decode(encode(x)))^2], exact, for x of variance 1 with the density of `lloyd_max`.

    Since the variance is 1 this is the relative error of a vector on the sphere.
    """
    return mean_squared_error(_density(dim), torch.tensor(codebook.levels, dtype=torch.float64, device="cpu"))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _density(dim: int | None) -> Density:
    return coordinate_density(dim)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be from 1 to 8")
