"""Scalar codebooks for rotated coordinates, and their exact error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .density import Density, coordinate_density, lloyd_max_levels, mean_squared_error
from .memo import once

# QLoRA's table (arXiv 2305.14314, appendix E): normal quantiles, scaled to [-1, 1], with an exact 0.
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
        coefficients: (a, b, ...) where the levels are the odd polynomial a x + b x^3 + ... of x = 2 code + 1 -
            2**bits. A kernel then computes them instead of looking them up. Empty for all other levels.
        unit: where it is not 0, the levels are odd multiples of unit / 2, at most 128 of them on either side of zero.
            A kernel may then multiply them as bytes in the integer matrix units.

    Attributes:
        thresholds: the 2**bits - 1 midpoints between neighbouring levels.

    Raises: ValueError where the levels are not increasing or their count is not 2, 4, ... 256.
    """

    levels: tuple[float, ...]
    name: str
    coefficients: tuple[float, ...] = ()
    unit: float = 0.0
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

    @property
    def steps(self) -> tuple[int, ...]:
        """The whole numbers k with level = (k + 1/2) * unit; empty without a unit."""
        return tuple(round(level / self.unit - 0.5) for level in self.levels) if self.unit else ()

    def encode(self, x: Tensor) -> Tensor:
        """Codes of the nearest levels, uint8 of the shape of x (any dtype and shape). A tie goes to the lower level."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        thresholds = constant(self.thresholds, x.device, x.dtype)
        return torch.bucketize(x, thresholds, out_int32=True).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels of the codes: `dtype`, the shape of codes (integers below 2**bits)."""
        return self.tensor(codes.device, dtype)[codes.int()]

    def tensor(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels as a tensor [2**bits], shared by all callers: do not write to it."""
        return constant(self.levels, torch.empty(0, device=device).device, dtype)


@once(maxsize=512)
@torch.inference_mode(False)  # a tensor that is made in inference mode can never take part in autograd later
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@once(maxsize=512)
@torch.inference_mode(False)
def lloyd_max(bits: int, dim: int | None = None) -> Codebook:
    """Codebook of least squared error for a coordinate of a random point on the sphere, scaled to variance 1.

    TurboQuant's codebook (arXiv 2504.19874, section 3.1) for the density f(x) ~ (1 - x^2 / dim)^((dim - 3) / 2). To use
    it, rotate a vector, divide it by norm / sqrt(dim), and encode. It is exact for this dim; dim=None is the Gaussian
    limit.

    Args:
        bits: 1..8.
        dim: 2..1024, the number of channels that are rotated together (a group, not the head), or None.

    Raises: ValueError outside these ranges.
    """
    density = _density(dim)
    _check_bits(bits)
    return Codebook(tuple(lloyd_max_levels(density, bits).tolist()), f"lloyd_max(bits={bits}, dim={dim})")


@once(maxsize=512)
@torch.inference_mode(False)
def uniform(bits: int, dim: int | None = None) -> Codebook:
    """Mid-rise codebook (i - (2**bits - 1) / 2) * step of least squared error for `lloyd_max`'s density.

    Args and errors: as in `lloyd_max`.
    """
    density = _density(dim)
    _check_bits(bits)
    grid = torch.arange(2**bits, dtype=torch.float64, device="cpu") - (2**bits - 1) / 2
    # At dim=2 the error has a local minimum for every pair of levels that meets the poles. So scan first, then refine.
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
    step = (low + high) / 2
    return Codebook(tuple((grid * step).tolist()), f"uniform(bits={bits}, dim={dim})", (step / 2,), unit=step)


@once(maxsize=512)
@torch.inference_mode(False)
def polynomial(bits: int, dim: int | None = None) -> Codebook:
    """The best codebook for `lloyd_max`'s density whose levels are an odd polynomial of the centred code.

    The degree is 3 up to 4 bits, and 5 above. Three or four multiply-adds decode two codes at a time, without a table.
    Compared with Lloyd-Max, the error is the same at 1 and 2 bits, 0.2 % larger at 3, 2 % at 4 and 1 % at 5. The levels
    come from Lloyd's iteration, with the centroids replaced by their weighted least-squares fit.

    Args and errors: as in `lloyd_max`.
    """
    density = _density(dim)
    _check_bits(bits)
    half = 2 ** (bits - 1)
    x = 2 * torch.arange(half, dtype=torch.float64, device="cpu") + 1
    terms = min(half, 2 if bits <= 4 else 3)
    powers = torch.stack([(x / (2 * half)) ** (2 * i + 1) for i in range(terms)], dim=1)
    levels = lloyd_max_levels(density, bits)[half:]
    for _ in range(4000):
        edges = torch.nn.functional.pad((levels[:-1] + levels[1:]) / 2, (1, 1))
        edges[-1] = math.inf
        mass, first = (tail[:-1] - tail[1:] for tail in density.tails(edges))
        root = mass.sqrt()[:, None]
        fit = torch.linalg.lstsq(powers * root, (first / mass)[:, None] * root).solution[:, 0]
        moved, levels = levels, powers @ fit
        if float((levels - moved).abs().max()) < 1e-10:
            break
    coefficients = tuple(float(c) / (2 * half) ** (2 * i + 1) for i, c in enumerate(fit))
    both = torch.cat([-levels.flip(0), levels])
    return Codebook(tuple(both.tolist()), f"polynomial(bits={bits}, dim={dim})", coefficients)


GRID_STEPS = 64
"""Levels on one side of zero of the finest grid. With its sign a level has 7 bits, so it fits into a byte."""


@once(maxsize=512)
@torch.inference_mode(False)
def grid(bits: int, dim: int | None = None) -> Codebook:
    """`lloyd_max` on a grid: levels are odd multiples of half a unit, at most 64 on either side of zero.

    A kernel holds such levels as bytes and multiplies them in the integer matrix units, without a conversion. Compared
    with Lloyd-Max, the error is up to 1 % larger at 4 bits and 4 % at 5. From 7 bits on, `grid` is `uniform`. Units are
    tried with which the largest level uses between 3/4 and all of the grid. For each, Lloyd's iteration runs with
    rounded centroids, and the best unit is kept.

    Args and errors: as in `lloyd_max`.
    """
    if bits >= 7:
        return uniform(bits, dim)
    density = _density(dim)
    _check_bits(bits)
    half = 2 ** (bits - 1)
    levels = lloyd_max_levels(density, bits)[half:]
    best = (math.inf, levels, 1.0)
    for top in range(max(half, 3 * GRID_STEPS // 4), GRID_STEPS + 1):
        unit = float(levels[-1]) / (top - 0.5)
        steps = (levels / unit - 0.5).round()
        for _ in range(8):
            edges = torch.nn.functional.pad((steps[:-1] + steps[1:] + 1) * unit / 2, (1, 1))
            edges[-1] = math.inf
            mass, first = (tail[:-1] - tail[1:] for tail in density.tails(edges))
            centre = first / mass
            unit = float((mass * centre * (steps + 0.5)).sum() / (mass * (steps + 0.5).square()).sum())
            steps = (centre / unit - 0.5).round().clamp(0, GRID_STEPS - 1)
        chosen = (steps + 0.5) * unit
        if bool((steps[1:] > steps[:-1]).all()):
            error = mean_squared_error(density, torch.cat([-chosen.flip(0), chosen]))
            if error < best[0]:
                best = (error, chosen, unit)
    _, chosen, unit = best
    return Codebook(tuple(torch.cat([-chosen.flip(0), chosen]).tolist()), f"grid(bits={bits}, dim={dim})", unit=unit)


def nf4() -> Codebook:
    """QLoRA's 4-bit NormalFloat from -1 to 1 (arXiv 2305.14314), for blocks divided by their absolute maximum."""
    return Codebook(_NF4, "nf4")


def distortion(codebook: Codebook, dim: int | None = None) -> float:
    """E[(x - decode(encode(x)))^2], exact, for x of variance 1 with the density of `lloyd_max`.

    The variance is 1, so this is the relative error of a vector on the sphere.
    """
    return mean_squared_error(_density(dim), torch.tensor(codebook.levels, dtype=torch.float64, device="cpu"))


@once(maxsize=64)
@torch.inference_mode(False)
def _density(dim: int | None) -> Density:
    return coordinate_density(dim)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be from 1 to 8")
