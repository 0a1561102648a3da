"""How this package stands in front of methods of transformers' `GenerationMixin`."""

from __future__ import annotations

from collections.abc import Callable

from transformers.generation.utils import GenerationMixin


def wrap_once(
    method: str, wrap: Callable[[Callable], Callable], mark: str = "_turboquant_original", *, needed: bool = False
) -> None:
    """Replace a method by wrap(method), which carries the original as `mark`. Idempotent.

    `wrap` uses functools.wraps, so that a wrapper around a wrapper carries both marks.

    Raises:
        AttributeError: this version of transformers has no such method, and it is `needed`; others are left alone.
    """
    original = getattr(GenerationMixin, method) if needed else getattr(GenerationMixin, method, None)
    if original is not None and not hasattr(original, mark):
        wrapped = wrap(original)
        setattr(wrapped, mark, original)
        setattr(GenerationMixin, method, wrapped)
