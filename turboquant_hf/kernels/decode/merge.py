"""Triton kernel that merges the parts of `split` by their log-sum-exp.

    peak   = max over parts (and s_aux)
    weight = 2^(peak of the part - peak)
    output = (sum of weight * sums of the part) / (sum of weight * total of the part + 2^(s_aux - peak))

- One program merges one query row of one KV head.
- Sums over packed tiles are still rotated. They are kept apart from sums over raw tokens.
- A row that saw no token gives zeros.
"""

from __future__ import annotations

import triton.language as tl

from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.decode.softmax import LOG2E


@kernel()
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
