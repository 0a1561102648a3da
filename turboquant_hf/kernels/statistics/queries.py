"""Triton kernels of the sums of squares of queries. Tensors are read once and summed in float32.

_query_kernel    of a prompt's queries           one program per KV head and 256 tokens
_add_kernel      of the queries of a step        one program per KV head
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.spec import padded_size

QUERIES = 256


@triton.jit
def sum_of_squares(
    p_rows, first, last, row_stride, heads, head_stride, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Sums of squares [BLOCK_D] over rows first to last - 1 of several heads."""
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    sum = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for g in range(0, heads):
        for low in range(first, last, BLOCK_T):
            row = (low + t).to(tl.int64)
            p_x = p_rows + row_offset(g, head_stride, D) + row_offset(row, row_stride, D)[:, None] + d[None, :]
            x = tl.load(p_x, mask=(row < last)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            sum += x * x
    return tl.sum(sum, axis=0)


@kernel("p_starts")
def _query_kernel(
    p_query, p_starts, p_out, p_count, q_b: tl.int64, q_h: tl.int64, q_t, H, GROUP, TOKENS, POSITION, QUERIES, PARTS,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b, h = head // H, head % H
    d = tl.arange(0, BLOCK_D)
    start = tl.load(p_starts + b).to(tl.int32) - POSITION
    first = tl.maximum(part * QUERIES, start)
    last = tl.minimum((part + 1) * QUERIES, TOKENS)
    p_rows = p_query + head_offset(b, h * GROUP, q_b, q_h, D)
    sum = sum_of_squares(p_rows, first, last, q_t, GROUP, q_h, D, BLOCK_T, BLOCK_D)
    tl.store(p_out + (head * PARTS + part) * D + d, sum, mask=d < D)
    count = tl.maximum(TOKENS - tl.maximum(start, 0), 0) * GROUP
    tl.store(p_count + b, count.to(tl.float32), mask=(h == 0) & (part == 0))


def query_energy(
    query: torch.Tensor, heads: int, starts: torch.Tensor, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equivalent to `reference.query_energy`."""
    query = rows_contiguous(query)
    batch, query_heads, tokens, dim = query.shape
    group = query_heads // heads
    parts = max(1, triton.cdiv(tokens, QUERIES))
    out = torch.empty((batch, heads, parts, dim), dtype=torch.float32, device=query.device)
    count = torch.empty((batch, 1, 1), dtype=torch.float32, device=query.device)
    if out.numel():
        _query_kernel[(batch * heads, parts)](
            query, starts, out, count, *query.stride()[:3], heads, group, tokens, position, QUERIES, parts,
            D=dim, BLOCK_T=max(16, min(64, 8192 // padded_size(dim))), BLOCK_D=padded_size(dim),
        )  # fmt: skip
    return (out[:, :, 0] if parts == 1 else out.sum(dim=2)), count


@kernel("p_count", "p_counts", "p_starts")
def _add_kernel(
    p_query, p_energy, p_count, p_counts, p_starts, q_b: tl.int64, q_h: tl.int64, q_t, H, GROUP, TOKENS,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    d = tl.arange(0, BLOCK_D)
    first = tl.maximum(tl.load(p_starts + b).to(tl.int32) - (tl.load(p_counts + 1) - TOKENS), 0)
    p_rows = p_query + head_offset(b, h * GROUP, q_b, q_h, D)
    sum = sum_of_squares(p_rows, first, TOKENS, q_t, GROUP, q_h, D, BLOCK_T, BLOCK_D)
    p_sum = p_energy + head * D + d
    tl.store(p_sum, tl.load(p_sum, mask=d < D, other=0.0) + sum, mask=d < D)
    tl.store(p_count + head, tl.load(p_count + head) + tl.maximum(TOKENS - first, 0) * GROUP)


def add_queries(
    query: torch.Tensor, energy: torch.Tensor, count: torch.Tensor, counts: torch.Tensor, starts: torch.Tensor
) -> None:
    """Equivalent to `reference.add_queries`, but the host does not wait. Meant for the few tokens of a step."""
    query = rows_contiguous(query)
    (batch, query_heads, tokens, dim), heads = query.shape, energy.shape[1]
    _add_kernel[(batch * heads,)](
        query, energy, count, counts, starts, *query.stride()[:3], heads, query_heads // heads, tokens,
        D=dim, BLOCK_T=16, BLOCK_D=padded_size(dim),
    )  # fmt: skip
