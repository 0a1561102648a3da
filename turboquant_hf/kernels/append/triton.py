"""Triton: one launch stores the tokens of a step and counts them on the device.

    position p                     length, length + 1, ..., length + q - 1
    ring[p % R]      = new row     where p < max_len
    sinks[p - start] = new row     where 0 <= p - start < S
    length           = min(length + q, max_len)

- One program writes the rows of one KV head, token by token.
- The host does not know `length`, so a recorded step can be replayed.
- The last program to draw the ticket changes `length`, because all others have read it by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.append.reference import FixedTokens
from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous
from turboquant_hf.kernels.common.kernel import kernel


@triton.jit
def _store_rows(p_new, p_ring, p_sinks, d, m_d, slot, sink, m_token, m_sink, q, new_q, D: tl.constexpr):
    row = tl.load(p_new + row_offset(q, new_q, D) + d, mask=m_d & m_token, other=0.0)
    tl.store(p_ring + slot * D + d, row, mask=m_d & m_token)
    tl.store(p_sinks + sink * D + d, row, mask=m_d & m_token & m_sink)


@kernel("p_starts", "p_counts", "p_ticket")
def _append_kernel(
    p_keys, p_values, p_ring_keys, p_ring_values, p_sink_keys, p_sink_values, p_starts, p_counts, p_ticket,
    key_b: tl.int64, key_h: tl.int64, key_q, value_b: tl.int64, value_h: tl.int64, value_q, max_len, Q, R,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b = head // H
    h = head % H
    length = tl.load(p_counts + 1)
    start = tl.load(p_starts + b).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for q in range(Q):
        position = length + q
        slot = position % R
        sink = position - start
        m_sink = (sink >= 0) & (sink < S)
        _store_rows(
            p_keys + head_offset(b, h, key_b, key_h, D), p_ring_keys + head * R * D, p_sink_keys + head * S * D,
            d, d < D, slot, sink, position < max_len, m_sink, q, key_q, D,
        )  # fmt: skip
        _store_rows(
            p_values + head_offset(b, h, value_b, value_h, DV), p_ring_values + head * R * DV,
            p_sink_values + head * S * DV, dv, dv < DV, slot, sink, position < max_len, m_sink, q, value_q, DV,
        )  # fmt: skip
    # The last program counts the tokens: all others have read the length by then.
    tl.debug_barrier()
    if tl.atomic_add(p_ticket, 1) == tl.num_programs(0) - 1:
        tl.store(p_ticket, 0)
        tl.store(p_counts + 1, tl.minimum(length + Q, max_len))


def append_tokens(keys: torch.Tensor, values: torch.Tensor, held: FixedTokens) -> None:
    """Equivalent to `reference.append_tokens`. Ring and sinks must be contiguous."""
    batch, heads, count, dim = keys.shape
    value_dim, ring, sinks = values.shape[3], held.ring, held.sinks
    keys, values = rows_contiguous(keys), rows_contiguous(values)
    _append_kernel[(batch * heads,)](
        keys, values, ring.keys, ring.values, sinks.keys, sinks.values, held.starts, held.counts, held.ticket,
        *keys.stride()[:3], *values.stride()[:3], held.max_len, count, ring.keys.shape[2],
        H=heads, D=dim, DV=value_dim, S=sinks.keys.shape[2],
        BLOCK_D=triton.next_power_of_2(dim), BLOCK_DV=triton.next_power_of_2(value_dim), num_warps=1,
    )  # fmt: skip
