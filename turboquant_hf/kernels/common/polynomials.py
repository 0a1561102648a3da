"""Codebooks as polynomials: levels without a table, and a guess of the code of a coordinate."""

from __future__ import annotations

from functools import lru_cache

import torch

from turboquant_hf.primitives import Codebook

MAX_COEFFICIENTS = 6


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def odd_polynomial(codebook: Codebook, tolerance: float) -> tuple[float, tuple[float, ...]]:
    """(lead, (1, c1, c2, ...)) with level = lead * x * (1 + c1 x^2 + ...), or (1, ()) where none fits.

    x = (2 code + 1) / 2^bits - 1. A codebook's own coefficients are taken as they are. Otherwise a polynomial is fitted
    whose largest error relative to a level is at most `tolerance`. It has at most MAX_COEFFICIENTS terms, because a
    table is as fast as a longer one.
    """
    if codebook.coefficients:
        # These are the coefficients of a polynomial in 2 code + 1 - 2^bits.
        scaled = [c * 2.0 ** (codebook.bits * (2 * i + 1)) for i, c in enumerate(codebook.coefficients)]
        return scaled[0], tuple(c / scaled[0] for c in scaled)
    levels = torch.tensor(codebook.levels, dtype=torch.float64, device="cpu")
    if (levels + levels.flip(0)).abs().max() > 1e-6 * levels.abs().max():
        return 1.0, ()
    count = len(levels)
    x = (2 * torch.arange(count, dtype=torch.float64, device="cpu") + 1) / count - 1
    for terms in range(1, min(MAX_COEFFICIENTS, count // 2) + 1):
        basis = torch.stack([x ** (2 * i + 1) for i in range(terms)], dim=1) / levels.abs()[:, None]
        fit = torch.linalg.lstsq(basis, levels.sign()[:, None]).solution
        if (basis @ fit - levels.sign()[:, None]).abs().max() <= tolerance:
            fit = fit.flatten().tolist()
            return fit[0], tuple(c / fit[0] for c in fit)
    return 1.0, ()


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def code_guess(codebook: Codebook) -> tuple[float, ...]:
    """(edge, g0, g1, ...) as `GroupSpec` says, or () where four terms are not exact enough.

    Rounding the guess gives one of the two thresholds around a coordinate, so that one comparison gives the code.
    """
    edges = torch.tensor(codebook.thresholds, dtype=torch.float64, device="cpu")
    if (edges + edges.flip(0)).abs().max() > 1e-6 * edges.abs().max():
        return ()
    if len(edges) == 1:
        return (1.0, 0.0)
    number = torch.arange(1, len(edges) + 1, dtype=torch.float64, device="cpu") - 2 ** (codebook.bits - 1)
    share = torch.arange(32, dtype=torch.float64, device="cpu") / 32
    point = torch.cat([(edges[:-1, None] + edges.diff()[:, None] * share).flatten(), edges[-1:]])
    wanted = torch.cat([(number[:-1, None] + share).flatten(), number[-1:]])
    for terms in range(1, 5):
        basis = torch.stack([point ** (2 * i + 1) for i in range(terms)], dim=1)
        weight = torch.ones_like(point)
        for _ in range(40):  # new weights lead towards the smallest maximum error
            fit = torch.linalg.lstsq(basis * weight[:, None], (wanted * weight)[:, None]).solution[:, 0]
            error = (basis @ fit - wanted).abs()
            if error.max() <= 0.4:
                return (float(edges[-1]), *fit.tolist())
            weight = weight * (error / error.max() + 1e-3).sqrt()
    return ()


def midpoints(codebook: Codebook) -> tuple[float, ...]:
    """`GroupSpec.midpoints`: the mean of the level polynomial at 2 m - 1 and 2 m + 1."""
    if not codebook.coefficients or len(codebook.coefficients) > 3:
        return ()
    a, b, c = (*codebook.coefficients, 0.0, 0.0)[:3]
    return (2 * a + 6 * b + 10 * c, 8 * b + 80 * c, 32 * c)[: len(codebook.coefficients)]
