"""`kernel`, the decorator of every Triton kernel of this package: one build serves all lengths."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

from turboquant_hf.kernels.progress import announces


def kernel(*anywhere: str) -> Callable[[Callable[..., None]], Any]:
    """Declare a Triton kernel that is built once for all values of its run-time numbers.

    By default, Triton builds a kernel again for a number that is 1, and for one that is a multiple of 16. Lengths,
    counts and strides may change between these. `addresses` states what loads need to know of strides. Pointers are
    called p_*, and Triton checks their alignment.

    Args:
        anywhere: pointers that may be aligned in one call and not in the next. Kernels do no wide loads from them.
    """

    def declare(function: Callable[..., None]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        numbers = [p.name for p in parameters if not p.name.startswith("p_") and "constexpr" not in str(p.annotation)]
        return announces(triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=list(anywhere)))

    return declare
