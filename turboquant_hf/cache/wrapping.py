"""`wrap_once`: wraps methods of transformers' `GenerationMixin`."""

from __future__ import annotations

from collections.abc import Callable

from transformers.generation.utils import GenerationMixin

MARK = "_turboquant_original"
"""The attribute of a wrapper that holds the original method."""


def wrap_once(method: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replace a method of `GenerationMixin` by wrap(method). Idempotent."""
    original = getattr(GenerationMixin, method)
    if not hasattr(original, MARK):
        wrapped = wrap(original)
        setattr(wrapped, MARK, original)
        setattr(GenerationMixin, method, wrapped)
