"""Triton kernels of the statistics. Tensors are read once and summed in float32.

_tile_kernel     sums of squares of tiles, centred or not    one program per run of tiles and 64 channels
_state_kernel    balance and order from these sums           one program per KV head
_scale_kernel    the typical scale from these sums           one program per KV head

The kernels of queries and of the effective rank have files of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import HALF_MAX
from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous, tiles_per_program
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.means import masked_mean
from turboquant_hf.kernels.common.spec import padded_size
from turboquant_hf.kernels.statistics import reference
from turboquant_hf.kernels.statistics.queries import add_queries, query_energy
from turboquant_hf.kernels.statistics.rank import effective_rank

__all__ = [
    "add_queries", "balance_channels", "centred_energy", "effective_rank", "query_energy", "tile_energy",
    "typical_scale",
]  # fmt: skip

PROGRAMS = 1024
PRIOR = tl.constexpr(float(reference.PRIOR_TOKENS))
LEAST = tl.constexpr(reference.TINY)
SMALL = tl.constexpr(reference.SMALL_MEAN)
HALF = tl.constexpr(HALF_MAX)


@kernel()
def _tile_kernel(
    p_x, p_weight, p_out, p_largest, x_b: tl.int64, x_h: tl.int64, x_n, x_t, w_b: tl.int64, w_n, H, N, TILES, PARTS,
    T: tl.constexpr, D: tl.constexpr, CENTER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b, h = head // H, head % H
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    p_x += head_offset(b, h, x_b, x_h, D)
    for n in range(part * TILES, tl.minimum((part + 1) * TILES, N)):
        tile = tl.full((), 0, tl.int64) + n
        p_rows = p_x + row_offset(tile, x_n, D) + row_offset(t, x_t, D)[:, None] + d[None, :]
        x = tl.load(p_rows, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        weight = tl.load(p_weight + b * w_b + tile * w_n + t, mask=t < T, other=0.0).to(tl.float32)
        if CENTER:
            mean = masked_mean(x, weight, T, True).to(tl.float32)
            largest = tl.maximum(largest, tl.where(mean == mean, tl.abs(mean), float("inf")))
            x -= mean[None, :]
        sum += x * x * weight[:, None]
    o_part = (head * PARTS + part) * D + d
    tl.store(p_out + o_part, tl.sum(sum, axis=0), mask=d < D)
    if CENTER:
        tl.store(p_largest + o_part, largest, mask=d < D)


def _tile_sums(x: torch.Tensor, weight: torch.Tensor, center: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums of squares, and the largest means where `center`, of every run of tiles: [B, H, runs, D] each."""
    x, weight = rows_contiguous(x), rows_contiguous(weight)
    batch, heads, tiles, tile, dim = x.shape
    per_program = tiles_per_program(batch * heads * tiles, PROGRAMS)
    parts = triton.cdiv(tiles, per_program)
    out = torch.empty((batch, heads, parts, dim), dtype=torch.float32, device=x.device)
    largest = torch.empty_like(out) if center else None
    if out.numel():
        block = min(64, padded_size(dim))
        _tile_kernel[(batch * heads, parts, triton.cdiv(dim, block))](
            x, weight, out, out if largest is None else largest, *x.stride()[:4], *weight.stride()[:2], heads, tiles,
            per_program, parts, T=tile, D=dim, CENTER=center, BLOCK_T=padded_size(tile),
            BLOCK_D=block,
        )  # fmt: skip
    return out, largest


def tile_energy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Equivalent to `reference.tile_energy`."""
    return _tile_sums(x, weight, center=False)[0].sum(dim=2)


def centred_energy(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equivalent to `reference.centred_energy`."""
    energy, largest = _tile_sums(x, weight, center=True)
    return energy.sum(dim=2), largest.amax(dim=2)


@triton.jit
def root(mean_square, D: tl.constexpr):
    """Root with a floor (`reference._root`); channels past D are 0 in the sum."""
    mean = tl.sum(mean_square, axis=0) / D
    floor = tl.where(mean < LEAST, 1.0, 1e-6 * mean)
    return tl.sqrt(tl.maximum(mean_square, floor))


@triton.jit
def borrowed(energy, count, pooled, pooled_count):
    """`reference.borrow` for one sequence. `pooled`: the batch's finite sums, over `pooled_count` tokens."""
    missing = tl.maximum(-(count - PRIOR), 0.0)
    average = pooled / tl.maximum(pooled_count, 1.0)
    return (energy + missing * average) / tl.maximum(count + missing, 1.0)


@triton.jit
def write_state(
    key, query, known, p_balance, p_order, D: tl.constexpr, BLOCK_D: tl.constexpr, SIZES: tl.constexpr,
    BALANCE: tl.constexpr,
):  # fmt: skip
    """Balance and order of one head from mean squares [BLOCK_D] of keys and, where `known`, of queries."""
    d = tl.arange(0, BLOCK_D)
    key = root(tl.where(d < D, key, 0.0), D)
    importance, factor = key, tl.zeros_like(key) + 1.0
    if BALANCE != "none":
        factor = 1.0 / tl.sqrt(key)
    if BALANCE == "query":
        query = root(tl.where(d < D, query, 0.0), D)
        factor = tl.where(known, tl.sqrt(query / key), factor)
        importance = tl.where(known, query * key, importance)
    if size_count(SIZES) == 1:
        rank = d
    else:
        # A NaN sorts first, as in argsort. Ties go to the lower channel, so that no place is taken twice.
        importance = tl.where(importance == importance, importance, float("inf"))
        importance = tl.where(d < D, importance, -1.0)
        before = (importance[:, None] > importance[None, :]) | (
            (importance[:, None] == importance[None, :]) & (d[:, None] < d[None, :])
        )
        rank = tl.sum(before.to(tl.int32), axis=0)
    energy = factor * key * factor * key
    level = tl.zeros_like(energy) + 1.0
    for g in tl.static_range(size_count(SIZES)):
        inside = (rank >= size_edge(SIZES, g)) & (rank < size_edge(SIZES, g + 1))
        mean = tl.sum(tl.where(inside, energy, 0.0), axis=0) / (size_edge(SIZES, g + 1) - size_edge(SIZES, g))
        level = tl.where(inside, mean, level)
    tl.store(p_balance + d, factor / tl.sqrt(level), mask=d < D)
    tl.store(p_order + rank, d.to(tl.int16), mask=d < D)


@triton.constexpr_function
def size_count(sizes):
    return len(sizes)


@triton.constexpr_function
def size_edge(sizes, index):
    total = 0
    for size in sizes[:index]:
        total += size
    return total


@kernel("p_flag")
def _state_kernel(
    p_energy, p_count, p_query, p_largest, p_flag, p_balance, p_order, B, H, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SIZES: tl.constexpr, BALANCE: tl.constexpr, KNOWN: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    d = tl.arange(0, BLOCK_D)
    pooled = tl.zeros((BLOCK_D,), tl.float32)
    pooled_count = tl.zeros((BLOCK_D,), tl.float32)
    for other in range(0, B):
        lent = tl.load(p_energy + (other * H + h) * D + d, mask=d < D, other=0.0)
        pooled += tl.where(lent < float("inf"), lent, 0.0)
        pooled_count += tl.where(lent < float("inf"), tl.load(p_count + other), 0.0)
    energy = tl.load(p_energy + head * D + d, mask=d < D, other=0.0)
    if LARGEST:
        mean_square = tl.sum(energy, axis=0) / tl.maximum(tl.load(p_count + b) * D, 1.0)
        top = tl.max(tl.load(p_largest + head * D + d, mask=d < D, other=0.0), axis=0)
        beyond = (top > HALF / 2) | ((mean_square > 0.0) & (mean_square < SMALL * SMALL) & (top < SMALL))
        tl.store(p_flag, tl.full((), 1, tl.int8), mask=beyond)
    key = borrowed(energy, tl.load(p_count + b), pooled, pooled_count)
    query = key
    if KNOWN:
        query = tl.load(p_query + head * D + d, mask=d < D, other=0.0)
        query = query * query
    write_state(key, query, KNOWN, p_balance + head * D, p_order + head * D, D, BLOCK_D, SIZES, BALANCE)


def balance_channels(
    energy: torch.Tensor,
    count: torch.Tensor,
    query_rms: torch.Tensor | None,
    sizes: tuple[int, ...],
    balance: str,
    largest: torch.Tensor | None = None,
    flag: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Equivalent to `reference.balance_channels`."""
    batch, heads, dim = energy.shape
    energy = energy.contiguous()
    query = energy if query_rms is None else query_rms.float().contiguous()
    out = {"balance": torch.empty_like(energy), "order": torch.empty_like(energy, dtype=torch.int16)}
    if energy.numel():
        flag = torch.empty(1, dtype=torch.int8, device=energy.device) if flag is None else flag
        _state_kernel[(batch * heads,)](
            energy, count.contiguous(), query, energy if largest is None else largest.contiguous(), flag,
            out["balance"], out["order"], batch, heads, D=dim, BLOCK_D=padded_size(dim), SIZES=tuple(sizes),
            BALANCE=balance, KNOWN=query_rms is not None, LARGEST=largest is not None,
        )  # fmt: skip
    return out


@kernel()
def _scale_kernel(p_energy, p_count, p_scale, B, H, D: tl.constexpr, BLOCK_D: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    d = tl.arange(0, BLOCK_D)
    pooled, pooled_count = 0.0, 0.0
    for other in range(0, B):
        lent = tl.sum(tl.load(p_energy + (other * H + h) * D + d, mask=d < D, other=0.0), axis=0)
        lends = tl.abs(lent) < float("inf")
        pooled += tl.where(lends, lent, 0.0)
        pooled_count += tl.where(lends, tl.load(p_count + other), 0.0)
    energy = tl.sum(tl.load(p_energy + head * D + d, mask=d < D, other=0.0), axis=0)
    scale = tl.sqrt(borrowed(energy, tl.load(p_count + b), pooled, pooled_count) / D)
    tl.store(p_scale + head, tl.where(scale == 0.0, 1.0, scale))


def typical_scale(energy: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Equivalent to `reference.typical_scale`."""
    batch, heads, dim = energy.shape
    out = torch.empty((batch, heads), dtype=torch.float32, device=energy.device)
    if energy.numel():
        _scale_kernel[(batch * heads,)](
            energy.contiguous(), count.contiguous(), out, batch, heads, D=dim, BLOCK_D=padded_size(dim)
        )
    return out
