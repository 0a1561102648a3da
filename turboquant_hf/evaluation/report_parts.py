"""Tables and pictures of a report, from the rows of one run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from turboquant_hf.evaluation.ablate import pareto_front
from turboquant_hf.evaluation.common import UNCOMPRESSED
from turboquant_hf.evaluation.heatmap import plot_heatmaps
from turboquant_hf.evaluation.page import Table, cell

SPEED = {
    "shape": "model", "dtype": "dtype", "batch": "batch", "tokens": "tokens", "cache": "cache", "backend": "backend",
    "preset": "preset", "mode": "mode", "us": "us", "ms": "ms", "speedup": "times the best fp16",
    "ratio_to_best_fp16": "time / best fp16", "ratio_to_fp16": "time / fp16", "gbps": "GB/s", "copy_share": "of copy",
    "share_of_prefill": "of the layer's prefill", "resident_bytes": "bytes held", "memory_saved": "times less",
    "peak_bytes": "bytes at most", "error": "error", "reason": "why not",
}  # fmt: skip
"""Columns of a benchmark's tables, where its rows have them."""
LEVELS = {
    "kernel": "Decode attention of one layer", "encode": "Encoding a prompt, one layer", "model": "One decode step",
}  # fmt: skip


def cache_name(preset: str) -> str:
    """The name of a row's cache; runs of earlier versions call the uncompressed one "baseline"."""
    return UNCOMPRESSED if preset == "baseline" else preset


def about(found: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """What a run measured, and with what: sentences from its metrics and from what `read_about` found."""
    keys = ("model", "text", "context", "windows", "rows", "queries", "copy_gbps")
    parts = [f"{k}: {cell(metrics[k])}" for k in keys if isinstance(metrics.get(k), (str, int, float))]
    if isinstance(metrics.get("baseline"), Mapping):
        figures = metrics["baseline"].items()
        parts += [f"{UNCOMPRESSED} {k}: {cell(v)}" for k, v in figures if isinstance(v, (int, float))]
    versions = {**(metrics.get("versions") or {}), **found}
    packages = (f"{name} {versions[name]}" for name in ("turboquant_hf", "transformers", "torch") if versions.get(name))
    conditions = {
        "date": found.get("date"),
        "hardware": metrics.get("device") or found.get("hardware"),
        "versions": ", ".join(packages),
        "dtype": metrics.get("dtype") or found.get("dtype"),
        "recent window": _recent_windows(metrics, found),
    }
    setup = "; ".join(f"{name}: {value}" for name, value in conditions.items() if value not in (None, ""))
    return [text for text in ("; ".join(parts), setup) if text]


def _recent_windows(metrics: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Newest tokens that the caches keep raw: one number where they agree."""
    windows = metrics.get("recent_windows") or {}
    if len(set(windows.values())) > 1:
        return ", ".join(f"{name} {tokens}" for name, tokens in windows.items())
    tokens = next(iter(windows.values()), found.get("recent_window"))
    return None if tokens is None else f"{tokens} tokens"


def plain_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Any list of rows: its scalars, with mappings one level down as columns of their own."""
    flat = []
    for row in rows:
        wide = {}
        for key, value in row.items():
            wide |= {f"{key} {k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        flat.append({k: v for k, v in wide.items() if v is None or isinstance(v, (str, int, float))})
    keys = list(dict.fromkeys(key for row in flat for key in row))
    return Table(keys, [[row.get(key) for key in keys] for row in flat])


def speed_tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each level of a benchmark, of the columns that its rows fill."""
    tables = []
    for level in dict.fromkeys(row["level"] for row in results):
        rows = [row for row in results if row["level"] == level]
        keys = [key for key in SPEED if any(row.get(key) is not None for row in rows)]
        lines = [[row.get(key) for key in keys] for row in rows]
        tables.append(Table([SPEED[key] for key in keys], lines, LEVELS.get(level, level)))
    return tables


def task_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One line a cache (and length): the score of every task and their mean."""
    tasks = list(dict.fromkeys(row["task"] for row in results))
    scores: dict[tuple[str, Any], dict[str, float]] = {}
    for row in results:
        scores.setdefault((cache_name(row["preset"]), row.get("length")), {})[row["task"]] = row["score"]
    rows = [
        [preset, length, *(own.get(task) for task in tasks), sum(own.values()) / len(own)]
        for (preset, length), own in scores.items()
    ]
    return Table(["cache", "tokens", *tasks, "mean"], rows, "score in percent")


def _grids(results: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[tuple[int, float], float]]:
    grids: dict[str, dict[tuple[int, float], float]] = {}
    styles = {row.get("style") for row in results}
    for row in results:
        name = cache_name(row["preset"])
        name = name if len(styles) == 1 else f"{name}, {row.get('style')}"
        if row.get(key) is not None:
            grids.setdefault(name, {})[row["length"], row["depth"]] = row[key]
    return grids


def needle_tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Means over the depths, by length: needles found, and how unlikely the right answer was."""
    lengths = sorted({row["length"] for row in results})
    tables = []
    for key, caption in (("accuracy", "share of needles found"), ("nll", "nats a token of the right answer")):
        rows = []
        for name, grid in _grids(results, key).items():
            by_length = [[value for (length, _), value in grid.items() if length == wanted] for wanted in lengths]
            rows.append([name, *(sum(own) / len(own) if own else None for own in by_length)])
        if rows:
            header = ["cache", *(f"{length:,} tokens" for length in lengths)]
            tables.append(Table(header, rows, f"{caption}, mean over depths"))
    return tables


def heatmaps(results: Sequence[Mapping[str, Any]]) -> bytes:
    stream = io.BytesIO()
    plot_heatmaps(stream, _grids(results, "accuracy"))
    return stream.getvalue()


LABEL_SHIFTS = (3, *(sign * step for step in range(8, 400, 8) for sign in (-1, 1)))


def _meet(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Whether two labels (left, height, length) overlap."""
    return abs(one[1] - other[1]) < 8 and one[0] < other[0] + other[2] and other[0] < one[0] + one[2]


def pareto(points: Mapping[str, tuple[float, float]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    places = list(points.values())
    front = pareto_front(places)
    axis.scatter(*zip(*places, strict=True), color="0.6", s=24)
    axis.plot(*zip(*(places[i] for i in front), strict=True), "o-", color="C0", label="Pareto front")
    axis.set(
        yscale="log", xlabel="real bits per channel, mean of keys and values", ylabel="KL to the uncompressed model"
    )
    axis.margins(x=0.12)
    figure.draw_without_rendering()
    taken: list[tuple[float, float, float]] = []
    for index in sorted(range(len(places)), key=lambda i: (i not in front, -places[i][1])):
        name, (x, y) = list(points)[index], axis.transData.transform(places[index]) * 72 / figure.dpi
        # The first height, in points, at which the label covers none that is written: about 4 by 8 points a letter.
        free = (s for s in LABEL_SHIFTS if not any(_meet((x, y + s, 4 * len(name)), other) for other in taken))
        shift = next(free, LABEL_SHIFTS[0])
        taken.append((x, y + shift, 4 * len(name)))
        color = "C0" if index in front else "0.4"
        axis.annotate(name, places[index], textcoords="offset points", xytext=(5, shift), fontsize=7, color=color)
    axis.grid(alpha=0.3)
    axis.legend()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, metadata={"Software": None})
    return stream.getvalue()
