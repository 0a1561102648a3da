"""Tables of a report from the rows of one run, and the sentences on how the run was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turboquant_hf.evaluation.labels import LEVELS, UNCOMPRESSED
from turboquant_hf.evaluation.report.finished import FinishedRun
from turboquant_hf.evaluation.report.page import Table, cell

SPEED = {
    "shape": "model", "dtype": "dtype", "batch": "batch", "tokens": "tokens", "cache": "cache", "backend": "backend",
    "preset": "preset", "mode": "mode", "us": "us", "ms": "ms", "speedup": "times the best uncompressed",
    "ratio_to_best_fp16": "time / best uncompressed", "ratio_to_fp16": "time / uncompressed", "gbps": "GB/s",
    "copy_share": "of copy", "share_of_prefill": "of the layer's prefill", "resident_bytes": "bytes held",
    "memory_saved": "times less", "peak_bytes": "bytes at most", "error": "error", "reason": "why not",
}  # fmt: skip
"""Columns of a benchmark's tables, if its rows have them."""


def about(run: FinishedRun) -> list[str]:
    """A sentence on a run: what it measured, version, hardware, date, dtype and recent window."""
    metrics, found = run.metrics, run.conditions
    keys = ("model", "text", "context", "windows", "rows", "queries", "copy_gbps")
    parts = [f"{k}: {cell(metrics[k])}" for k in keys if isinstance(metrics.get(k), (str, int, float))]
    if isinstance(metrics.get("baseline"), Mapping):
        figures = metrics["baseline"].items()
        parts += [f"{run.label(UNCOMPRESSED)} {k}: {cell(v)}" for k, v in figures if isinstance(v, (int, float))]
    versions = {**(metrics.get("versions") or {}), **found}
    packages = (f"{name} {versions[name]}" for name in ("turboquant_hf", "transformers", "torch") if versions.get(name))
    conditions = {
        "date": found.get("date"),
        "hardware": metrics.get("device") or found.get("hardware"),
        "versions": ", ".join(packages),
        "dtype": run.dtype or ", ".join(dict.fromkeys(row["dtype"] for row in run.rows if row.get("dtype"))),
        "recent window": _recent_windows(metrics, found),
    }
    setup = "; ".join(f"{name}: {value}" for name, value in conditions.items() if value not in (None, ""))
    return [text for text in ("; ".join(parts), setup) if text]


def _recent_windows(metrics: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The number of newest tokens that the caches keep raw; one number if they agree."""
    windows = metrics.get("recent_windows") or {}
    if len(set(windows.values())) > 1:
        return ", ".join(f"{name} {tokens}" for name, tokens in windows.items())
    tokens = next(iter(windows.values()), found.get("recent_window"))
    return None if tokens is None else f"{tokens} tokens"


def plain_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of any rows: their scalars, and the scalars of mappings one level down."""
    flat = []
    for row in rows:
        wide = {}
        for key, value in row.items():
            wide |= {f"{key} {k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        flat.append({k: v for k, v in wide.items() if v is None or isinstance(v, (str, int, float))})
    keys = list(dict.fromkeys(key for row in flat for key in row))
    return Table(keys, [[row.get(key) for key in keys] for row in flat])


def speed_tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table per level of a benchmark, with the columns that its rows fill."""
    tables = []
    for level in dict.fromkeys(row["level"] for row in results):
        rows = [row for row in results if row["level"] == level]
        keys = [key for key in SPEED if any(row.get(key) is not None for row in rows)]
        lines = [[row.get(key) for key in keys] for row in rows]
        title = LEVELS[level].title if level in LEVELS else level
        tables.append(Table([SPEED[key] for key in keys], lines, title))
    return tables


def task_table(run: FinishedRun) -> Table:
    """One line per cache (and length): the score of every task and their mean."""
    tasks = list(dict.fromkeys(row["task"] for row in run.rows))
    scores: dict[tuple[str, Any], dict[str, float]] = {}
    for row in run.rows:
        scores.setdefault((run.label(row["preset"]), row.get("length")), {})[row["task"]] = row["score"]
    rows = [
        [preset, length, *(own.get(task) for task in tasks), sum(own.values()) / len(own)]
        for (preset, length), own in scores.items()
    ]
    return Table(["cache", "tokens", *tasks, "mean"], rows, "score in percent")


def needle_grids(run: FinishedRun, key: str) -> dict[str, dict[tuple[int, float], float]]:
    """{cache: {(length, depth): value of `key`}}."""
    grids: dict[str, dict[tuple[int, float], float]] = {}
    styles = {row.get("style") for row in run.rows}
    for row in run.rows:
        name = run.label(row["preset"])
        name = name if len(styles) == 1 else f"{name}, {row.get('style')}"
        if row.get(key) is not None:
            grids.setdefault(name, {})[row["length"], row["depth"]] = row[key]
    return grids


def needle_tables(run: FinishedRun) -> list[Table]:
    """Means over the depths, by length: share of needles found, and NLL of the right answer."""
    lengths = sorted({row["length"] for row in run.rows})
    tables = []
    for key, caption in (("accuracy", "share of needles found"), ("nll", "nats per token of the right answer")):
        rows = []
        for name, grid in needle_grids(run, key).items():
            by_length = [[value for (length, _), value in grid.items() if length == wanted] for wanted in lengths]
            rows.append([name, *(sum(own) / len(own) if own else None for own in by_length)])
        if rows:
            header = ["cache", *(f"{length:,} tokens" for length in lengths)]
            tables.append(Table(header, rows, f"{caption}, mean over depths"))
    return tables
