"""Plain torch: the definition of every statistic that a quantizer takes."""

from __future__ import annotations

import torch

from turboquant_hf.kernels.codes import HALF_MAX
from turboquant_hf.kernels.encode.reference import tile_mean

PRIOR_TOKENS = 256
"""A sequence with fewer tokens borrows the rest of its statistics from the batch."""

SAMPLED_TILES = 8
"""`effective_rank` reads at least that many tiles where there are more, and less than twice as many."""

SMALL_MEAN = 2.0**-20
"""float16 rounds the means of a head too coarsely if its numbers are smaller than this."""

TINY = 1e-30
"""A mean square below this counts as zero: its root predicts nothing about later numbers."""


def tile_energy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sums of squares over the tokens that count.

    Args:
        x: [B, H, N, T, D].
        weight: [B, N, T], 1 for a token that counts and 0 for padding and sinks.

    Returns: float32 [B, H, D].
    """
    return (x.float().square() * weight[:, None, :, :, None].float()).sum(dim=(2, 3))


def centred_energy(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`tile_energy` of the tokens minus the mean of their tile, and the largest absolute mean of each channel.

    Returns: float32 [B, H, D] twice. The largest mean is infinite if one does not fit in float16.
    """
    mean = tile_mean(x, weight).float()
    largest = mean.abs().nan_to_num(nan=torch.inf).amax(dim=2)
    return tile_energy(x.float() - mean.unsqueeze(-2), weight), largest


def query_energy(
    query: torch.Tensor, heads: int, starts: torch.Tensor, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of the queries that read a KV head, padding left out.

    Args:
        query: [B, Hq, q, D], the queries at positions position, position + 1, ... ; Hq is a multiple of `heads`.
        starts: int64 [B], every sequence's first position.

    Returns: float32 [B, heads, D], and the numbers of summed queries, float32 [B, 1, 1].
    """
    tokens, group = query.shape[2], query.shape[1] // heads
    weight = (torch.arange(position, position + tokens, device=query.device) >= starts[:, None]).float()
    grouped = query.float().unflatten(1, (heads, group))
    energy = (grouped.square() * weight[:, None, None, :, None]).sum(dim=(2, 3))
    return energy, weight.sum(dim=1)[:, None, None] * group


def add_queries(
    query: torch.Tensor, energy: torch.Tensor, count: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor
) -> None:
    """Add `query_energy` of the newest queries [B, Hq, q, D] to energy [B, H, D] and count [B, H], in place.

    counts: int32 [2]: tiles encoded, and tokens held, those of this step included. Fast versions read it on its device.
    """
    added, number = query_energy(query, energy.shape[1], starts, int(counts[1]) - query.shape[2])
    energy.add_(added)
    count.add_(number[:, :, 0])


def balance_channels(
    energy: torch.Tensor,
    count: torch.Tensor,
    query_rms: torch.Tensor | None,
    sizes: tuple[int, ...],
    balance: str,
    largest: torch.Tensor | None = None,
    flag: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The state of conditioned keys (`quantizers.conditioned`) from their energies.

    Args:
        energy: float32 [B, H, D], sums of squares over `count` float32 [B] tokens.
        query_rms: float32 [B, H, D], or None where the queries are unknown.
        sizes: channels of every group, the most important first; one group keeps the channels' order.
        balance: "query" (without queries as "key"), "key" or "none".
        largest, flag: the largest means of `centred_energy`, and int8 [1], set to 1 where `beyond_half` finds any. Both
            may be missing.

    Returns: {"balance": float32 [B, H, D], "order": int16 [B, H, D]}.
    """
    if flag is not None and largest is not None:
        flag |= beyond_half(energy, count, largest).any()
    key_rms = _root(borrow(energy, count[:, None, None]))
    importance, factor = key_rms, torch.ones_like(key_rms)
    if balance == "query" and query_rms is not None:
        query = _root(query_rms.float().square())
        factor, importance = (query / key_rms).sqrt(), query * key_rms
    elif balance != "none":
        factor = key_rms.rsqrt()
    order = importance.argsort(dim=-1, descending=True, stable=True)
    if len(sizes) == 1:
        order = torch.arange(energy.shape[-1], device=energy.device).expand_as(order).contiguous()
    # Unit energy in each group after balancing: stored scales stay near 1 whatever the model's units.
    sorted_energy = (factor * key_rms).square().gather(-1, order)
    parts = sorted_energy.split(list(sizes), -1)
    level = torch.cat([part.mean(-1, keepdim=True).expand_as(part) for part in parts], dim=-1)
    factor = factor * torch.empty_like(level).scatter(-1, order, level.rsqrt())
    return {"balance": factor, "order": order.to(torch.int16)}


def beyond_half(energy: torch.Tensor, count: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The channels, bool [B, H, D], whose means float16 does not hold, or may soon not hold any more.

    energy, largest: from `centred_energy`. count: tokens [B].
    """
    mean_square = energy.sum(dim=-1) / (count[:, None] * energy.shape[-1]).clamp(min=1.0)
    small = (mean_square > 0.0) & (mean_square < SMALL_MEAN**2) & (largest.amax(dim=-1) < SMALL_MEAN)
    return (largest > HALF_MAX / 2) | small[:, :, None]


def typical_scale(energy: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Root mean square of a head's elements from energies [B, H, D] over `count` [B] tokens: [B, H], 1 for zeros.

    A sequence that is all padding so far has no tokens yet. It borrows (`borrow`) for the tokens to come.
    """
    rms = (borrow(energy.sum(dim=-1), count[:, None]) / energy.shape[-1]).sqrt()
    return torch.where(rms == 0.0, 1.0, rms)


def effective_rank(tiles: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How many directions the tokens of each head take: float32 [B, H]; NaN where nothing counts.

    tr(S)^2 / tr(S^2) of a head's S = sum of x x': 1 for copies of one token, at most n for n different ones, and D
    for white noise. The rank of zeros, and of numbers whose squares float32 does not hold, is NaN. From 8 tiles
    on, at most 15 are read, evenly spread, and every fourth token of them. So a long prompt costs no more than a short
    one.

    Args:
        tiles: [B, H, N, T, D], without rotary positions, which make one token look like many: values.
        weight: [B, N, T], 1 for a token that counts and 0 for padding and sinks.
    """
    x, weight = thinned(tiles, weight)
    x = torch.where(weight[:, None, :, :, None] > 0, x.float(), 0.0).flatten(2, 3)  # padding may be NaN
    moments = x.transpose(-1, -2) @ x
    moments = moments / moments.abs().amax(dim=(-2, -1), keepdim=True)
    trace = moments.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return trace.square() / moments.square().sum(dim=(-2, -1))


def thinned(tiles: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that `effective_rank` reads, as views."""
    step, thin = max(1, tiles.shape[2] // SAMPLED_TILES), 4 if tiles.shape[2] >= SAMPLED_TILES else 1
    return tiles[:, :, ::step, ::thin], weight[:, ::step, ::thin]


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The greatest power of two in each positive x; NaN stays NaN."""
    return x / (2.0 * x.frexp().mantissa)


def borrow(sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Means [B, H, ...] from sums and counts [B, 1, ...], short sequences filled up with the batch's average.

    A sequence with NaN or infinite sums lends nothing, so it does not spoil the others.
    """
    lends = sums.isfinite()
    pooled = torch.where(lends, sums, 0.0).sum(dim=0, keepdim=True)
    pooled = pooled / (lends * count).sum(dim=0, keepdim=True).clamp(min=1.0)
    missing = (PRIOR_TOKENS - count).clamp(min=0.0)
    return (sums + missing * pooled) / (count + missing).clamp(min=1.0)


def _root(mean_square: torch.Tensor) -> torch.Tensor:
    """Root with a floor, so that a dead channel neither divides by zero nor gets an unbounded balance; 1 for zeros."""
    mean = mean_square.mean(dim=-1, keepdim=True)
    floor = torch.where(mean < TINY, 1.0, 1e-6 * mean)
    return torch.maximum(mean_square, floor).sqrt()
