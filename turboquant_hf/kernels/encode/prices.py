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
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.kernels.encode.rounding import INTERPRETED, MAGIC
from turboquant_hf.primitives import trellis

DEAREST = tl.constexpr(trellis.DEAREST)
CELLS = tl.constexpr(trellis.CELLS)


@triton.constexpr_function
def _chosen_byte(subset):
    """PTX: the mantissa of 2**23 plus byte `subset`."""
    return f"prmt.b32 $0, $1, 0x4B000000, 0x744{subset};"


@triton.jit
def _level_near(bytes, subset: tl.constexpr):
    """The level of a subset, in grid units, of the four that `tables.pair_table` has in a number: float32."""
    if INTERPRETED:
        moved = ((bytes >> (8 * subset)) & 0xFF) | 0x4B000000
    else:
        moved = tl.inline_asm_elementwise(
            _chosen_byte(subset), "=r,r", [bytes], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
    return moved.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)


@triton.jit
def lowest_near(x, p_cells, GROUP: tl.constexpr):
    """i of values x: int32."""
    x = x * GROUP.per_grid
    place = tl.minimum(tl.where(x > -CELLS // 2, x, -CELLS // 2), CELLS // 2 - 1) - 0.5
    cell = (place + MAGIC).to(tl.int32, bitcast=True) - (0x4B400000 - CELLS // 2)
    return tl.load(p_cells + cell).to(tl.int32)


@triton.jit
def priced(x, lowest, near, GROUP: tl.constexpr):
    """Prices of values x, and i: int32, as described at the top of this file. near: the table's number at i."""
    x = x * GROUP.per_grid
    errors = ()
    for subset in tl.static_range(4):
        level = _level_near(near, subset)
        errors = errors + (level * (level - 2.0 * x),)  # noqa: RUF005
    least = tl.minimum(tl.minimum(errors[0], errors[1]), tl.minimum(errors[2], errors[3]))
    prices = ()
    for subset in tl.static_range(4):
        price = tl.minimum((errors[subset] - least) * GROUP.price + MAGIC, MAGIC + DEAREST)
        # A NaN costs nothing: all four become DEAREST on a GPU, 0 in the interpreter.
        prices = prices + (price.to(tl.int32, bitcast=True),)  # noqa: RUF005
    away = ((prices[3] - prices[0]) << 24) | (((prices[2] - prices[0]) & 0xFF) << 16)
    return away | (((prices[1] - prices[0]) & 0xFF) << 8) | lowest
