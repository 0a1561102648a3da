"""Exact integrals over symmetric densities, and the scalar quantizers that are optimal for them.

A variable x with a density symmetric about 0 is written x = value(u), where u has a density proportional to weight(u)
on [-end, end]. Everything is smooth in u, even where the density of x has poles (in dimension 2, u is uniform).
Gauss-Legendre quadrature on panels is therefore exact to rounding. All of this is float64 on the CPU, and nothing here
runs per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PANELS = 1024
NODES = 12


@dataclass(frozen=True)
class Density:
    """The density of x = value(u). `value` is odd and increasing. u has the density weight(u) / mass, an even one."""

    end: float
    weight: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # d value / du
    inverse: Callable[[Tensor], Tensor]  # of `value`; an x beyond the support gives +-end

    def tails(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """P(X > x) and E[X; X > x] for float64 x of any shape, to float64 rounding."""
        u = self.inverse(x)
        edges = _panel_edges(self.end)
        panel = (u.abs() * (PANELS / self.end)).long().clamp(max=PANELS - 1)
        mass, first = self._integrate(u.abs(), edges[panel + 1])
        # The sums run from the outside in, so that the far tail keeps its relative precision.
        beyond_mass, beyond_first, total = self._panels
        mass = (mass + beyond_mass[panel]) / total
        first = (first + beyond_first[panel]) / total
        return torch.where(u < 0, 1 - mass, mass), first

    def pdf(self, x: Tensor) -> Tensor:
        """Density of x, float64."""
        u = self.inverse(x)
        return self.weight(u) / self.slope(u) / self._panels[2]

    @cached_property
    def variance(self) -> float:
        edges = _panel_edges(self.end)
        u, weight = self._nodes(edges[:-1], edges[1:])
        return float(2 * (weight * self.value(u) ** 2).sum() / self._panels[2])

    @cached_property
    def _panels(self) -> tuple[Tensor, Tensor, float]:
        """Mass and first moment beyond each panel of u > 0, and the mass of both sides. None of them is normalised."""
        edges = _panel_edges(self.end)
        sums = [part.flip(0).cumsum(0).flip(0) for part in self._integrate(edges[:-1], edges[1:])]
        mass, first = (torch.nn.functional.pad(part[1:], (0, 1)) for part in sums)
        return mass, first, 2 * float(sums[0][0])

    def _integrate(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        u, weight = self._nodes(low, high)
        return weight.sum(-1), (weight * self.value(u)).sum(-1)

    def _nodes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        nodes, weights = _gauss_legendre()
        half = ((high - low) / 2)[..., None]
        u = low[..., None] + half * (1 + nodes)
        return u, half * weights * self.weight(u)


def coordinate_density(dim: int | None) -> Density:
    """One coordinate of a uniform point on the sphere of radius sqrt(dim) in `dim` dimensions: variance 1.

    f(x) ~ (1 - x^2 / dim)^((dim - 3) / 2) (arXiv 2504.19874, lemma 1), with x = sqrt(dim) sin u. dim=None is
    the limit, the standard normal.

    Raises: ValueError where dim is neither None nor in 2..1024.
    """
    if dim is None:
        return Density(
            end=16.0,
            weight=lambda u: torch.exp(-u * u / 2),
            value=lambda u: u,
            slope=torch.ones_like,
            inverse=lambda x: x.clamp(-16.0, 16.0),
        )
    if not 2 <= dim <= 1024:
        raise ValueError(f"dim={dim}: must be from 2 to 1024, or None for the Gaussian limit")
    root = math.sqrt(dim)
    return Density(
        end=math.pi / 2,
        weight=lambda u: u.cos() ** (dim - 2),
        value=lambda u: root * u.sin(),
        slope=lambda u: root * u.cos(),
        inverse=lambda x: (x / root).clamp(-1, 1).asin(),
    )


def polar_density(half: int) -> Density:
    """Angle of the point (norm, norm) of two Gaussian vectors of size `half` each, less pi / 4.

    f(x) ~ cos(2 x)^(half - 1) on [-pi/4, pi/4] (arXiv 2502.02617, lemma 2), with x = u / 2.
    """
    return Density(
        end=math.pi / 2,
        weight=lambda u: u.cos() ** (half - 1),
        value=lambda u: u / 2,
        slope=lambda u: torch.full_like(u, 0.5),
        inverse=lambda x: (2 * x).clamp(-math.pi / 2, math.pi / 2),
    )


def mean_squared_error(density: Density, levels: Tensor) -> float:
    """E[(X - nearest level)^2] for sorted float64 levels [N]."""
    edges = torch.nn.functional.pad((levels[:-1] + levels[1:]) / 2, (1, 1))
    edges[0], edges[-1] = -math.inf, math.inf
    mass, first = (tail[:-1] - tail[1:] for tail in density.tails(edges))
    return density.variance + float((levels * (levels * mass - 2 * first)).sum())


def lloyd_max_levels(density: Density, bits: int) -> Tensor:
    """The 2**bits levels, float64, sorted, symmetric, each the centroid of its cell (Lloyd 1982, Max 1960).

    Lloyd's iteration takes thousands of rounds at 8 bits. Newton's method on "level - centroid = 0" takes at most five
    for every density of this file, from Panter and Dite's start.
    """
    levels = _panter_dite(density, 2 ** (bits - 1))
    for _ in range(20):
        edges = torch.nn.functional.pad((levels[:-1] + levels[1:]) / 2, (1, 1))
        edges[-1] = math.inf
        mass, first = (tail[:-1] - tail[1:] for tail in density.tails(edges))
        centroids = first / mass
        step = _newton_step(density, levels, edges[1:-1], centroids, mass)
        levels = levels + step
        if float(step.abs().max()) < 1e-11:  # convergence is quadratic, so the rest is rounding
            return torch.cat([-levels.flip(0), levels])
    raise ArithmeticError(f"Newton's method for the {2**bits} levels of {density} did not converge")


def _newton_step(density: Density, levels: Tensor, inner: Tensor, centroids: Tensor, mass: Tensor) -> Tensor:
    """Newton's step for levels - centroids(levels) = 0. `inner`: the midpoints of the levels.

    When an edge of a cell moves by 1, the cell's centroid moves by pdf(edge) |edge - centroid| / mass. An edge moves by
    half of what each of its two levels moves. For a log-concave density the sum of both effects is below 1, so the
    matrix is regular.
    """
    pdf = density.pdf(inner) / 2
    upper = pdf * (inner - centroids[:-1]) / mass[:-1]
    lower = pdf * (centroids[1:] - inner) / mass[1:]
    diagonal = 1 - torch.nn.functional.pad(upper, (0, 1)) - torch.nn.functional.pad(lower, (1, 0))
    jacobian = torch.diag(diagonal) - torch.diag(upper, 1) - torch.diag(lower, -1)
    return torch.linalg.solve(jacobian, centroids - levels)


def _panter_dite(density: Density, count: int) -> Tensor:
    """`count` positive levels at the quantiles of the density's cube root."""
    u = _panel_edges(density.end)
    x = density.value(u)
    root = density.pdf(x[:-1]) ** (1 / 3)  # the last edge may be a pole
    share = torch.nn.functional.pad((root * x.diff()).cumsum(0), (1, 0))
    target = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count * share[-1]
    i = torch.searchsorted(share, target) - 1
    return x[i] + (target - share[i]) / root[i]


def _panel_edges(end: float) -> Tensor:
    return torch.linspace(0, end, PANELS + 1, dtype=torch.float64, device="cpu")


def _gauss_legendre() -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1], each [NODES] (Golub and Welsch 1969)."""
    k = torch.arange(1, NODES, dtype=torch.float64, device="cpu")
    off_diagonal = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes, 2 * vectors[0] ** 2
