"""Where rows lie in memory, said so that Triton needs one build for all lengths of a cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_ALIGNMENT = 16
"""Elements: what Triton would find out about an argument by itself, and what the widest loads need."""


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied where its rows are not contiguous, or do not start where `row_offset` says."""
    unit = _alignment(x.shape[-1])
    starts = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    aligned = all(size == 1 or stride % unit == 0 for size, stride in starts)
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def _alignment(row: int) -> int:
    """The power of two that divides the starts of rows of `row` elements; `rows_contiguous` sees to it."""
    return min(row & -row, MAX_ALIGNMENT)


alignment = triton.constexpr_function(_alignment)


@triton.jit
def row_offset(index, stride, ROW: tl.constexpr):
    """Where rows of ROW elements start, relative to the first.

    Strides change with a cache's length and with who made a tensor. Triton must not build a kernel for each, so it is
    not shown their values (`do_not_specialize`); what wide loads need to know of them is said here.
    """
    return tl.multiple_of(index * stride, alignment(ROW))


@triton.jit
def head_offset(b, h, b_stride, h_stride, ROW: tl.constexpr):
    """Where the first row of head h of sequence b starts; `row_offset` says why."""
    return tl.multiple_of(b * b_stride + h * h_stride, alignment(ROW))


def tiles_per_program(tiles: int, programs: int) -> int:
    """How many of `tiles` one program takes in turn: up to four, where that leaves `programs` of them."""
    return max(1, min(4, tiles // programs))
