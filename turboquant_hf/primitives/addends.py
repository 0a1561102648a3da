"""Levels that are sums of two bytes. A kernel finds each of 32 levels by two look-ups, in tables of 8 bytes.

A trellis of 4 bits has 8 segments of 4 levels, one for each subset (`primitives.trellis`). Level 4 p + s is

    first[p] + second[p in (0, 7)][s]

The outermost segments have offsets of their own, because levels lie far apart there. Levels are antisymmetric, so the
offsets of a segment are 0, x, y, x + y, and eight numbers make all 32 levels. Other segments could share offsets
instead. This choice has the least squared error that tables of 8 bytes allow: 4 to 6 % above that of free levels
(docs/notebook.md).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

SEGMENTS, SUBSETS, LEVELS = 8, 4, 32
SUM_ROUNDS = 25
"""Rounds at the end of `training.train` in which levels are sums. With sums from the start, error is 1 % larger."""


def _rows() -> Tensor:
    """Row i: which of the eight numbers add up to level 16 + i.

    They are the starts of the upper segments, then x and y of the inner ones, then x and y of the outermost.
    """
    rows = torch.zeros(4, SUBSETS, 8, dtype=torch.float64)
    for segment in range(4):
        at = 6 if segment == 3 else 4
        rows[segment, :, segment] = 1
        rows[segment, :, at : at + 2] = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    return rows.flatten(0, 1)


_ROWS = _rows()
_APART = 0.01
"""How far apart fitted levels stay, at least."""


def addends(steps: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`first` of the 8 segments, and `second` of inner and outermost ones (2 x 4). None if steps are not sums."""
    if len(steps) != LEVELS:
        return None
    first = steps[::SUBSETS]
    inner, outer = (tuple(steps[at + s] - steps[at] for s in range(SUBSETS)) for at in (LEVELS // 2, LEVELS - SUBSETS))
    sums = (start + (outer if p in (0, SEGMENTS - 1) else inner)[s] for p, start in enumerate(first) for s in range(4))
    return (first, inner + outer) if tuple(sums) == tuple(steps) else None


def nearest_sums(upper: Tensor, mass: Tensor) -> Tensor:
    """The sums nearest to `upper`, the 16 levels above zero: least squares with weights `mass`, then kept in order."""
    weight = mass.double().clamp(min=1).sqrt()[:, None]
    numbers = torch.linalg.lstsq(_ROWS * weight, upper.double()[:, None] * weight).solution[:, 0]
    numbers[0] = numbers[0].clamp(min=_APART)
    for segment in range(1, 4):
        numbers[segment] = numbers[segment].clamp(min=numbers[segment - 1] + numbers[4:6].sum() + _APART)
    return (_ROWS @ numbers).float()


def sums_on_grid(upper: Tensor, mass: Tensor, count: int) -> tuple[Tensor, float]:
    """The sums nearest to `upper` that are odd multiples of unit / 2, below `count` units, and the unit.

    Units are tried for which the largest level uses between 5/8 and all of the grid, and with each unit offsets rounded
    either way. Errors have weights `mass`.
    """
    weight, wanted, best = mass.double().clamp(min=1), upper.double(), (torch.inf, upper, 1.0)
    for quarters in range(4 * count * 5 // 8, 4 * count):
        aim = wanted * (quarters / 4 / wanted[-1]) - 0.5
        root = weight.sqrt()[:, None]
        fit = torch.linalg.lstsq(_ROWS * root, aim[:, None] * root).solution[:, 0]
        for up in itertools.product((0, 1), repeat=4):
            offsets = fit[4:].floor() + torch.tensor(up)
            rest = (aim - _ROWS[:, 4:] @ offsets) * weight
            starts = (rest.view(4, SUBSETS).sum(dim=1) / weight.view(4, SUBSETS).sum(dim=1)).round().clamp(min=0)
            steps = _ROWS @ torch.cat([starts, offsets])
            if steps[-1] < count and bool((steps[1:] > steps[:-1]).all()):
                middle = steps + 0.5
                unit = float((weight * wanted * middle).sum() / (weight * middle.square()).sum())
                error = float((weight * (wanted - middle * unit).square()).sum())
                best = min(best, (error, middle * unit, unit), key=lambda found: found[0])
    return best[1], best[2]
