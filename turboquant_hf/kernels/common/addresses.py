"""Offsets of rows in memory, written so that Triton builds a kernel once for all lengths of a cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_ALIGNMENT = 16
"""Elements: the largest alignment that Triton detects by itself, and that the widest loads need."""


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it where its rows are not contiguous or are not aligned as `row_offset` promises."""
    unit = _alignment(x.shape[-1])
    starts = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    aligned = all(size == 1 or stride % unit == 0 for size, stride in starts)
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _alignment(row: int) -> int:
    """The power of two that divides the starts of rows of `row` elements. `rows_contiguous` ensures that it does."""
    return min(row & -row, MAX_ALIGNMENT)


alignment = triton.constexpr_function(_alignment)


@triton.jit
def row_offset(index, stride, ROW: tl.constexpr):
    """Offset of row `index` from the first row, where a row has ROW elements.

    Strides change with the length of a cache and with the maker of a tensor. Triton must not build a kernel for each
    stride, so their values are hidden from it (`do_not_specialize`). Wide loads need to know their divisibility, which
    is stated here.
    """
    return tl.multiple_of(index * stride, alignment(ROW))


@triton.jit
def head_offset(b, h, b_stride, h_stride, ROW: tl.constexpr):
    """Offset of the first row of head h of sequence b. `row_offset` says why this is a function."""
    return tl.multiple_of(b * b_stride + h * h_stride, alignment(ROW))


def tiles_per_program(tiles: int, programs: int) -> int:
    """How many tiles one program takes in turn: up to four, while at least `programs` programs remain."""
    return max(1, min(4, tiles // programs))
