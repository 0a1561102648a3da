"""Triton kernel of `effective_rank`: one program per KV head adds up the second moments of a few tokens."""

from __future__ import annotations

import torch
import triton.language as tl

from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.spec import padded_size
from turboquant_hf.kernels.statistics import reference

MOST_MOMENTS = 128
"""The largest head dim whose second moments a program keeps: with 256, Triton 3.6 makes code that ptxas refuses."""


@kernel()
def _rank_kernel(
    p_x, p_weight, p_rank, x_b: tl.int64, x_h: tl.int64, x_n: tl.int64, x_t: tl.int64, w_b: tl.int64, w_n, w_t, H, N, T,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    d = tl.arange(0, BLOCK_D)
    moments = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    p_x += head_offset(b, h, x_b, x_h, D)
    for n in range(0, N):
        for low in range(0, T, BLOCK_T):
            t = low + tl.arange(0, BLOCK_T)
            seen = tl.load(p_weight + b * w_b + n * w_n + t * w_t, mask=t < T, other=0.0) > 0.0
            p_rows = p_x + row_offset(n, x_n, D) + row_offset(t, x_t, D)[:, None] + d[None, :]
            x = tl.load(p_rows, mask=seen[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            moments = tl.dot(tl.trans(x), x, moments, input_precision="tf32x3")
    moments = moments / tl.max(tl.max(tl.abs(moments), axis=1), axis=0)
    trace = tl.sum(tl.sum(tl.where(d[:, None] == d[None, :], moments, 0.0), axis=1), axis=0)
    tl.store(p_rank + head, trace * trace / tl.sum(tl.sum(moments * moments, axis=1), axis=0))


def effective_rank(tiles: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Equivalent to `reference.effective_rank`."""
    if tiles.shape[-1] > MOST_MOMENTS:
        return reference.effective_rank(tiles, weight)
    x, weight = reference.thinned(rows_contiguous(tiles), weight)
    batch, heads, count, tile, dim = x.shape
    rank = torch.full((batch, heads), torch.nan, dtype=torch.float32, device=x.device)
    if x.numel():
        block = max(16, padded_size(dim))
        _rank_kernel[(batch * heads,)](
            x, weight, rank, *x.stride()[:4], *weight.stride(), heads, count, tile,
            D=dim, BLOCK_T=32, BLOCK_D=block, num_warps=max(4, block // 16),
        )  # fmt: skip
    return rank
