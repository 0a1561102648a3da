"""The two cache names that `generate` learns, and the names of its cache argument. This module imports nothing."""

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
"""{our name: (upstream's cache that is built first, upstream's tables that the name is added to)}."""

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""The names of a model's cache argument: "past_key_values" up to transformers 5.23, then "cache"."""


def cache_argument(arguments: Mapping[str, Any]) -> str | None:
    """The name of the cache in a model's arguments or outputs, or None if there is no cache."""
    return next((name for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def add_cache_names(configuration_utils: ModuleType) -> None:
    """Add our names to the tables of `transformers.generation.configuration_utils`. Idempotent."""
    for ours, (_, tables) in UPSTREAM.items():
        for table in ("ALL_CACHE_IMPLEMENTATIONS", *tables):
            names = getattr(configuration_utils, table, None)
            if names is not None and ours not in names:
                setattr(configuration_utils, table, type(names)((*names, ours)))
