"""The two names that `generate` learns, and transformers' tables of names. Nothing is imported: loading it is free."""

from __future__ import annotations

from types import ModuleType

CACHE_NAME = "turboquant"
STATIC_NAME = "turboquant_static"
UPSTREAM = {
    CACHE_NAME: ("dynamic", ("DYNAMIC_CACHE_IMPLEMENTATIONS",)),
    STATIC_NAME: ("static", ("STATIC_CACHE_IMPLEMENTATIONS", "ALL_STATIC_CACHE_IMPLEMENTATIONS")),
}
"""Our names -> upstream's cache that is built first, and the tables beside the one of all names."""


def add_cache_names(configuration_utils: ModuleType) -> None:
    """Add both names to the tables of `transformers.generation.configuration_utils`. Idempotent."""
    for ours, (_, tables) in UPSTREAM.items():
        for table in ("ALL_CACHE_IMPLEMENTATIONS", *tables):
            names = getattr(configuration_utils, table, None)
            if names is not None and ours not in names:
                setattr(configuration_utils, table, type(names)((*names, ours)))
