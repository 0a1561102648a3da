"""Both products of attention with one packed tile, group by group.

    scores^T = K q^T          [tokens, query rows]
    out^T    = V^T p^T        [channels, query rows]

- Products are transposed so that the decoded operand stays in registers.
- A field of a plane is a run of neighbouring channels (keys) or tokens (values). The other operand is cut into the same
  runs, so nothing is interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.kernels.common.addresses import row_offset
from turboquant_hf.kernels.common.spec import group_count, group_of
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
def load_queries(p_rotated, row, m_row, unit, KEYS: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """Tuple of all chunks of all groups, in the order of the channels."""
    qs = ()
    for g in tl.static_range(group_count(KEYS)):
        for r in tl.static_range(chunks_in(KEYS, g)):
            qs = qs + (load_query(p_rotated, row, m_row, unit, group_of(KEYS, g), D, r, DTYPE),)
    return qs


@triton.jit
def score_group(
    p_tile, p_scale, p_levels, qs, KEYS: tl.constexpr, g: tl.constexpr,
    T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The part of a tile's scores that one group of channels gives: [BLOCK_T, M]."""
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
def score_tile(
    p_codes, p_scale, p_levels, qs, n, codes_n, scale_n, KEYS: tl.constexpr,
    T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Products of tile n of a head with all chunks of its queries, not yet multiplied by their unit: [BLOCK_T, M]."""
    p_tile = p_codes + row_offset(n, codes_n, KEYS.nbytes)
    scores = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for g in tl.static_range(group_count(KEYS)):
        p_group = p_scale + row_offset(n, scale_n, T) + g * T
        scores += score_group(p_tile, p_group, p_levels, qs, KEYS, g, T, BLOCK_T, BLOCK_M, DTYPE)
    return scores


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
def add_values(
    p, factor, accs, p_codes, p_scale, p_levels, n, codes_n, scale_n, value_unit, threshold, VALUES: tl.constexpr,
    T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Tuple of acc * factor + (V^T p^T) / value_unit for all groups of tile n of a head.

    With SPARSE, V is not read where every probability is below `threshold`.
    """
    p_tile = p_codes + row_offset(n, codes_n, VALUES.nbytes)
    p_first = p_scale + row_offset(n, scale_n, T)
    new = ()
    for g in tl.static_range(group_count(VALUES)):
        acc = accs[g] * factor[None, :]
        if SPARSE:
            if tl.max(tl.max(p, axis=0), axis=0) >= threshold:
                acc = decode_values(
                    p, p_tile, p_first + g * T, p_levels, acc, 1.0 / value_unit,
                    group_of(VALUES, g), VALUES.shift, T, BLOCK_T, BLOCK_M, DTYPE,
                )  # fmt: skip
        else:
            acc = decode_values(
                p, p_tile, p_first + g * T, p_levels, acc, 1.0 / value_unit,
                group_of(VALUES, g), VALUES.shift, T, BLOCK_T, BLOCK_M, DTYPE,
            )  # fmt: skip
        new = new + (acc,)
    return new


@triton.jit
def largest_scale(p_scale, n, scale_n, SHIFT: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr):
    """The largest scale of the first group of tile n."""
    t = tl.arange(0, BLOCK_T)
    return tl.max(load_scales(p_scale + row_offset(n, scale_n, T) + t, t < T, SHIFT), axis=0)


@triton.jit
def load_mean(p_mean, n, mean_n, d, D: tl.constexpr):
    """The mean of tile n of a head, float32."""
    return tl.load(p_mean + row_offset(n, mean_n, D) + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def store_group(p_out, o_row, m_row, acc, GROUP: tl.constexpr):
    """Store the sums [channels, M] of one group."""
    c = tl.arange(0, GROUP.block)
    o_out = o_row[None, :] + (GROUP.start + c)[:, None]
    tl.store(p_out + o_out, acc, mask=m_row[None, :] & (c < GROUP.size)[:, None])
