"""Triton kernel that turns packed tiles back into vectors.

    y = levels(codes) * scale            32 rotated channels of one group at a time
    x = inverse y + mean                 the products of all groups add up

One program decodes up to 128 channels of all tokens of one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import TileCoding
from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.spec import (
    MAX_CHUNK,
    group_count,
    group_of,
    padded_size,
    plane_count,
    plane_of,
    tile_spec,
)
from turboquant_hf.kernels.common.tables import level_table
from turboquant_hf.kernels.common.unpacking import load_scales
from turboquant_hf.kernels.common.words import level_numbers


@triton.jit
def _unpack_elements(p_rows, row, code, GROUP: tl.constexpr):
    """The codes at places `code` of packed rows `row` (index tensors that broadcast): int32."""
    codes = tl.zeros_like(row + code)
    for plane in tl.static_range(plane_count(GROUP)):
        o_byte = code % plane_of(GROUP, plane, 2) + plane_of(GROUP, plane, 3)
        byte = tl.load(p_rows + row * GROUP.row_stride + o_byte).to(tl.int32)
        field = (byte >> (code // plane_of(GROUP, plane, 2) * plane_of(GROUP, plane, 0))) & (
            (1 << plane_of(GROUP, plane, 0)) - 1
        )
        codes |= field << plane_of(GROUP, plane, 1)
    return codes


@triton.jit
def _decode_group(
    acc, p_codes, p_scale, p_levels, p_inverse, d, GROUP: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    """acc + the part of inverse y that one group of channels gives: [tokens, BLOCK_D]."""
    t = tl.arange(0, BLOCK_T)
    token = tl.minimum(t, T - 1)[:, None]
    scale = load_scales(p_scale + t, t < T, SHIFT)
    for low in range(0, GROUP.size, BLOCK_C):
        c = low + tl.arange(0, BLOCK_C)
        channel = tl.minimum(c, GROUP.size - 1)[None, :]
        if GROUP.in_words:
            codes = level_numbers(p_codes + GROUP.offset, token, channel, GROUP, T, CHANNEL_MAJOR)
        elif CHANNEL_MAJOR:
            codes = _unpack_elements(p_codes + GROUP.offset, channel, token, GROUP)
        else:
            codes = _unpack_elements(p_codes + GROUP.offset, token, channel, GROUP)
        y = tl.load(p_levels + GROUP.table + codes) * scale[:, None]
        m_matrix = (c < GROUP.size)[:, None] & (d < D)[None, :]
        matrix = tl.load(p_inverse + d[None, :] * D + (GROUP.start + c)[:, None], mask=m_matrix, other=0.0)
        acc = tl.dot(y, matrix, acc, input_precision="tf32x3")
    return acc


@kernel()
def _decode_kernel(
    p_codes, p_scale, p_levels, p_inverse, p_gain, p_mean, p_out,
    c_b: tl.int64, c_h: tl.int64, c_n, s_b: tl.int64, s_h: tl.int64, s_n, m_b: tl.int64, m_h: tl.int64, m_n,
    a_b, a_h, H, N,
    SPEC: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, MEAN: tl.constexpr, GAIN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    b = head // H
    h = head % H
    t = tl.arange(0, BLOCK_T)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    p_codes += head_offset(b, h, c_b, c_h, SPEC.nbytes) + row_offset(n, c_n, SPEC.nbytes)
    p_scale += head_offset(b, h, s_b, s_h, T) + row_offset(n, s_n, T)
    for g in tl.static_range(group_count(SPEC)):
        acc = _decode_group(
            acc, p_codes, p_scale + g * T, p_levels, p_inverse + head_offset(b, h, a_b, a_h, D), d, group_of(SPEC, g),
            SPEC.shift, T, D, BLOCK_T, BLOCK_C, CHANNEL_MAJOR,
        )  # fmt: skip
    acc *= SPEC.unit
    if GAIN:
        acc *= tl.load(p_gain + head)
    if MEAN:
        p_mean += head_offset(b, h, m_b, m_h, D) + row_offset(n, m_n, D)
        mean = tl.load(p_mean + d, mask=d < D, other=0.0)
        acc += mean.to(tl.float32)[None, :]
    o_out = (head * N + n) * T * D + t[:, None] * D + d[None, :]
    tl.store(p_out + o_out, acc, mask=(t < T)[:, None] & (d < D)[None, :])


def decode_tiles(packed: dict[str, torch.Tensor], inverse: torch.Tensor, coding: TileCoding) -> torch.Tensor:
    """Equivalent to `reference.decode_tiles`; products are float32 to within a few units in the last place."""
    groups, gain = coding.groups, coding.gain
    codes, scale, mean = rows_contiguous(packed["codes"]), packed["scale"], packed.get("mean")
    batch, heads, tiles = codes.shape[:3]
    tile, dim, device = scale.shape[-1], inverse.shape[-1], codes.device
    scale = rows_contiguous(scale) if scale.stride(3) == tile else scale.contiguous()
    mean = mean if mean is None else rows_contiguous(mean)
    spec = tile_spec(groups, tile, coding.scale_format, channel_major=coding.channel_major, exact=True)
    matrix = inverse.float().contiguous()
    out = torch.empty((batch, heads, tiles, tile, dim), dtype=torch.float32, device=device)
    if out.numel():
        block = min(MAX_CHUNK, padded_size(dim))
        _decode_kernel[(batch * heads, tiles, triton.cdiv(dim, block))](
            codes, scale, level_table(groups, device), matrix, out if gain is None else gain.contiguous(),
            out if mean is None else mean, out, *codes.stride()[:3], *scale.stride()[:3],
            *((0, 0, 0) if mean is None else mean.stride()[:3]), *_head_strides(matrix), heads, tiles,
            SPEC=spec, T=tile, D=dim, BLOCK_T=padded_size(tile), BLOCK_D=block, BLOCK_C=32,
            MEAN=mean is not None, GAIN=gain is not None, CHANNEL_MAJOR=coding.channel_major, num_warps=8,
        )  # fmt: skip
    return out


def _head_strides(matrix: torch.Tensor) -> tuple[int, int]:
    """Steps from one sequence's and one head's matrix to the next, of [D, D] or [B or 1, H, D, D]."""
    if matrix.dim() == 2:
        return 0, 0
    return (0 if matrix.shape[0] == 1 else matrix.stride(0)), matrix.stride(1)
