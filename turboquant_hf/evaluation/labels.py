"""Words that tables, pictures and files share. Each is defined here once."""

from __future__ import annotations

from dataclasses import dataclass

UNCOMPRESSED = "uncompressed"
"""The name, in every file, of the model with transformers' own cache."""


def cache_label(name: str, dtype: str | None) -> str:
    """The name of a row's cache for readers. The uncompressed cache also shows its dtype.

    dtype: None for runs of earlier versions, which do not record it.
    """
    return f"{name} ({dtype})" if name == UNCOMPRESSED and dtype else name


@dataclass(frozen=True)
class Level:
    """One level of the benchmark: the title of its tables and pictures, and the unit of its times."""

    title: str
    unit: str


LEVELS = {
    "kernel": Level("Decode attention of one layer", "us per call"),
    "encode": Level("Encoding a prompt, one layer", "ms"),
    "model": Level("One decode step of a model with random weights", "ms per step"),
    "generate": Level("Whole calls of generate", "ms per token"),
    "capacity": Level("One decode step over a cache that was filled directly", "ms per step"),
}
