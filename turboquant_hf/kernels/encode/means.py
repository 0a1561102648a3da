"""Triton kernel of `tile_mean`: one program reads up to 64 channels of a tile and stores their mean over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.means import masked_mean
from turboquant_hf.kernels.common.spec import padded_size


@kernel()
def _mean_kernel(
    p_x, p_weight, p_out, x_b: tl.int64, x_h: tl.int64, x_n, x_t, w_b: tl.int64, w_n, H, N,
    T: tl.constexpr, D: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    o_x = head_offset(b, h, x_b, x_h, D) + row_offset(n, x_n, D) + row_offset(t, x_t, D)[:, None] + d[None, :]
    x = tl.load(p_x + o_x, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    w = 0.0
    if WEIGHT:
        w = tl.load(p_weight + b * w_b + n * w_n + t, mask=t < T, other=0.0).to(tl.float32)
    tl.store(p_out + (head * N + n) * D + d, masked_mean(x, w, T, WEIGHT), mask=d < D)


def tile_mean(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Equivalent to `reference.tile_mean`."""
    batch, heads, tiles, tile, dim = x.shape
    x = rows_contiguous(x)
    out = torch.empty((batch, heads, tiles, dim), dtype=torch.float16, device=x.device)
    weight = weight if weight is None else rows_contiguous(weight)
    strides = (0, 0) if weight is None else weight.stride()[:2]
    if out.numel():
        block = min(64, padded_size(dim))
        _mean_kernel[(batch * heads, tiles, triton.cdiv(dim, block))](
            x, x if weight is None else weight, out, *x.stride()[:4], *strides, heads, tiles,
            T=tile, D=dim, WEIGHT=weight is not None, BLOCK_T=padded_size(tile), BLOCK_D=block,
        )  # fmt: skip
    return out
