"""Triton kernels of `due`: nothing waits for the host, and a step that nothing is due in leaves at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.means import masked_mean
from turboquant_hf.kernels.common.spec import padded_size
from turboquant_hf.kernels.decode.inputs import RawTokens
from turboquant_hf.kernels.schedule import Schedule
from turboquant_hf.kernels.statistics.due import FitRule, QuerySums
from turboquant_hf.kernels.statistics.triton import borrowed, sum_of_squares, write_state


@kernel("p_count", "p_seen", "p_counts", "p_fitted", "p_starts")
def _observe_kernel(
    p_query, p_energy, p_count, p_seen, p_counts, p_fitted, p_starts, q_b: tl.int64, q_h: tl.int64, q_t,
    H, GROUP, TOKENS,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    if tl.load(p_fitted + h) != 0:
        return
    d = tl.arange(0, BLOCK_D)
    first = tl.maximum(tl.load(p_starts + b).to(tl.int32) - (tl.load(p_counts + 1) - TOKENS), 0)
    p_rows = p_query + head_offset(b, h * GROUP, q_b, q_h, D)
    sum = sum_of_squares(p_rows, first, TOKENS, q_t, GROUP, q_h, D, BLOCK_T, BLOCK_D)
    p_sum = p_energy + head * D + d
    tl.store(p_sum, tl.load(p_sum, mask=d < D, other=0.0) + sum, mask=d < D)
    tl.store(p_count + head, tl.load(p_count + head) + tl.maximum(TOKENS - first, 0) * GROUP)
    if b == 0:
        tl.store(p_seen + h, tl.load(p_seen + h) + TOKENS)


def observe_due(query: torch.Tensor, sums: QuerySums, schedule: Schedule) -> None:
    """Equivalent to `due.observe_due`. One program per head: for steps of few tokens."""
    query = rows_contiguous(query)
    (batch, query_heads, tokens, dim), heads = query.shape, sums.energy.shape[1]
    _observe_kernel[(batch * heads,)](
        query, sums.energy, sums.count, sums.seen, schedule.counts, schedule.fitted, schedule.starts,
        *query.stride()[:3], heads, query_heads // heads, tokens, D=dim, BLOCK_T=16, BLOCK_D=padded_size(dim),
    )  # fmt: skip


@triton.jit
def _ring_energy(
    p_rows, row_stride, start, whole, T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    """`tile_energy` of one head's first `whole` tiles [BLOCK_D]; positions below `start` do not count."""
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    energy = tl.zeros((BLOCK_D,), tl.float32)
    for n in range(0, whole):
        row = n * T + t
        p_x = p_rows + row_offset(row, row_stride, D)[:, None] + d[None, :]
        x = tl.load(p_x, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        weight = ((t < T) & (row >= start)).to(tl.float32)
        if CENTER:
            x -= masked_mean(x, weight, T, True).to(tl.float32)[None, :]
        energy += tl.sum(x * x * weight[:, None], axis=0)
    return energy


@triton.jit
def _write_gains(
    p_rows, p_starts, p_gain, r_b, r_h, r_t, B, H, SINKS, whole,
    T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """`reference.typical_scale` of one head of all sequences, rounded down to a power of two where POWER."""
    h = tl.program_id(0).to(tl.int64)
    pooled = 0.0
    pooled_count = 0.0
    for b in range(0, B):
        start = tl.load(p_starts + b).to(tl.int32) + SINKS
        number = tl.maximum(whole * T - start, 0).to(tl.float32)
        energy = _ring_energy(p_rows + head_offset(b, h, r_b, r_h, D), r_t, start, whole, T, D, BLOCK_T, BLOCK_D, False)
        energy = tl.sum(energy, axis=0)
        tl.store(p_gain + b * H + h, energy)  # until all sequences have been seen
        pooled += tl.where(energy < float("inf"), energy, 0.0)
        pooled_count += tl.where(energy < float("inf"), number, 0.0)
    tl.debug_barrier()
    for b in range(0, B):
        number = tl.maximum(whole * T - (tl.load(p_starts + b).to(tl.int32) + SINKS), 0).to(tl.float32)
        energy = tl.load(p_gain + b * H + h)
        tl.debug_barrier()  # some threads would read what others write below
        rms = tl.sqrt(borrowed(energy, number, pooled, pooled_count) / D)
        gain = tl.where(rms == 0.0, 1.0, rms)
        if POWER:
            exponent = gain.to(tl.int32, bitcast=True) & 0x7F800000
            gain = tl.where(gain == gain, exponent.to(tl.float32, bitcast=True), gain)
        tl.store(p_gain + b * H + h, gain)


@kernel("p_count", "p_seen", "p_counts", "p_fitted", "p_starts")
def _fit_kernel(
    p_keys, p_values, p_energy, p_count, p_seen, p_counts, p_fitted, p_starts, p_balance, p_order, p_key_gain,
    p_value_gain, k_b: tl.int64, k_h: tl.int64, k_t, v_b: tl.int64, v_h: tl.int64, v_t,
    B, H, WINDOW, SINKS, MINIMUM, PATIENCE,
    T: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, CENTER: tl.constexpr, SIZES: tl.constexpr, BALANCE: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, KEY_POWER: tl.constexpr, VALUE_POWER: tl.constexpr,
):  # fmt: skip
    """KEYS: "balance", "gain" or "none"; VALUES: "gain" or "none". One program takes one head of all sequences."""
    h = tl.program_id(0).to(tl.int64)
    length = tl.load(p_counts + 1)
    least = length
    for b in range(0, B):
        least = tl.minimum(least, tl.load(p_starts + b).to(tl.int32))
    waits = (length - least < MINIMUM) & (length <= PATIENCE)
    if (tl.load(p_fitted + h) != 0) | (length < WINDOW + T) | waits:
        return
    whole = length // T
    d = tl.arange(0, BLOCK_K)
    pooled = tl.zeros((BLOCK_K,), tl.float32)
    query_pooled = tl.zeros((BLOCK_K,), tl.float32)
    pooled_count = tl.zeros((BLOCK_K,), tl.float32)
    query_pooled_count = 0.0
    for b in range(0, B):
        head = b * H + h
        start = tl.load(p_starts + b).to(tl.int32) + SINKS
        number = tl.maximum(whole * T - start, 0).to(tl.float32)
        if KEYS == "balance":
            p_rows = p_keys + head_offset(b, h, k_b, k_h, DK)
            energy = _ring_energy(p_rows, k_t, start, whole, T, DK, BLOCK_T, BLOCK_K, CENTER)
            # The place of the result keeps the sums until all sequences have been seen.
            tl.store(p_balance + head * DK + d, energy, mask=d < DK)
            pooled += tl.where(energy < float("inf"), energy, 0.0)
            pooled_count += tl.where(energy < float("inf"), number, 0.0)
            if BALANCE == "query":
                query_pooled += tl.load(p_energy + head * DK + d, mask=d < DK, other=0.0)
                query_pooled_count += tl.load(p_count + head)
    if KEYS == "gain":
        _write_gains(
            p_keys, p_starts, p_key_gain, k_b, k_h, k_t, B, H, SINKS, whole, T, DK, BLOCK_T, BLOCK_K, KEY_POWER
        )  # fmt: skip
    if VALUES == "gain":
        _write_gains(
            p_values, p_starts, p_value_gain, v_b, v_h, v_t, B, H, SINKS, whole, T, DV, BLOCK_T, BLOCK_V,
            VALUE_POWER,
        )  # fmt: skip
    if KEYS == "balance":
        tl.debug_barrier()
        known = 2 * tl.load(p_seen + h) >= length
        for b in range(0, B):
            head = b * H + h
            number = tl.maximum(whole * T - (tl.load(p_starts + b).to(tl.int32) + SINKS), 0).to(tl.float32)
            energy = tl.load(p_balance + head * DK + d, mask=d < DK, other=0.0)
            key = borrowed(energy, number, pooled, pooled_count)
            query = key
            if BALANCE == "query":
                count = tl.load(p_count + head)
                own = tl.load(p_energy + head * DK + d, mask=d < DK, other=0.0) / tl.maximum(count, 1.0)
                query = tl.where(count > 0, own, query_pooled / tl.maximum(query_pooled_count, 1.0))
            write_state(key, query, known, p_balance + head * DK, p_order + head * DK, DK, BLOCK_K, SIZES, BALANCE)
    tl.store(p_fitted + h, 1)


def fit_due(
    ring: RawTokens,
    sums: QuerySums,
    schedule: Schedule,
    rule: FitRule,
    states: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """Equivalent to `due.fit_due`."""
    (keys, values), (key_state, value_state) = (ring.keys, ring.values), states
    (batch, heads, _, dim), wide, tile = keys.shape, values.shape[-1], schedule.tile
    _fit_kernel[(heads,)](
        keys, values, sums.energy, sums.count, sums.seen, schedule.counts, schedule.fitted, schedule.starts,
        key_state.get("balance", keys), key_state.get("order", keys), key_state.get("gain", keys),
        value_state.get("gain", values), *keys.stride()[:3], *values.stride()[:3], batch, heads, schedule.window,
        schedule.sinks, rule.min_statistics, rule.patience,
        T=tile, DK=dim, DV=wide, BLOCK_T=padded_size(tile), BLOCK_K=padded_size(dim), BLOCK_V=padded_size(wide),
        CENTER=rule.center, SIZES=tuple(rule.sizes), BALANCE=rule.balance,
        KEYS="balance" if "balance" in key_state else "gain" if "gain" in key_state else "none",
        VALUES="gain" if "gain" in value_state else "none", KEY_POWER=rule.powers[0], VALUE_POWER=rule.powers[1],
        num_warps=8,
    )  # fmt: skip


@kernel("p_counts", "p_fitted")
def _advance_kernel(p_counts, p_fitted, WINDOW, T, CAPACITY):
    tiles = tl.load(p_counts)
    if (tl.load(p_fitted) != 0) & (tl.load(p_counts + 1) >= (tiles + 1) * T + WINDOW) & (tiles < CAPACITY):
        tl.store(p_counts, tiles + 1)


def advance_due(schedule: Schedule) -> None:
    """Equivalent to `due.advance_due`."""
    _advance_kernel[(1,)](
        schedule.counts, schedule.fitted, schedule.window, schedule.tile, schedule.capacity, num_warps=1
    )
