"""Triton kernel that encodes tiles: one program takes a run of tiles of one KV head and reads each once.

    mean    = mean over the tile's tokens                      (`common.means`)
    y       = A (balance * (x - mean))                         (`product`)
    codes   = nearest levels of y / rms(y), group by group     (`rounding`; along a trellis `in_words`)
    scale   = by the rule, from |y|, y and the levels
    bytes   = fields of the codes, added up                    (`packing`)

Codes, scales and means go straight to their place in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import TileCoding, tile_bytes
from turboquant_hf.kernels.common.addresses import head_offset, row_offset, rows_contiguous, tiles_per_program
from turboquant_hf.kernels.common.kernel import kernel
from turboquant_hf.kernels.common.means import masked_mean
from turboquant_hf.kernels.common.spec import (
    any_rows,
    group_block,
    group_count,
    group_of,
    padded_size,
    plane_count,
    tile_spec,
)
from turboquant_hf.kernels.common.tables import cell_table, level_table, pair_table, threshold_table
from turboquant_hf.kernels.encode import reference
from turboquant_hf.kernels.encode.dequantize import decode_tiles
from turboquant_hf.kernels.encode.in_words import fits, room_for_words, write_words
from turboquant_hf.kernels.encode.packing import pack_plane, pack_regular
from turboquant_hf.kernels.encode.product import (
    FULL,
    RAW,
    SPLIT,
    group_matrices,
    matrices_of,
    ones,
    operand,
    prepared,
    product,
    ranks,
)
from turboquant_hf.kernels.encode.rounding import INTERPRETED, rounded

__all__ = ["decode_tiles", "encode_tiles"]

PROGRAMS = 256
"""A program takes several tiles, and loads its matrices once, as long as this many programs remain."""
WARPS = 8
REGISTERS = 255
"""One program then fills an SM. With 128, two share it, and spill: `k4v4` takes 2 % longer on an H200."""


@triton.jit
def _write_group(
    y, idle, p_thresholds, p_levels, p_pairs, p_cells, p_room, p_codes, p_scale, p_flag, factor, t,
    GROUP: tl.constexpr, SPEC: tl.constexpr, T: tl.constexpr, RULE: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """Round rotated vectors y [tokens, channels] of one group and store codes and scales (times `factor`).

    idle: which tokens have no weight.
    """
    BLOCK_T: tl.constexpr = y.shape[0]
    BLOCK_C: tl.constexpr = y.shape[1]
    square = tl.sum(y * y, axis=1)
    square = tl.where(square < float("inf"), square, float("nan"))
    norm = tl.sqrt_rn(square)
    length = tl.maximum(norm / GROUP.root, 1e-30)
    point = y * tl.div_rn(tl.full((BLOCK_T,), 1.0, tl.float32), length)[:, None]
    if GROUP.in_words:
        # A NaN costs nothing in the search, so a token without weight leaves the other values of its word free.
        point = tl.where(idle[:, None], float("nan"), point)
        point, level = write_words(
            point, t, p_room, p_codes + GROUP.offset, p_cells, p_pairs, p_levels, GROUP, T, CHANNEL_MAJOR, not FOLDED
        )  # fmt: skip
        y = point * length[:, None]  # y again, within two roundings
    else:
        codes, level = rounded(point, p_thresholds, p_levels, p_pairs, GROUP)
    if BLOCK_C != GROUP.size:
        level = tl.where((tl.arange(0, BLOCK_C) < GROUP.size)[None, :], level, 0.0)
    if RULE == "norm":
        scale = norm / GROUP.root
    elif RULE == "norm-corrected":
        scale = norm / tl.sqrt(tl.sum(level * level, axis=1))
    elif RULE == "mse":
        scale = tl.sum(y * level, axis=1) / tl.sum(level * level, axis=1)
    else:
        scale = square / tl.maximum(tl.sum(y * level, axis=1), 1e-30)
    scale = scale * factor
    if GROUP.in_words:
        scale = tl.where(idle, 0.0, scale)
    if SPEC.shift:
        half = tl.where(scale == scale, tl.clamp(scale / SPEC.unit, 0.0, 65504.0), 65504.0).to(tl.float16)
        bits = half.to(tl.int16, bitcast=True).to(tl.int32)
        stored = tl.minimum((bits + (1 << (SPEC.shift - 1))) >> SPEC.shift, 255).to(tl.uint8)
    else:
        stored = tl.where(tl.abs(scale) <= 65504.0, scale, float("nan")).to(tl.float16)
    tl.store(p_scale + t, stored, mask=t < T)
    suspect = (stored == 255) if SPEC.shift else (stored != stored)
    tl.store(p_flag + t * 0, tl.full((BLOCK_T,), 1, tl.int8), mask=suspect & (t < T) & ~idle)

    if FOLDED and not GROUP.in_words:
        # Rows t and t + T / 2 stand 8 apart, in one thread of a matrix product. Go back to the order of tokens.
        codes = tl.permute(tl.reshape(codes, (BLOCK_T // 16, 2, 8, BLOCK_C)), (1, 0, 2, 3))
        codes = tl.reshape(codes, (BLOCK_T, BLOCK_C))
    for plane in tl.static_range(plane_count(GROUP)):
        if GROUP.regular:
            pack_regular(codes, p_codes + GROUP.offset, GROUP, plane, T, CHANNEL_MAJOR)
        else:
            pack_plane(codes, p_codes + GROUP.offset, GROUP, plane, T, CHANNEL_MAJOR)


@kernel("p_weight", "p_mean", "p_gain", "p_room", "p_flag")
def _encode_kernel(
    p_x, p_weight, p_mean, p_matrix, p_units, p_order, p_balance, p_gain, p_thresholds, p_levels, p_pairs, p_cells,
    p_room, p_codes, p_scale, p_flag, x_b: tl.int64, x_h: tl.int64, x_n, x_t, w_b: tl.int64, w_n,
    m_b: tl.int64, m_h: tl.int64, m_n, c_b: tl.int64, c_h: tl.int64, c_n, s_b: tl.int64, s_h: tl.int64, s_n,
    part_stride, a_b, a_h, u_h, H, N, TILES,
    SPEC: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr, PATH: tl.constexpr, PARTS: tl.constexpr, MEAN: tl.constexpr, WEIGHT: tl.constexpr,
    ORDER: tl.constexpr, BALANCE: tl.constexpr, GAIN: tl.constexpr, RULE: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    """The kernel of this file's text.

    p_x, p_weight, p_mean, p_codes, p_scale    x, w, m, c, s in the names of strides: input, weight, mean, codes, scales
    p_matrix, p_units                          a, u: the rotation in PARTS parts, and one factor per group's scale
    p_thresholds, p_levels, p_pairs, p_cells   tables of the codebooks (`common.tables`)
    p_room, p_flag                             memory of `in_words`; see `reference.encode_tiles`

    Strides end in _b (sequence), _h (head), _n (tile) or _t (token). A tensor that is missing is passed as x and is not
    read: WEIGHT, ORDER, BALANCE and GAIN say which are there, and MEAN is "none", "given" or "taken" (and stored).
    """
    GROUPS: tl.constexpr = group_count(SPEC)
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    FOLDED: tl.constexpr = CHANNEL_MAJOR and T == BLOCK_T and any_rows(SPEC)
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    first = tl.program_id(1) * TILES
    last = tl.minimum(first + TILES, N)

    row = tl.arange(0, BLOCK_T)
    t = row
    if FOLDED:
        t = row // 16 * 8 + row % 8 + row // 8 % 2 * (T // 2)
    p_matrix += head_offset(b, h, a_b, a_h, D)
    p_units += h * u_h
    gain = 1.0
    if GAIN:
        gain = tl.load(p_gain + head)
    k = tl.arange(0, BLOCK_K)
    factors = 1.0
    if CHUNKS == 1:
        source = k
        if ORDER:
            source = ranks(p_order + head * D, k, D, BLOCK_D)
        matrices = matrices_of(p_matrix, source, k < D, part_stride, D, SPEC, PARTS)
        if BALANCE:
            factors = tl.load(p_balance + head * D + k, mask=k < D, other=0.0)

    p_x += head_offset(b, h, x_b, x_h, D)
    p_mean += head_offset(b, h, m_b, m_h, D)
    p_codes += head_offset(b, h, c_b, c_h, SPEC.nbytes)
    p_scale += head_offset(b, h, s_b, s_h, T)
    p_room += (head * tl.num_programs(1) + tl.program_id(1)) * 3 * T * BLOCK_D  # of use to groups in words alone
    for n in range(first, last):
        tile = tl.full((), 0, tl.int64) + n
        p_rows = p_x + row_offset(tile, x_n, D) + row_offset(t, x_t, D)[:, None]
        weight = 0.0
        if WEIGHT:
            weight = tl.load(p_weight + b * w_b + tile * w_n + t, mask=t < T, other=0.0).to(tl.float32)
        for g in tl.static_range(GROUPS):
            y = tl.zeros((BLOCK_T, group_block(SPEC, g)), tl.float32)
            for low in tl.static_range(0, D, BLOCK_K):
                if CHUNKS > 1 or g == 0:
                    x = tl.load(p_rows + (low + k)[None, :], mask=(t < T)[:, None] & (low + k < D)[None, :], other=0.0)
                    p_part = p_mean + row_offset(tile, m_n, D) + low + k
                    mean = 0.0
                    if MEAN == "given":
                        mean = tl.load(p_part, mask=low + k < D, other=0.0)
                    elif MEAN == "taken":
                        mean = masked_mean(x.to(tl.float32), weight, T, WEIGHT)
                        if g == 0:
                            tl.store(p_part, mean, mask=low + k < D)
                    if CHUNKS > 1 and BALANCE:
                        some = tl.load(p_balance + head * D + low + k, mask=low + k < D, other=0.0)
                        high, rest = prepared(x, mean, some, MEAN != "none", BALANCE, PATH)
                    else:
                        high, rest = prepared(x, mean, factors, MEAN != "none", BALANCE, PATH)
                if CHUNKS > 1:
                    source = low + k
                    if ORDER:
                        source = ranks(p_order + head * D, low + k, D, BLOCK_D)
                    part = group_matrices(p_matrix, source, low + k < D, part_stride, D, group_of(SPEC, g), PARTS)
                    y = product(y, high, rest, part, 0, PARTS, PATH)
                else:
                    y = product(y, high, rest, matrices, g * PARTS, PARTS, PATH)
            idle = (weight == 0.0) if WEIGHT else (t < 0)
            _write_group(
                y, idle, p_thresholds, p_levels, p_pairs, p_cells, p_room,
                p_codes + row_offset(tile, c_n, SPEC.nbytes), p_scale + row_offset(tile, s_n, T) + g * T,
                p_flag, tl.load(p_units + g) / gain, t, group_of(SPEC, g), SPEC, T, RULE, CHANNEL_MAJOR, FOLDED,
            )  # fmt: skip


def encode_tiles(
    x: torch.Tensor,
    coding: TileCoding,
    *,
    mean: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    out: dict[str, torch.Tensor] | None = None,
    flag: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Equivalent to `reference.encode_tiles`; products are float32 to within a few units in the last place."""
    if not fits(x, coding.groups):
        return reference.encode_tiles(x, coding, mean=mean, weight=weight, out=out, flag=flag)
    batch, heads, tiles = x.shape[:3]
    x = rows_contiguous(x)
    if out is None:
        out = _new_arrays(x, coding)
    if x.numel():
        per_program = tiles_per_program(batch * heads * tiles, PROGRAMS)
        weight = None if weight is None else rows_contiguous(weight)
        flag = torch.empty(1, dtype=torch.int8, device=x.device) if flag is None else flag
        strides = (0, 0) if weight is None else weight.stride()[:2]
        _encode_kernel[(batch * heads, triton.cdiv(tiles, per_program))](
            **_arguments(x, coding, mean, out), p_weight=x if weight is None else weight,
            WEIGHT=weight is not None, w_b=strides[0], w_n=strides[1], N=tiles, TILES=per_program,
            p_room=room_for_words(x, coding.groups, triton.cdiv(tiles, per_program)), p_flag=flag,
        )  # fmt: skip
    return out


def _arguments(
    x: torch.Tensor, coding: TileCoding, mean: torch.Tensor | None, out: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """The arguments of a launch for tiles x [B, H, N, T, D], and its compile-time constants."""
    tile, dim = x.shape[-2:]
    transform, groups, center, device = coding.transform, coding.groups, coding.center, x.device
    shared = transform.dim() == 2 or transform.shape[0] == 1
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter multiplies the bytes of bfloat16
        x = x.float()
    if x.dtype == torch.float32 or not shared or (coding.balance is None and (center or mean is not None)):
        path, dtype = FULL, torch.float32
    elif coding.balance is not None:  # brings the input near 1, where two halves hold all of it
        path, dtype = SPLIT, torch.float16
    else:
        path, dtype = RAW, x.dtype
    if shared:
        matrix, units = operand(transform, groups, dtype)
        parts, heads = matrix.shape[:2]
        a_b, a_h, u_h = 0, (dim * dim if heads > 1 else 0), (len(groups) if heads > 1 else 0)
    else:
        matrix, units = transform.float().transpose(-1, -2).contiguous(), ones(len(groups), device)
        parts, heads, (a_b, a_h), u_h = 1, 1, matrix.stride()[:2], 0
    block = padded_size(dim)
    kept = out["mean"] if center else mean
    m_b, m_h, m_n = (0, 0, 0) if kept is None else kept.stride()[:3]
    (c_b, c_h, c_n), (s_b, s_h, s_n) = out["codes"].stride()[:3], out["scale"].stride()[:3]
    x_b, x_h, x_n, x_t = x.stride()[:4]
    spec = tile_spec(groups, tile, coding.scale_format, channel_major=coding.channel_major, exact=True)
    # Wide heads get twice the warps. Not those with padded groups: Triton 3.6 then reads past its shared memory.
    many = block > 128 and all(group.block == group.size for group in spec.groups)
    learned = {"p_order": coding.order, "p_balance": coding.balance, "p_gain": coding.gain}
    return {
        "p_x": x, "p_mean": x if kept is None else kept, "p_matrix": matrix, "p_units": units,
        **{name: x if state is None else state.contiguous() for name, state in learned.items()},
        "p_thresholds": threshold_table(groups, device), "p_levels": level_table(groups, device),
        "p_pairs": pair_table(groups, device), "p_cells": cell_table(groups, device), "p_codes": out["codes"],
        "p_scale": out["scale"],
        "x_b": x_b, "x_h": x_h, "x_n": x_n, "x_t": x_t, "m_b": m_b, "m_h": m_h, "m_n": m_n,
        "c_b": c_b, "c_h": c_h, "c_n": c_n, "s_b": s_b, "s_h": s_h, "s_n": s_n,
        "part_stride": heads * dim * dim, "a_b": a_b, "a_h": a_h, "u_h": u_h, "H": x.shape[1],
        "SPEC": spec, "T": tile, "D": dim, "BLOCK_T": padded_size(tile), "BLOCK_D": block,
        "BLOCK_K": 32 if path == FULL or parts > 1 else min(block, 128), "PATH": path, "PARTS": parts,
        "MEAN": "taken" if center else "none" if mean is None else "given", "ORDER": coding.order is not None,
        "BALANCE": coding.balance is not None, "GAIN": coding.gain is not None, "RULE": coding.scale_rule,
        "CHANNEL_MAJOR": coding.channel_major, "num_warps": 2 * WARPS if many else WARPS, "num_stages": 1,
        "maxnreg": REGISTERS // 2 if many else REGISTERS,
    }  # fmt: skip


def _new_arrays(x: torch.Tensor, coding: TileCoding) -> dict[str, torch.Tensor]:
    """Empty arrays for the tiles x [B, H, N, T, D]."""
    *lead, tile, dim = x.shape
    nbytes = tile_bytes(coding.groups, tile, coding.channel_major)
    scale_dtype = torch.float16 if coding.scale_format == "fp16" else torch.uint8
    out = {
        "codes": torch.empty((*lead, nbytes), dtype=torch.uint8, device=x.device),
        "scale": torch.empty((*lead, len(coding.groups), tile), dtype=scale_dtype, device=x.device),
    }
    if coding.center:
        out["mean"] = torch.empty((*lead, dim), dtype=torch.float16, device=x.device)
    return out
