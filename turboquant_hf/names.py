"""Names: the two that `generate` learns, and what it calls a cache. Nothing is imported: loading it is free."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

CACHE_NAME = "turboquant"
STATIC_NAME = "turboquant_static"
UPSTREAM = {
    CACHE_NAME: ("dynamic", ("DYNAMIC_CACHE_IMPLEMENTATIONS",)),
    STATIC_NAME: ("static", ("STATIC_CACHE_IMPLEMENTATIONS", "ALL_STATIC_CACHE_IMPLEMENTATIONS")),
}
"""Our names -> upstream's cache that is built first, and the tables beside the one of all names."""

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What generate calls the cache among a model's arguments: the second name up to transformers 5.23."""


def cache_argument(arguments: Mapping[str, Any]) -> str | None:
    """The name under which a cache is among a model's arguments or outputs, or None where there is none."""
    return next((name for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def add_cache_names(configuration_utils: ModuleType) -> None:
    """Add both names to the tables of `transformers.generation.configuration_utils`. Idempotent."""
    for ours, (_, tables) in UPSTREAM.items():
        for table in ("ALL_CACHE_IMPLEMENTATIONS", *tables):
            names = getattr(configuration_utils, table, None)
            if names is not None and ours not in names:
                setattr(configuration_utils, table, type(names)((*names, ours)))
