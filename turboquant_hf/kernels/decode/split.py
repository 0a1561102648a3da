"""Triton kernel of attention over one part of the tokens: a run of packed tiles, or a run of raw tokens.

    scores = scaling * (levels . q') * scale + q . mean         packed tokens, per group of channels (`tiles`)
    scores = scaling * k . q                                    raw tokens (`softmax.raw_step`)
    p      = 2^(scores * log2(e) - peak)                        peak: the part's largest logit per query row
    sums   = sum of p * scale * levels, or of p * v             total = sum of p

- The grid is (sequences * KV heads, parts, blocks of query rows). Parts below `splits` are runs of tiles.
- A program takes up to 64 query rows of one KV head, in one matrix tile.
- A program leaves sums, peak and total of its part in memory. `merge` adds the parts up.
- With COUNTS, the numbers of tiles and tokens are read on the device, and the tail is a ring.
- Products in half precision need numbers near 1. A query row is therefore divided by its largest element, and scales of
  values by those of the first tile.
"""

from __future__ import annotations

import triton.language as tl

from turboquant_hf.kernels.common.addresses import head_offset
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.spec import group_count, group_of
from turboquant_hf.kernels.decode.softmax import logits_of, raw_step, update
from turboquant_hf.kernels.decode.tiles import (
    add_values,
    block_of,
    largest_scale,
    load_mean,
    load_queries,
    score_tile,
    store_group,
)


@kernel("p_key_gain", "p_value_gain", "p_starts", "p_mask", "p_counts")
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
        # Half precision needs queries near 1: the largest element of a row becomes a factor of its scores.
        unit = tl.full((BLOCK_M,), 1.0, tl.float32)
        if DTYPE == tl.float16:
            rotated = tl.load(p_rotated + o_query, mask=m_query, other=0.0)
            unit = tl.maximum(tl.max(tl.abs(rotated), axis=0), 1e-30)
        score_unit = unit * (scaling * KEYS.unit)
        if KEY_GAIN:
            score_unit *= tl.load(p_key_gain + head)
        qs = load_queries(p_rotated, row, m_row, unit, KEYS, D, DTYPE)
        accs = ()
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
        # Probabilities times scales of values need it, too: they are divided by the largest scale of the first tile.
        value_unit = tl.full((), 1.0, tl.float32)
        if DTYPE == tl.float16:
            if low < high:
                value_unit = largest_scale(p_value_scale, low.to(tl.int64), vs_n, VALUES.shift, T, BLOCK_T)
                value_unit = tl.maximum(value_unit, 1e-6) / 16.0

        for tile in range(low, high):
            n = tl.cast(tile, tl.int64)
            scores = score_tile(
                p_key_codes, p_key_scale, p_key_levels, qs, n, kc_n, ks_n, KEYS, T, BLOCK_T, BLOCK_M, DTYPE
            )
            scores *= score_unit[None, :]
            if KEY_MEAN:
                mean = load_mean(p_key_mean + head_offset(b, h, km_b, km_h, D), n, km_n, d, D)
                scores += (tl.sum(q.to(tl.float32) * mean[:, None], axis=0) * scaling)[None, :]
            logits = logits_of(scores, softcap, SOFTCAP)

            position = tile * T + t
            visible = (position >= first) & (t < T)
            if MASK:
                visible &= tl.load(p_mask + b * mask_b + position, mask=t < T, other=0) != 0
            if CAUSAL_TILES:
                logits = tl.where(position[:, None] <= newest[None, :], logits, float("-inf"))
            logits = tl.where(visible[:, None], logits, float("-inf"))
            p, peak, total, factor = update(logits, peak, total)

            accs = add_values(
                p, factor, accs, p_value_codes, p_value_scale, p_value_levels, n, vc_n, vs_n, value_unit,
                sparse_v_threshold, VALUES, T, BLOCK_T, BLOCK_M, DTYPE, SPARSE,
            )  # fmt: skip
            if VALUE_MEAN:
                mean = load_mean(p_value_mean + head_offset(b, h, vm_b, vm_h, DV), n, vm_n, dv, DV)
                raw = raw * factor[None, :] + mean[:, None] * tl.sum(p, axis=0)[None, :]

        o_row = ((head.to(tl.int64) * splits + split) * M + m) * DV
        out_unit = value_unit * VALUES.unit
        if VALUE_GAIN:
            out_unit *= tl.load(p_value_gain + head)
        for g in tl.static_range(group_count(VALUES)):
            store_group(p_out, o_row, m_row, accs[g] * out_unit, group_of(VALUES, g))
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
                peak, total, raw = raw_step(
                    p_keys, p_values, sk_t, sv_t, slot, slot < S, seen, position, newest, d, dv, q, peak, total, raw,
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
            place = (position % ring if COUNTS else slot).to(tl.int64)
            peak, total, raw = raw_step(
                p_keys, p_values, tk_t, tv_t, place, slot < tail, seen, position, newest, d, dv, q, peak, total, raw,
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
