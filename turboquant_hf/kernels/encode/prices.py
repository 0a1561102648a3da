"""What the four subsets of a trellis cost for a value, as `primitives.trellis` says: m_0 .. m_3, and i.

    cell       floor(x / grid), from -128 to 127      one byte of a table: i
    i          a number of a table: the four nearest levels, one byte each
    e_s        L (L - 2 x)
    m_s        min(round((e_s - min e) * price), DEAREST)

What `priced` returns, an int32 of four bytes, the highest first:

    | m_3 - m_0 | m_2 - m_0 | m_1 - m_0 | i |

- The search only compares sums of prices, so m_0 may be subtracted from all four.
- Two loads of tables that fit in a few lines of the cache, and no search.
- Numbers are rounded by adding 1.5 * 2**23: conversions run at a quarter of the speed of additions.
- A compiled kernel takes the same steps in PTX, because Triton's layout pass follows each load and store through all
  connected operations (compile times: docs/notebook.md).
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from turboquant_hf.kernels.encode.rounding import INTERPRETED, MAGIC
from turboquant_hf.primitives import trellis

DEAREST = tl.constexpr(trellis.DEAREST)
CELLS = tl.constexpr(trellis.CELLS)


def _bits(x: float) -> str:
    """A float32 constant in PTX."""
    return "0f" + struct.pack(">f", x).hex().upper()


_FIRST_CELL = 0x4B400000 - trellis.CELLS // 2
"""The bits of MAGIC plus the number of the first cell."""
_LOWEST = tl.constexpr(f"""{{
    .reg .f32 x; .reg .b32 cell; .reg .b64 at;
    mul.rn.f32 x, $1, $3;
    max.f32 x, x, {_bits(-trellis.CELLS / 2)};
    min.f32 x, x, {_bits(trellis.CELLS / 2 - 1)};
    add.rn.f32 x, x, {_bits(-0.5)};
    add.rn.f32 x, x, {_bits(MAGIC.value)};
    mov.b32 cell, x;
    sub.s32 cell, cell, {_FIRST_CELL};
    cvt.u64.u32 at, cell;
    add.s64 at, at, $2;
    ld.global.nc.u8 $0, [at];
}}""")
"""PTX of `lowest_near`: $0 is i; $1 a value, $2 the table of cells, $3 grid units per unit."""


def _price_text() -> str:
    lines = [".reg .b32 byte, p<4>, low, high; .reg .f32 x, level, e<4>, least, other;", "mul.rn.f32 x, $1, $4;"]
    lines.append("add.rn.f32 x, x, x;")
    for s in range(4):
        lines.append(f"prmt.b32 byte, $3, 0x4B000000, 0x744{s};")  # the mantissa of 2**23 plus byte s
        lines.append(f"mov.b32 level, byte; add.rn.f32 level, level, {_bits(-8388608.0 - 128.0)};")
        lines.append(f"sub.rn.f32 e{s}, level, x; mul.rn.f32 e{s}, level, e{s};")
    lines.append("min.f32 least, e0, e1; min.f32 other, e2, e3; min.f32 least, least, other;")
    for s in range(4):
        lines.append(f"sub.rn.f32 e{s}, e{s}, least; fma.rn.f32 e{s}, e{s}, $5, {_bits(MAGIC.value)};")
        lines.append(f"min.f32 e{s}, e{s}, {_bits(MAGIC.value + trellis.DEAREST)}; mov.b32 p{s}, e{s};")
    lines += [f"sub.s32 p{s}, p{s}, p0;" for s in (1, 2, 3)]
    lines += ["prmt.b32 low, $2, p1, 0x0040;", "prmt.b32 high, p2, p3, 0x4000;", "prmt.b32 $0, low, high, 0x7610;"]
    return "{" + " ".join(lines) + "}"


_PRICE = tl.constexpr(_price_text())
"""PTX of `priced`: $0 are the prices; $1 a value, $2 i, $3 the levels near it, $4 grid units per unit, $5 the price."""


@triton.jit
def lowest_near(x, p_cells, GROUP: tl.constexpr):
    """i of values x: int32."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            _LOWEST, "=r,f,l,f", [x, p_cells.to(tl.int64), GROUP.per_grid], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    x = x * GROUP.per_grid
    place = tl.minimum(tl.where(x > -CELLS // 2, x, -CELLS // 2), CELLS // 2 - 1) - 0.5
    cell = (place + MAGIC).to(tl.int32, bitcast=True) - (0x4B400000 - CELLS // 2)
    return tl.load(p_cells + cell).to(tl.int32)


@triton.jit
def priced(x, lowest, near, GROUP: tl.constexpr):
    """Prices of values x, and i: int32, as described at the top of this file.

    lowest: what `lowest_near` returns; near: the table's number at that entry.
    """
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            _PRICE, "=r,f,r,r,f,f", [x, lowest, near, GROUP.per_grid, GROUP.price], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    x = x * GROUP.per_grid
    errors = ()
    for subset in tl.static_range(4):
        moved = ((near >> (8 * subset)) & 0xFF) | 0x4B000000
        level = moved.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)
        errors = errors + (level * (level - 2.0 * x),)  # noqa: RUF005
    least = tl.minimum(tl.minimum(errors[0], errors[1]), tl.minimum(errors[2], errors[3]))
    prices = ()
    for subset in tl.static_range(4):
        price = tl.minimum((errors[subset] - least) * GROUP.price + MAGIC, MAGIC + DEAREST)
        # NaN: four equal bit patterns here, four times DEAREST in PTX. The differences are 0 in both.
        prices = prices + (price.to(tl.int32, bitcast=True),)  # noqa: RUF005
    away = ((prices[3] - prices[0]) << 24) | (((prices[2] - prices[0]) & 0xFF) << 16)
    return away | (((prices[1] - prices[0]) & 0xFF) << 8) | lowest
