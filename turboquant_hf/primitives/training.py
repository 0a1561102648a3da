"""How the levels of `trellis_code` were found: Lloyd's iteration on words of random points of the sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from .addends import SUM_BITS, SUM_ROUNDS, nearest_sums, sums_on_grid
from .codebook import GRID_STEPS, lloyd_max
from .trellis import Trellis


def sphere_words(dim: int | None, count: int, seed: int, word: int = 32) -> Tensor:
    """Words [count, word] of coordinates of random points of the sphere, as `trellis_code` expects them, well mixed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(-(-count * word // (dim or 1)), dim or 1, generator=generator)
    if dim is not None:
        x = x * (dim**0.5 / x.norm(dim=1, keepdim=True))
    x = x.flatten()
    return x[torch.randperm(len(x), generator=generator)[: count * word]].view(count, word)


def train(bits: int, dim: int | None = None, *, count: int = 16384, rounds: int = 150, seed: int = 0) -> Trellis:
    """Levels of least squared error on `count` words, by Lloyd's iteration: encode, then move levels to the means.

    The levels are symmetric. At the end they are rounded to the grid. Several units are tried, so that the largest
    level uses between 3/4 and all of the grid, and the one with the least error on other words is kept. Levels of 4
    and 5 bits train for `SUM_ROUNDS` more as sums, and `addends.sums_on_grid` rounds them. This takes some minutes;
    `trellis_code` has the results.
    """
    words, others = sphere_words(dim, count, seed), sphere_words(dim, count, seed + 1)
    levels = torch.tensor(lloyd_max(bits + 1).levels)[2**bits :]
    for turn in range(rounds + SUM_ROUNDS * (bits in SUM_BITS)):
        means, mass = _means(bits, levels, words)
        levels = means if turn < rounds else nearest_sums(means, mass)
    if bits in SUM_BITS:
        return _symmetric(*sums_on_grid(means, mass, GRID_STEPS))
    best = (torch.inf, levels, 1.0)
    for top in range(3 * GRID_STEPS // 4, GRID_STEPS + 1, 2):
        unit = float(levels[-1]) / (top - 0.5)
        steps = _apart(levels / unit - 0.5)
        for _ in range(8):
            means, mass = _means(bits, (steps + 0.5) * unit, words)
            unit = float((mass * means * (steps + 0.5)).sum() / (mass * (steps + 0.5).square()).sum())
            steps = _apart(means / unit - 0.5).clamp(max=GRID_STEPS - 1)
        if bool((steps[1:] > steps[:-1]).all()):
            code = _symmetric((steps + 0.5) * unit, unit)
            error = float((code.decode(code.encode(others)) - others).square().mean())
            best = min(best, (error, steps, unit), key=lambda found: found[0])
    return _symmetric((best[1] + 0.5) * best[2], best[2])


def _apart(steps: Tensor) -> Tensor:
    """Steps rounded to different whole numbers from 0 on."""
    places = torch.arange(len(steps))
    return (steps.round() - places).cummax(dim=0).values.clamp(min=0) + places


def _symmetric(upper: Tensor, unit: float = 0.0) -> Trellis:
    levels = upper.double().tolist()
    return Trellis((*(-level for level in reversed(levels)), *levels), "training", unit)


def _means(bits: int, upper: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of what each level above zero (and its mirror) stands for, and how many values that is."""
    code = _symmetric(upper)
    numbers, x = code.numbers(code.encode(words)).flatten().long(), words.flatten()
    total, mass = (torch.bincount(numbers, weights, 2 ** (bits + 1)) for weights in (x.double(), None))
    total, mass = (total - total.flip(0))[2**bits :], (mass + mass.flip(0))[2**bits :]
    return torch.where(mass > 0, total / mass.clamp(min=1), upper.double()).float(), mass.float()
