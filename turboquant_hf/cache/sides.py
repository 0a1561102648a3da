"""Keys and values, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")


class Sides(NamedTuple):
    """A pair: one thing for the keys, and the same kind of thing for the values."""

    keys: Any
    values: Any

    def of(self, side: Side) -> Any:
        return getattr(self, side)

    def map(self, fn: Callable[..., Any], *others: Sides) -> Sides:
        """Sides(fn(keys, ...), fn(values, ...)); `others` give further arguments, side by side."""
        return Sides(*map(fn, self, *others))
