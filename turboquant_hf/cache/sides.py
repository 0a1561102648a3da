"""Keys and values, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Side = Literal["keys", "values"]
SIDES: tuple[Side, Side] = ("keys", "values")


class Sides(NamedTuple):
    """Something of the keys, and the same of the values."""

    keys: Any
    values: Any

    def of(self, side: Side) -> Any:
        return getattr(self, side)

    def map(self, fn: Callable[..., Any], *others: Sides) -> Sides:
        """fn of either side, and of the same side of `others`."""
        return Sides(*map(fn, self, *others))
