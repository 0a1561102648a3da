"""Loads texts. The default is part of every CPython."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from turboquant_hf.evaluation.harness.run import Run


def read_text(run: Run) -> tuple[str, str]:
    """(name, text) of --text or --dataset."""
    if run.text:
        return " ".join(Path(path).name for path in run.text), load_text(run.text)
    if run.dataset:
        return run.dataset, _dataset_text(run.dataset)
    return "pydoc_data.topics", packaged_text()


def packaged_text() -> str:
    """English prose that is part of every CPython: the language reference of ``help()``, about 0.5 MB."""
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


def load_text(paths: Sequence[str | Path]) -> str:
    """The UTF-8 files of ``paths``, in that order, joined by blank lines.

    Raises:
        ValueError: no path, or a single string in place of a list.
    """
    if isinstance(paths, str) or not paths:
        raise ValueError(f"paths: {paths!r} is not a list of at least one file")
    return "\n\n".join(Path(path).read_text(encoding="utf-8") for path in paths)


def _dataset_text(name: str) -> str:
    from datasets import load_dataset

    path, config, split, column = (*name.split(":"), None, None, None)[:4]
    rows = load_dataset(path, config or None, split=split or "test")
    if column is None:
        column = next((c for c, feature in rows.features.items() if getattr(feature, "dtype", "") == "string"), None)
    if column not in rows.column_names:
        raise ValueError(f"dataset={name!r}: no text column; allowed: NAME:CONFIG:SPLIT:COLUMN of {rows.column_names}")
    return "\n".join(rows[column])
