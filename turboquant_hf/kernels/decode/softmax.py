"""Online softmax over a matrix tile of scores, in base 2, and attention to raw tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.kernels.common.addresses import row_offset

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def logits_of(scores, softcap, SOFTCAP: tl.constexpr):
    """Scaled scores to base-2 logits."""
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
    return scores * LOG2E


@triton.jit
def update(logits, peak, total):
    """One step of the online softmax over columns: probabilities, new peak, new total, factor of the earlier sums."""
    new = tl.maximum(peak, tl.max(logits, axis=0))
    safe = tl.where(new == float("-inf"), 0.0, new)
    factor = tl.exp2(peak - safe)
    p = tl.exp2(logits - safe[None, :])
    return p, new, total * factor + tl.sum(p, axis=0), factor


@triton.jit
def raw_step(
    p_keys, p_values, key_t, value_t, slot, m_tokens, seen, position, newest, d_keys, d_values, q, peak, total, acc,
    scaling, softcap, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to a block of R raw tokens of one head, which lie in the slots `slot` [R] at the positions `position`.

    `m_tokens` says which of them exist, `seen` which of those are neither masked nor padding. Row m of the queries
    q [D, M] sees tokens up to the position newest[m].

    bfloat16 is multiplied as tf32, which holds it exactly and rounds probabilities less.
    """
    p_key = p_keys + row_offset(slot, key_t, D)[:, None]
    p_value = p_values + row_offset(slot, value_t, DV)[:, None]
    m_visible = seen[:, None] & (position[:, None] <= newest[None, :])
    k = tl.load(p_key + d_keys[None, :], mask=m_tokens[:, None] & (d_keys < D)[None, :], other=0.0).to(DTYPE)
    logits = logits_of(tl.dot(k, q.to(DTYPE), input_precision=PRECISION) * scaling, softcap, SOFTCAP)
    p, peak, total, factor = update(tl.where(m_visible, logits, float("-inf")), peak, total)
    v = tl.load(p_value + d_values[None, :], mask=m_tokens[:, None] & (d_values < DV)[None, :], other=0.0).to(DTYPE)
    acc = tl.dot(tl.trans(v), p.to(DTYPE), acc * factor[None, :], input_precision=PRECISION)
    return peak, total, acc
