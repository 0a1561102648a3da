"""y = A v inside the encoder, by products in half precision that are nearly as exact as float32.

    SPLIT   v as two float16 numbers (22 bits): y = A_1 high + A_1 low + A_2 high + ...
    RAW     v in its own dtype, where it is neither centred nor balanced
    FULL    float32, as three tf32 products

A_1, A_2, ... are the parts of the matrix (`operand`). A Hadamard matrix over its largest element has one exact part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.common.addresses import row_offset
from turboquant_hf.kernels.common.spec import group_count, group_of
from turboquant_hf.primitives.memo import once, once_per_tensor

RAW, SPLIT, FULL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def ranks(p_order, channels, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The places of channels in an order [D]: int32."""
    d = tl.arange(0, BLOCK_D)
    order = tl.load(p_order + d, mask=d < D, other=-1).to(tl.int32)
    return tl.sum(tl.where(order[:, None] == channels[None, :], d[:, None], 0), axis=0)


@triton.jit
def group_matrices(p_matrix, row, m_row, part_stride, D: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """Rows `row` of the columns of one group, one tensor per part of the matrix."""
    c = tl.arange(0, GROUP.block)
    o_row = row[:, None] * D + (GROUP.start + c)[None, :]
    mask = m_row[:, None] & (c < GROUP.size)[None, :]
    found = ()
    for part in tl.static_range(PARTS):
        found = found + (tl.load(p_matrix + row_offset(part, part_stride, D) + o_row, mask=mask, other=0.0),)  # noqa: RUF005
    return found


@triton.jit
def matrices_of(
    p_matrix, row, m_row, part_stride, D: tl.constexpr, SPEC: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """`group_matrices` of all groups, one after the other."""
    found = ()
    for g in tl.static_range(group_count(SPEC)):
        found = found + group_matrices(p_matrix, row, m_row, part_stride, D, group_of(SPEC, g), PARTS)
    return found


@triton.jit
def prepared(x, mean, balance, MEAN: tl.constexpr, BALANCE: tl.constexpr, PATH: tl.constexpr):
    """The vectors to be multiplied by the matrix, as two tensors of the products' dtype. Only SPLIT uses the second."""
    if PATH == RAW:
        return x, x
    else:
        v = x.to(tl.float32)
        if MEAN:
            v -= mean.to(tl.float32)[None, :]
        if BALANCE:
            v *= balance[None, :]
        if PATH == FULL:
            return v, v
        else:
            high = v.to(tl.float16)
            return high, (v - high.to(tl.float32)).to(tl.float16)


@triton.jit
def product(acc, high, low, matrices, FIRST: tl.constexpr, PARTS: tl.constexpr, PATH: tl.constexpr):
    """acc + v A^T, small terms first."""
    if PATH == FULL:
        return tl.dot(high, matrices[FIRST], acc, input_precision="tf32x3")
    else:
        for part in tl.static_range(1, PARTS):
            acc = tl.dot(high, matrices[FIRST + PARTS - part], acc)
        if PATH == SPLIT:
            acc = tl.dot(low, matrices[FIRST], acc)
        return tl.dot(high, matrices[FIRST], acc)


@once_per_tensor
def operand(
    transform: torch.Tensor, groups: tuple[CodeGroup, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A shared matrix [D, D] or [1, H, D, D] in the form that products read: parts of `dtype`, and one unit per group.

    The rows of a group are divided by their largest element, the unit. A Hadamard matrix then has one exact part. Any
    other matrix is the sum of two parts (float16) or three (bfloat16), with an error of at most 2^-24. Waits for the
    device once per matrix.

    Returns: [parts, 1 or H, D, D], transposed; float32 [1 or H, groups].
    """
    rows = transform.float().reshape(-1, *transform.shape[-2:]).split([group.size for group in groups], dim=1)
    units = torch.stack([part.abs().amax(dim=(1, 2)) for part in rows], dim=1).clamp(min=1e-30)
    rest = torch.cat([part / units[:, i, None, None] for i, part in enumerate(rows)], dim=1).transpose(1, 2)
    parts = []
    while not parts or (dtype != torch.float32 and float(rest.abs().max()) > 2.0**-24):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts).contiguous(), units


@once(maxsize=64)
@torch.inference_mode(False)
def ones(count: int, device: torch.device) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.float32, device="cpu").to(device)
