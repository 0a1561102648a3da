"""Levels that are sums, so that a kernel finds each of 32 or 64 levels by look-ups in tables of 8 bytes.

A trellis of 4 bits has 8 segments of 4 levels, one for each subset (`primitives.trellis`); one of 5 bits has 16. Level
4 p + s is

    first[p] + second[whether p is an outer segment][s]

Outer segments, one or two at each end, have offsets of their own, because levels lie far apart there. Levels are
antisymmetric, so the offsets of a segment are 0, x, y, x + y. Eight numbers make all 32 levels, and twelve all 64.

With 4 bits, `first` is a table of 8 bytes. With 5 bits, it has 16 bytes in two tables of 8. They all have their top bit
set: a look-up in the wrong table gives 255, and the two results are ANDed. `second` is a table of 8 bytes. Other
segments could share offsets instead; docs/notebook.md has what was tried, and what sums cost.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

SUBSETS = 4
SUM_BITS = (4, 5)
"""Widths whose levels are sums."""
SUM_ROUNDS = 25
"""Rounds at the end of `training.train` in which levels are sums. With sums from the start, error is 1 % larger."""


def _is_outer(segment: int, segments: int) -> bool:
    """Whether a segment of the positive half, of `segments`, is an outer one."""
    return segment >= segments - segments // 4


def _rows(segments: int) -> Tensor:
    """Row i: which of the numbers add up to level i of the positive half, which has `segments` segments.

    The numbers are the starts of the segments, then x and y of the inner ones, then x and y of the outer ones.
    """
    rows = torch.zeros(segments, SUBSETS, segments + 4, dtype=torch.float64)
    for segment in range(segments):
        at = segments + 2 * _is_outer(segment, segments)
        rows[segment, :, segment] = 1
        rows[segment, :, at : at + 2] = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    return rows.flatten(0, 1)


_ROWS = {2 ** (bits - 2): _rows(2 ** (bits - 2)) for bits in SUM_BITS}
_APART = 0.003
"""How far apart fitted levels stay, at least."""


def addends(steps: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`first` of the 8 or 16 segments, and `second` of inner and outer ones (2 x 4). None if steps are not sums."""
    segments = len(steps) // SUBSETS
    if segments // 2 not in _ROWS:
        return None
    first, middle = steps[::SUBSETS], segments // 2
    inner, outer = (tuple(steps[at + s] - steps[at] for s in range(SUBSETS)) for at in (len(steps) // 2, -SUBSETS))
    both = [outer if _is_outer(max(p, segments - 1 - p) - middle, middle) else inner for p in range(segments)]
    sums = (start + offset for start, offsets in zip(first, both, strict=True) for offset in offsets)
    return (first, inner + outer) if tuple(sums) == tuple(steps) else None


def nearest_sums(upper: Tensor, mass: Tensor) -> Tensor:
    """The sums nearest to `upper`, the levels above zero: least squares with weights `mass`, then kept in order."""
    segments = len(upper) // SUBSETS
    rows, weight = _ROWS[segments], mass.double().clamp(min=1).sqrt()[:, None]
    numbers = torch.linalg.lstsq(rows * weight, upper.double()[:, None] * weight).solution[:, 0]
    numbers[0] = numbers[0].clamp(min=_APART)
    for segment in range(1, segments):
        at = segments + 2 * _is_outer(segment - 1, segments)
        numbers[segment] = numbers[segment].clamp(min=numbers[segment - 1] + numbers[at : at + 2].sum() + _APART)
    return (rows @ numbers).float()


def sums_on_grid(upper: Tensor, mass: Tensor, count: int) -> tuple[Tensor, float]:
    """The sums nearest to `upper` that are odd multiples of unit / 2, below `count` units, and the unit.

    Units are tried for which the largest level uses between 5/8 and all of the grid, and with each unit offsets rounded
    either way. Errors have weights `mass`.
    """
    weight, wanted, best = mass.double().clamp(min=1), upper.double(), (torch.inf, upper, 1.0)
    segments = len(upper) // SUBSETS
    rows = _ROWS[segments]
    for quarters in range(4 * count * 5 // 8, 4 * count):
        aim = wanted * (quarters / 4 / wanted[-1]) - 0.5
        root = weight.sqrt()[:, None]
        fit = torch.linalg.lstsq(rows * root, aim[:, None] * root).solution[:, 0]
        for up in itertools.product((0, 1), repeat=4):
            offsets = fit[segments:].floor() + torch.tensor(up)
            rest = (aim - rows[:, segments:] @ offsets) * weight
            starts = (rest.view(-1, SUBSETS).sum(dim=1) / weight.view(-1, SUBSETS).sum(dim=1)).round().clamp(min=0)
            steps = rows @ torch.cat([starts, offsets])
            if steps[-1] < count and bool((steps[1:] > steps[:-1]).all()):
                middle = steps + 0.5
                unit = float((weight * wanted * middle).sum() / (weight * middle.square()).sum())
                error = float((weight * (wanted - middle * unit).square()).sum())
                best = min(best, (error, middle * unit, unit), key=lambda found: found[0])
    return best[1], best[2]
