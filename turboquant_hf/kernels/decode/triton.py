"""Triton: attention of a few queries over packed tiles, split over the tokens and merged by log-sum-exp.

One program takes all query heads of one KV head (in one matrix tile) over a run of tiles. Products are transposed,
scores^T = K q^T and out^T = V^T p^T, so that the decoded operand stays in registers. A field of a plane is a run of
neighbouring channels (keys) or tokens (values): the other operand is cut the same way, nothing is interleaved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.decode.reference import PackedSide, RawTokens
from turboquant_hf.kernels.encode.spec import (
    GroupSpec,
    decode_levels,
    group_count,
    group_of,
    head_offset,
    level_table,
    load_scales,
    padded_size,
    row_offset,
    rows_contiguous,
    tile_spec,
    unpack_chunk,
)
from turboquant_hf.kernels.progress import announces

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_RAW = 32
RAW_TOKENS = 256
"""Raw tokens a program: about what a run of tiles costs."""
MAX_ROWS = 64
INTERPRETER_SPLITS = 3


@triton.jit
def _halves(x, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """Tuple of COUNT equal runs of the rows of x [R, COLUMNS]; COUNT is a power of two."""
    if COUNT == 1:
        return (x,)
    else:
        ROWS: tl.constexpr = x.shape[0]
        first, second = tl.split(tl.permute(tl.reshape(x, (2, ROWS // 2, COLUMNS)), (1, 2, 0)))
        return _halves(first, COUNT // 2, COLUMNS) + _halves(second, COUNT // 2, COLUMNS)


@triton.jit
def _logits(scores, softcap, SOFTCAP: tl.constexpr):
    """Scaled scores to base-2 logits."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
    return scores * LOG2E


@triton.jit
def _update(logits, peak, total):
    """One step of the online softmax over columns: probabilities, new peak, new total, factor of what was summed."""
    new = tl.maximum(peak, tl.max(logits, axis=0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    factor = tl.exp2(peak - safe)
    p = tl.exp2(logits - safe[None, :])
    return p, new, total * factor + tl.sum(p, axis=0), factor


@triton.jit
def _raw_step(
    p_keys, p_values, d_keys, d_values, m_tokens, m_visible, q, peak, total, acc,
    scaling, softcap, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to a block of raw tokens: p_keys, p_values [R, 1] rows; m_visible [R, M].

    bfloat16 is multiplied as tf32, which holds it exactly and rounds probabilities less.
    """
    k = tl.load(p_keys + d_keys[None, :], mask=m_tokens[:, None] & (d_keys < D)[None, :], other=0.0).to(DTYPE)
    logits = _logits(tl.dot(k, q.to(DTYPE), input_precision=PRECISION) * scaling, softcap, SOFTCAP)
    p, peak, total, factor = _update(tl.where(m_visible, logits, float("-inf")), peak, total)
    v = tl.load(p_values + d_values[None, :], mask=m_tokens[:, None] & (d_values < DV)[None, :], other=0.0).to(DTYPE)
    acc = tl.dot(tl.trans(v), p.to(DTYPE), acc * factor[None, :], input_precision=PRECISION)
    return peak, total, acc


@triton.constexpr_function
def chunks_in(spec, group):
    return spec.groups[group].chunks


@triton.constexpr_function
def block_of(spec, group):
    return spec.groups[group].block


@triton.jit
def _load_query(
    p_rotated, row, m_row, unit, GROUP: tl.constexpr, D: tl.constexpr, r: tl.constexpr, DTYPE: tl.constexpr
):
    """Chunk r of a group's channels of the rotated queries: [chunk, M]."""
    c = r * GROUP.chunk + tl.arange(0, GROUP.chunk)
    o_chunk = row[None, :] * D + (GROUP.start + c)[:, None]
    chunk = tl.load(p_rotated + o_chunk, mask=m_row[None, :] & (c < GROUP.size)[:, None], other=0.0)
    return (chunk / unit[None, :]).to(DTYPE)


@triton.jit
def _score_group(
    p_rows, p_scale, p_levels, qs, KEYS: tl.constexpr, g: tl.constexpr,
    T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What one group of channels adds to the scores of a tile: [BLOCK_T, M]."""
    GROUP: tl.constexpr = group_of(KEYS, g)
    CHUNKS: tl.constexpr = GROUP.chunks
    t = tl.arange(0, BLOCK_T)
    dots = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
    for r in tl.static_range(CHUNKS):
        k = decode_levels(unpack_chunk(p_rows + GROUP.offset, GROUP, r), p_levels, GROUP, DTYPE)
        dots = tl.dot(k, qs[GROUP.first_chunk + r], dots, input_precision="ieee")
    scale = load_scales(p_scale + t, t < T, KEYS.shift) * GROUP.lead
    return dots * scale[:, None]


@triton.jit
def _decode_values(
    p, p_tile, p_scale, p_levels, acc, scale_unit,
    GROUP: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [channels, M] + (V^T p^T) * scale_unit for one group of one tile; p [BLOCK_T, M]."""
    CHUNKS: tl.constexpr = GROUP.chunks
    t = tl.arange(0, BLOCK_T)
    scale = load_scales(p_scale + t, t < T, SHIFT) * (GROUP.lead * scale_unit)
    w = tl.clamp(p * scale[:, None], -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)
    parts = _halves(w, CHUNKS, BLOCK_M)
    channel = tl.minimum(tl.arange(0, GROUP.block), GROUP.size - 1)
    p_rows = p_tile + GROUP.offset + channel[:, None] * GROUP.row_bytes
    for r in tl.static_range(CHUNKS):
        v = decode_levels(unpack_chunk(p_rows, GROUP, r), p_levels, GROUP, DTYPE)
        acc = tl.dot(v, parts[r], acc, input_precision="ieee")
    return acc


@triton.jit
def _store_group(p_out, o_row, m_row, acc, GROUP: tl.constexpr):
    c = tl.arange(0, GROUP.block)
    o_out = o_row[None, :] + (GROUP.start + c)[:, None]
    tl.store(p_out + o_out, acc, mask=m_row[None, :] & (c < GROUP.size)[:, None])


@announces
@triton.jit(
    do_not_specialize=[
        "kc_b", "kc_h", "kc_n", "ks_b", "ks_h", "ks_n", "km_b", "km_h", "km_n", "vc_b", "vc_h", "vc_n", "vs_b", "vs_h",
        "vs_n", "vm_b", "vm_h", "vm_n", "sk_b", "sk_h", "sk_t", "sv_b", "sv_h", "sv_t", "tk_b", "tk_h", "tk_t", "tv_b",
        "tv_h", "tv_t", "mask_b", "tiles", "tiles_per_split", "splits", "tail", "raw_tokens", "ring", "M", "Q",
    ],
    do_not_specialize_on_alignment=["p_key_gain", "p_value_gain", "p_starts", "p_mask", "p_counts"],
)  # fmt: skip
def _split_kernel(
    p_rotated, p_query, p_key_codes, p_key_scale, p_key_mean, p_value_codes, p_value_scale, p_value_mean,
    p_key_levels, p_value_levels, p_key_gain, p_value_gain, p_sink_keys, p_sink_values, p_tail_keys, p_tail_values,
    p_starts, p_mask, p_counts, p_out, p_raw_out, p_peak, p_total,
    kc_b: tl.int64, kc_h: tl.int64, kc_n, ks_b: tl.int64, ks_h: tl.int64, ks_n, km_b: tl.int64, km_h: tl.int64, km_n,
    vc_b: tl.int64, vc_h: tl.int64, vc_n, vs_b: tl.int64, vs_h: tl.int64, vs_n, vm_b: tl.int64, vm_h: tl.int64, vm_n,
    sk_b: tl.int64, sk_h: tl.int64, sk_t, sv_b: tl.int64, sv_h: tl.int64, sv_t,
    tk_b: tl.int64, tk_h: tl.int64, tk_t, tv_b: tl.int64, tv_h: tl.int64, tv_t, mask_b: tl.int64,
    tiles, tiles_per_split, splits, tail, raw_tokens, ring, M, Q, scaling, softcap, sparse_v_threshold,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, T: tl.constexpr,
    S: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DTYPE: tl.constexpr, RAW_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, KEY_GAIN: tl.constexpr, VALUE_GAIN: tl.constexpr, KEY_MEAN: tl.constexpr,
    VALUE_MEAN: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    CAUSAL_TILES: tl.constexpr, SPARSE: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    parts = tl.num_programs(1)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = m < M
    if COUNTS:
        tiles = tl.load(p_counts)
        tail = tl.load(p_counts + 1) - tiles * T
        tiles_per_split = (tiles + splits - 1) // splits
    length = tiles * T + tail
    newest = length - Q + m % Q
    start = tl.load(p_starts + b).to(tl.int32)

    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    row = head.to(tl.int64) * M + m
    o_query = row[None, :] * D + d[:, None]
    m_query = m_row[None, :] & (d < D)[:, None]
    q = tl.load(p_query + o_query, mask=m_query, other=0.0)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    raw = tl.zeros((BLOCK_DV, BLOCK_M), tl.float32)

    if split < splits:
        # Half precision wants queries near 1: the largest of a row goes to the factor of its scores.
        unit = tl.full((BLOCK_M,), 1.0, tl.float32)
        if DTYPE == tl.float16:
            rotated = tl.load(p_rotated + o_query, mask=m_query, other=0.0)
            unit = tl.maximum(tl.max(tl.abs(rotated), axis=0), 1e-30)
        score_unit = unit * (scaling * KEYS.unit)
        if KEY_GAIN:
            score_unit *= tl.load(p_key_gain + head)
        qs = ()
        accs = ()
        for g in tl.static_range(group_count(KEYS)):
            for r in tl.static_range(chunks_in(KEYS, g)):
                qs = qs + (_load_query(p_rotated, row, m_row, unit, group_of(KEYS, g), D, r, DTYPE),)
        for g in tl.static_range(group_count(VALUES)):
            accs = accs + (tl.zeros((block_of(VALUES, g), BLOCK_M), tl.float32),)

        p_key_codes += head_offset(b, h, kc_b, kc_h, KEYS.nbytes)
        p_key_scale += head_offset(b, h, ks_b, ks_h, T)
        p_value_codes += head_offset(b, h, vc_b, vc_h, VALUES.nbytes)
        p_value_scale += head_offset(b, h, vs_b, vs_h, T)
        t = tl.arange(0, BLOCK_T)
        first = start + S
        low = split * tiles_per_split
        high = tl.minimum(low + tiles_per_split, tiles)
        low = tl.maximum(low, tl.minimum(first // T, high))
        # So do values: their scales are taken relative to those of the first tile read.
        value_unit = tl.full((), 1.0, tl.float32)
        if DTYPE == tl.float16:
            if low < high:
                p_first = p_value_scale + row_offset(low.to(tl.int64), vs_n, T)
                value_unit = tl.max(load_scales(p_first + t, t < T, VALUES.shift), axis=0)
                value_unit = tl.maximum(value_unit, 1e-6) / 16.0

        for tile in range(low, high):
            n = tl.cast(tile, tl.int64)
            p_rows = p_key_codes + row_offset(n, kc_n, KEYS.nbytes) + (tl.minimum(t, T - 1) * KEYS.row_bytes)[:, None]
            scores = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
            for g in tl.static_range(group_count(KEYS)):
                p_scale = p_key_scale + row_offset(n, ks_n, T) + g * T
                scores += _score_group(p_rows, p_scale, p_key_levels, qs, KEYS, g, T, BLOCK_T, BLOCK_M, DTYPE)
            scores *= score_unit[None, :]
            if KEY_MEAN:
                p_mean = p_key_mean + head_offset(b, h, km_b, km_h, D) + row_offset(n, km_n, D)
                mean = tl.load(p_mean + d, mask=d < D, other=0.0).to(tl.float32)
                scores += (tl.sum(q.to(tl.float32) * mean[:, None], axis=0) * scaling)[None, :]
            logits = _logits(scores, softcap, SOFTCAP)

            position = tile * T + t
            visible = (position >= first) & (t < T)
            if MASK:
                visible &= tl.load(p_mask + b * mask_b + position, mask=t < T, other=0) != 0
            if CAUSAL_TILES:
                logits = tl.where(position[:, None] <= newest[None, :], logits, float("-inf"))
            logits = tl.where(visible[:, None], logits, float("-inf"))
            p, peak, total, factor = _update(logits, peak, total)

            p_tile = p_value_codes + row_offset(n, vc_n, VALUES.nbytes)
            p_scale = p_value_scale + row_offset(n, vs_n, T)
            new = ()
            for g in tl.static_range(group_count(VALUES)):
                acc = accs[g] * factor[None, :]
                if SPARSE:
                    if tl.max(tl.max(p, axis=0), axis=0) >= sparse_v_threshold:
                        acc = _decode_values(
                            p, p_tile, p_scale + g * T, p_value_levels, acc, 1.0 / value_unit,
                            group_of(VALUES, g), VALUES.shift, T, BLOCK_T, BLOCK_M, DTYPE,
                        )  # fmt: skip
                else:
                    acc = _decode_values(
                        p, p_tile, p_scale + g * T, p_value_levels, acc, 1.0 / value_unit,
                        group_of(VALUES, g), VALUES.shift, T, BLOCK_T, BLOCK_M, DTYPE,
                    )  # fmt: skip
                new = new + (acc,)
            accs = new
            if VALUE_MEAN:
                p_mean = p_value_mean + head_offset(b, h, vm_b, vm_h, DV) + row_offset(n, vm_n, DV)
                mean = tl.load(p_mean + dv, mask=dv < DV, other=0.0).to(tl.float32)
                raw = raw * factor[None, :] + mean[:, None] * tl.sum(p, axis=0)[None, :]

        o_row = ((head.to(tl.int64) * splits + split) * M + m) * DV
        out_unit = value_unit * VALUES.unit
        if VALUE_GAIN:
            out_unit *= tl.load(p_value_gain + head)
        for g in tl.static_range(group_count(VALUES)):
            _store_group(p_out, o_row, m_row, accs[g] * out_unit, group_of(VALUES, g))
    else:
        r = tl.arange(0, BLOCK_R)
        low = (split - splits) * raw_tokens
        if low == 0:
            p_keys = p_sink_keys + head_offset(b, h, sk_b, sk_h, D)
            p_values = p_sink_values + head_offset(b, h, sv_b, sv_h, DV)
            for block in tl.static_range((S + BLOCK_R - 1) // BLOCK_R):
                slot = block * BLOCK_R + r
                position = start + slot
                seen = (slot < S) & (position < tiles * T)
                if MASK:
                    seen &= tl.load(p_mask + b * mask_b + position, mask=seen, other=0) != 0
                peak, total, raw = _raw_step(
                    p_keys + row_offset(slot, sk_t, D)[:, None], p_values + row_offset(slot, sv_t, DV)[:, None],
                    d, dv, slot < S,
                    seen[:, None] & (position[:, None] <= newest[None, :]), q, peak, total, raw,
                    scaling, softcap, SOFTCAP, D, DV, RAW_DTYPE, PRECISION,
                )  # fmt: skip
        p_keys = p_tail_keys + head_offset(b, h, tk_b, tk_h, D)
        p_values = p_tail_values + head_offset(b, h, tv_b, tv_h, DV)
        for block in range(low, tl.minimum(low + raw_tokens, tail), BLOCK_R):
            slot = block + r
            position = tiles * T + slot
            seen = (slot < tail) & (position >= start)
            if MASK:
                seen &= tl.load(p_mask + b * mask_b + position, mask=slot < tail, other=0) != 0
            wide = (position % ring if COUNTS else slot).to(tl.int64)
            peak, total, raw = _raw_step(
                p_keys + row_offset(wide, tk_t, D)[:, None], p_values + row_offset(wide, tv_t, DV)[:, None],
                d, dv, slot < tail,
                seen[:, None] & (position[:, None] <= newest[None, :]), q, peak, total, raw,
                scaling, softcap, SOFTCAP, D, DV, RAW_DTYPE, PRECISION,
            )  # fmt: skip

    o_stat = (head.to(tl.int64) * parts + split) * M + m
    tl.store(p_peak + o_stat, peak, mask=m_row)
    tl.store(p_total + o_stat, total, mask=m_row)
    raw_first = splits
    if VALUE_MEAN:
        raw_first = 0
    if split >= raw_first:
        o_row = ((head.to(tl.int64) * (parts - raw_first) + split - raw_first) * M + m) * DV
        tl.store(p_raw_out + o_row[None, :] + dv[:, None], raw, mask=m_row[None, :] & (dv < DV)[:, None])


@announces
@triton.jit(do_not_specialize=["splits", "parts", "raw_first", "M", "Q"])
def _merge_kernel(
    p_part, p_raw_part, p_peak, p_total, p_aux, p_out, p_raw_out, splits, parts, raw_first, M, Q,
    H: tl.constexpr, DV: tl.constexpr, AUX: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_DV)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    packed = tl.zeros((BLOCK_DV,), tl.float32)
    raw = tl.zeros((BLOCK_DV,), tl.float32)
    for low in range(0, parts, BLOCK_S):
        part = low + s
        o_stat = (head * parts + part) * M + m
        peaks = tl.load(p_peak + o_stat, mask=part < parts, other=float("-inf"))
        totals = tl.load(p_total + o_stat, mask=part < parts, other=0.0)
        new = tl.maximum(peak, tl.max(peaks, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(peaks - safe)
        factor = tl.exp2(peak - safe)
        o_part = ((head * splits + part) * M + m) * DV
        rows = tl.load(
            p_part + o_part[:, None] + d[None, :], mask=(part < splits)[:, None] & (d < DV)[None, :], other=0.0
        )
        packed = packed * factor + tl.sum(rows * weight[:, None], axis=0)
        o_part = ((head * (parts - raw_first) + part - raw_first) * M + m) * DV
        m_part = (part >= raw_first) & (part < parts)
        rows = tl.load(p_raw_part + o_part[:, None] + d[None, :], mask=m_part[:, None] & (d < DV)[None, :], other=0.0)
        raw = raw * factor + tl.sum(rows * weight[:, None], axis=0)
        total = total * factor + tl.sum(totals * weight, axis=0)
        peak = new
    if AUX:
        aux = tl.load(p_aux + head % H * (M // Q) + m // Q).to(tl.float32) * LOG2E
        new = tl.maximum(peak, aux)
        factor = tl.exp2(peak - new)
        total = total * factor + tl.exp2(aux - new)
        packed *= factor
        raw *= factor
    scale = tl.where(total == 0.0, 0.0, 1.0 / total)  # a NaN stays one
    o_out = (head * M + m) * DV + d
    tl.store(p_out + o_out, packed * scale, mask=d < DV)
    tl.store(p_raw_out + o_out, raw * scale, mask=d < DV)


def decode_attention(
    query: torch.Tensor,
    keys: PackedSide,
    values: PackedSide,
    sinks: RawTokens,
    tail: RawTokens,
    starts: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sparse_v_threshold: float = 0.0,
    num_splits: int | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Equivalent to `reference.decode_attention`, with products in half precision unless the query is float32.

    Args:
        sparse_v_threshold: values of a tile are not read where all its probabilities, relative to the largest seen
            so far by the same program, are below it; 0 reads everything.
        num_splits: programs that share the tiles of a KV head; None fills the device.
        Others as in the reference.
    """
    batch, query_heads, count, dim = query.shape
    heads, tiles, tile = keys.codes.shape[1], keys.codes.shape[2], keys.scale.shape[-1]
    rows = query.reshape(batch, heads, query_heads // heads * count, dim).contiguous()
    m, value_dim = rows.shape[2], tail.values.shape[3]
    device = query.device
    single = query.dtype == torch.float32
    rotated = keys.rotate_query(rows).contiguous()
    key_spec = tile_spec(keys.groups, tile, keys.scale_format, channel_major=False, exact=single)
    value_spec = tile_spec(values.groups, tile, values.scale_format, channel_major=True, exact=single)

    block_m = min(MAX_ROWS, padded_size(m))
    row_blocks = triton.cdiv(m, block_m)
    if num_splits is None:
        num_splits = _fill(device) // (batch * heads * row_blocks)
    per_split = triton.cdiv(tiles, max(1, min(num_splits, tiles)))
    splits = triton.cdiv(tiles, per_split) if tiles else 0
    length = tail.keys.shape[2]
    parts = splits + max(1, triton.cdiv(length, RAW_TOKENS))
    raw_first = 0 if values.mean is not None else splits

    empty = {"dtype": torch.float32, "device": device}
    part = torch.empty((batch * heads, splits, m, value_dim), **empty)
    raw_part = torch.empty((batch * heads, parts - raw_first, m, value_dim), **empty)
    peak, total = torch.empty((2, batch * heads, parts, m), **empty)
    packed, raw = torch.empty((2, batch, heads, m, value_dim), **empty)

    packed_sides = [_inner_contiguous(side) for side in (keys, values)]
    tensors = [x for side in packed_sides for x in side]
    raws = [rows_contiguous(x) for x in (sinks.keys, sinks.values, tail.keys, tail.values)]
    none = starts
    mask = mask if mask is None or mask.stride(1) == 1 else mask.contiguous()
    gains = [None if side.gain is None else side.gain.contiguous() for side in (keys, values)]
    key_levels, value_levels = level_table(keys.groups, device), level_table(values.groups, device)
    _split_kernel[(batch * heads, parts, row_blocks)](
        rotated, rows, *(none if x is None else x for x in tensors), key_levels, value_levels,
        *(none if x is None else x for x in gains), *raws, starts,
        none if mask is None else mask.view(torch.uint8), none if counts is None else counts,
        part, raw_part, peak, total,
        *(stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        *(stride for x in raws for stride in x.stride()[:3]), 0 if mask is None else mask.stride(0),
        tiles, per_split, splits, length, RAW_TOKENS, length, m, count,
        float(scaling), float(softcap or 1.0), float(sparse_v_threshold),
        H=heads, D=dim, DV=value_dim, T=tile, S=sinks.keys.shape[2],
        KEYS=key_spec, VALUES=value_spec, KEY_GAIN=keys.gain is not None, VALUE_GAIN=values.gain is not None,
        BLOCK_M=block_m, BLOCK_T=padded_size(tile), BLOCK_R=BLOCK_RAW,
        BLOCK_D=padded_size(dim), BLOCK_DV=padded_size(value_dim), DTYPE=tl.float32 if single else tl.float16,
        RAW_DTYPE=tl.float16 if tail.keys.dtype == torch.float16 else tl.float32,
        PRECISION="ieee" if single else "tf32",
        KEY_MEAN=keys.mean is not None, VALUE_MEAN=values.mean is not None,
        MASK=mask is not None, SOFTCAP=softcap is not None, CAUSAL_TILES=counts is None and length < count,
        SPARSE=sparse_v_threshold > 0.0, COUNTS=counts is not None,
        **_launch(dim, block_m, (*key_spec.groups, *value_spec.groups)),
    )  # fmt: skip
    _merge_kernel[(batch * heads, m)](
        part, raw_part, peak, total, none if s_aux is None else s_aux.contiguous(), packed, raw,
        splits, parts, raw_first, m, count,
        H=heads, DV=value_dim, AUX=s_aux is not None, BLOCK_S=16,
        BLOCK_DV=padded_size(value_dim),
    )  # fmt: skip
    out = values.unrotate(packed).add_(raw)
    return out.reshape(batch, query_heads, count, value_dim).to(query.dtype)


def _inner_contiguous(side: PackedSide) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scale and mean with their per-tile entries contiguous; a capacity-strided view is left as it is."""
    scale = rows_contiguous(side.scale) if side.scale.stride(3) == side.scale.shape[4] else side.scale.contiguous()
    return rows_contiguous(side.codes), scale, None if side.mean is None else rows_contiguous(side.mean)


def _fill(device: torch.device) -> int:
    """How many programs keep the device busy: two a multiprocessor."""
    if device.type != "cuda":
        return INTERPRETER_SPLITS * 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _launch(dim: int, block_m: int, groups: tuple[GroupSpec, ...]) -> dict[str, int]:
    # A pipelined table look-up is staged in shared memory like any load, more of it than an A100 has.
    return {
        "num_warps": 8 if dim > 128 or block_m > 32 else 4,
        "num_stages": 2 if all(group.coefficients for group in groups) else 1,
    }
