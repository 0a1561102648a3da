"""Triton kernel that finds the KV heads with a NaN or an infinity in tiles that are about to be encoded.

    bad[head] = 1    where any |x| of a token with weight is not below infinity

One program reads up to 64 channels of a run of tiles of one KV head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous, tiles_per_program
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.spec import padded_size

PROGRAMS = 1024


@kernel()
def _finite_kernel(
    p_x, p_weight, p_bad, x_b: tl.int64, x_h: tl.int64, x_n, x_t, w_b: tl.int64, w_n, H, N, TILES,
    T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILES
    b, h = head // H, head % H
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    bad = tl.zeros((BLOCK_T, BLOCK_D), tl.int32)
    p_x += head_offset(b, h, x_b, x_h, D)
    for n in range(first, tl.minimum(first + TILES, N)):
        tile = tl.full((), 0, tl.int64) + n
        weight = tl.load(p_weight + b * w_b + tile * w_n + t, mask=t < T, other=0.0)
        p_rows = p_x + row_offset(tile, x_n, D) + row_offset(t, x_t, D)[:, None] + d[None, :]
        x = tl.load(p_rows, mask=(weight != 0.0)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        bad |= tl.where(tl.abs(x) < float("inf"), 0, 1)
    if tl.max(tl.max(bad, axis=1), axis=0) > 0:
        tl.store(p_bad + head, tl.full((), 1, tl.int8))


def bad_heads(fresh: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Equivalent to `reference.bad_heads`."""
    batch, heads, tiles, tile = fresh[0].shape[:4]
    bad = torch.zeros((batch, heads), dtype=torch.bool, device=weight.device)
    weight = rows_contiguous(weight)
    per_program = tiles_per_program(batch * heads * tiles, PROGRAMS)
    for x in map(rows_contiguous, fresh):
        dim = x.shape[-1]
        block = min(64, padded_size(dim))
        if x.numel():
            _finite_kernel[(batch * heads, triton.cdiv(tiles, per_program), triton.cdiv(dim, block))](
                x, weight, bad.view(torch.int8), *x.stride()[:4], *weight.stride()[:2], heads, tiles, per_program,
                T=tile, D=dim, BLOCK_T=padded_size(tile), BLOCK_D=block,
            )  # fmt: skip
    return bad
