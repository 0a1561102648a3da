"""How a Triton kernel is declared here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

from turboquant_hf.kernels.progress import announces


def kernel(*anywhere: str) -> Callable[[Callable[..., None]], Any]:
    """Declare a Triton kernel that is built once for all values of its run-time numbers.

    Triton would build it again for a number that is 1 or a multiple of 16, as lengths, counts and strides may or may
    not be. What loads need to know of strides is said by `addresses`. Pointers are called p_*; Triton finds out
    whether they are aligned.

    Args:
        anywhere: pointers that may be aligned in one call and not in the next. No wide load is made from them.
    """

    def declare(function: Callable[..., None]) -> Any:
        parameters = inspect.signature(function).parameters.values()
        numbers = [p.name for p in parameters if not p.name.startswith("p_") and "constexpr" not in str(p.annotation)]
        return announces(triton.jit(function, do_not_specialize=numbers, do_not_specialize_on_alignment=list(anywhere)))

    return declare
