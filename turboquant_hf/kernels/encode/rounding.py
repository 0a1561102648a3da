"""Codes of the nearest levels, inside the encoder.

    number = round(g0 x + g1 x^3 + ...)               one of the two thresholds around x (`GroupSpec.guess`)
    code   = number + (x > threshold(number))         less the offset of the numbers

Codebooks without such a polynomial are searched by bisection.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from turboquant_hf.kernels.common.spec import term_of, terms_of

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to a small float32, it leaves the nearest whole number in the low bits."""
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _odd(x, GROUP: tl.constexpr, NAME: tl.constexpr):
    """x (c0 + c1 x^2 + ...) with the coefficients that the group has under this name."""
    TERMS: tl.constexpr = terms_of(GROUP, NAME)
    sum = tl.zeros_like(x) + term_of(GROUP, NAME, TERMS - 1)
    if TERMS > 1:
        square = x * x
        for term in tl.static_range(1, TERMS):
            sum = sum * square + term_of(GROUP, NAME, TERMS - 1 - term)
    return x * sum


@triton.jit
def looked_up(p_table, index):
    """int32 entries of a small table. Assembly, because Triton would give a plain load a layout for wide rows."""
    if INTERPRETED:
        return tl.load(p_table + index)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 a; mad.wide.u32 a, $2, 4, $1; ld.global.nc.b32 $0, [a]; }", "=r,l,r",
            [p_table.to(tl.int64), index], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def rounded(point, p_thresholds, p_levels, p_pairs, GROUP: tl.constexpr):
    """The codes of the nearest levels (int32, of which the low 8 bits count), and the levels."""
    BITS: tl.constexpr = GROUP.bits
    HALF: tl.constexpr = 1 << (BITS - 1)
    if terms_of(GROUP, "guess") == 0:
        codes = tl.zeros(point.shape, tl.int32)
        for step in tl.static_range(BITS):
            higher = codes + (1 << (BITS - 1 - step))
            codes = tl.where(point > tl.load(p_thresholds + GROUP.table + higher - 1), higher, codes)
        return codes, tl.load(p_levels + GROUP.table + codes)
    else:
        moved = _odd(tl.clamp(point, -GROUP.edge, GROUP.edge), GROUP, "guess") + MAGIC
        number = moved - MAGIC
        # The code below the threshold. It is masked, because the guess of a NaN must not reach outside a table.
        low = (moved.to(tl.int32, bitcast=True) - (0x4B400000 - HALF + 1)) & (2 * HALF - 1)
        if terms_of(GROUP, "midpoints") > 0:
            above = point > _odd(number, GROUP, "midpoints")
            return low + above.to(tl.int32), _odd(2.0 * number + tl.where(above, 1.0, -1.0), GROUP, "levels")
        elif GROUP.unit > 0.0:
            pair = looked_up(p_pairs + GROUP.table, low)
            under = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            over = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            above = point > (under + over) * (0.5 * GROUP.unit)
            return low + above.to(tl.int32), tl.where(above, over, under) * GROUP.unit
        else:
            codes = low + (point > tl.load(p_thresholds + GROUP.table + low)).to(tl.int32)
            return codes, tl.load(p_levels + GROUP.table + codes)
