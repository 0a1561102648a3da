"""Both products of attention with one packed tile, group by group.

Products are transposed, scores^T = K q^T and out^T = V^T p^T, so that the decoded operand stays in registers. A field
of a plane is a run of neighbouring channels (keys) or tokens (values): the other operand is cut the same way, and
nothing is interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.kernels.common.spec import group_of
from turboquant_hf.kernels.common.unpacking import decode_levels, load_scales, unpack_chunk
from turboquant_hf.kernels.common.words import level_numbers


@triton.jit
def halves(x, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """Tuple of COUNT equal runs of the rows of x [R, COLUMNS]; COUNT is a power of two."""
    if COUNT == 1:
        return (x,)
    else:
        ROWS: tl.constexpr = x.shape[0]
        first, second = tl.split(tl.permute(tl.reshape(x, (2, ROWS // 2, COLUMNS)), (1, 2, 0)))
        return halves(first, COUNT // 2, COLUMNS) + halves(second, COUNT // 2, COLUMNS)


@triton.constexpr_function
def chunks_in(spec, group):
    return spec.groups[group].chunks


@triton.constexpr_function
def block_of(spec, group):
    return spec.groups[group].block


@triton.jit
def load_query(p_rotated, row, m_row, unit, GROUP: tl.constexpr, D: tl.constexpr, r: tl.constexpr, DTYPE: tl.constexpr):
    """Chunk r of a group's channels of the rotated queries: [chunk, M]."""
    c = r * GROUP.chunk + tl.arange(0, GROUP.chunk)
    o_chunk = row[None, :] * D + (GROUP.start + c)[:, None]
    chunk = tl.load(p_rotated + o_chunk, mask=m_row[None, :] & (c < GROUP.size)[:, None], other=0.0)
    return (chunk / unit[None, :]).to(DTYPE)


@triton.jit
def score_group(
    p_tile, p_scale, p_levels, qs, KEYS: tl.constexpr, g: tl.constexpr,
    T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What one group of channels adds to the scores of a tile: [BLOCK_T, M]."""
    GROUP: tl.constexpr = group_of(KEYS, g)
    CHUNKS: tl.constexpr = GROUP.chunks
    t = tl.arange(0, BLOCK_T)
    token = tl.minimum(t, T - 1)[:, None]
    dots = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for r in tl.static_range(CHUNKS):
        if GROUP.in_words:
            channel = r * GROUP.chunk + tl.arange(0, GROUP.chunk)[None, :]
            codes = level_numbers(p_tile + GROUP.offset, token, channel, GROUP, T, False)
        else:
            codes = unpack_chunk(p_tile + token * KEYS.row_bytes + GROUP.offset, GROUP, r)
        k = decode_levels(codes, p_levels, GROUP, DTYPE)
        dots = tl.dot(k, qs[GROUP.first_chunk + r], dots, input_precision="ieee")
    scale = load_scales(p_scale + t, t < T, KEYS.shift) * GROUP.lead
    return dots * scale[:, None]


@triton.jit
def decode_values(
    p, p_tile, p_scale, p_levels, acc, scale_unit,
    GROUP: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [channels, M] + (V^T p^T) * scale_unit for one group of one tile; p [BLOCK_T, M]."""
    CHUNKS: tl.constexpr = GROUP.chunks
    t = tl.arange(0, BLOCK_T)
    scale = load_scales(p_scale + t, t < T, SHIFT) * (GROUP.lead * scale_unit)
    w = tl.clamp(p * scale[:, None], -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)
    parts = halves(w, CHUNKS, BLOCK_M)
    channel = tl.minimum(tl.arange(0, GROUP.block), GROUP.size - 1)
    p_rows = p_tile + GROUP.offset + channel[:, None] * GROUP.row_bytes
    for r in tl.static_range(CHUNKS):
        if GROUP.in_words:
            token = tl.minimum(r * GROUP.chunk + tl.arange(0, GROUP.chunk), T - 1)[None, :]
            codes = level_numbers(p_tile + GROUP.offset, token, channel[:, None], GROUP, T, True)
        else:
            codes = unpack_chunk(p_rows, GROUP, r)
        v = decode_levels(codes, p_levels, GROUP, DTYPE)
        acc = tl.dot(v, parts[r], acc, input_precision="ieee")
    return acc


@triton.jit
def store_group(p_out, o_row, m_row, acc, GROUP: tl.constexpr):
    c = tl.arange(0, GROUP.block)
    o_out = o_row[None, :] + (GROUP.start + c)[:, None]
    tl.store(p_out + o_out, acc, mask=m_row[None, :] & (c < GROUP.size)[:, None])
