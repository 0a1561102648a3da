"""The first sections of a report: one row per preset over all runs, the Pareto plot, and memory by context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from turboquant_hf.config import load_preset, preset_names
from turboquant_hf.evaluation.harness.tables import size
from turboquant_hf.evaluation.presets.memory import MEMORY_NOTE, memory_cell
from turboquant_hf.evaluation.report.finished import FinishedRun
from turboquant_hf.evaluation.report.page import Section, Table
from turboquant_hf.evaluation.report.pareto import draw_pareto, pareto_front

FIDELITY = {
    "preset": "preset", "key_bits": "K bits", "value_bits": "V bits", "compression_ratio": "times smaller, in use",
    "perplexity": "perplexity", "kl": "KL", "top1": "top-1 agreement",
}  # fmt: skip
"""Columns of the fidelity tables."""
EXTRAS = {
    "needle": "needles found", "retrieval": "retrieval, %", "saved": "memory held, times less",
    "step": "step time / uncompressed",
}  # fmt: skip
"""Columns of the summary that other runs fill."""
SUMMARIZED = ("benchmark", "perplexity", "needle", "retrieval", "baselines")
"""Commands whose rows are presets."""
MEMORY_TOKENS = (512, 2048, 8192, 32768, 131072)
HEAD_DIMS = (64, 128)
LAYERS, KV_HEADS = 32, 8


def summary(runs: Sequence[FinishedRun]) -> Section:
    """One row per preset with its cost and quality, and the Pareto plot.

    KL and perplexity can be compared only on one text. They come from the perplexity run with the most presets, or from
    a run of baselines if there is none. The rows of other experiments are not presets.
    """
    found = {run.folder: (run, _by_preset(run)) for run in runs if run.tool in SUMMARIZED}
    main, _ = max(
        found.values(),
        key=lambda item: (item[0].tool == "perplexity", sum("kl" in row for row in item[1].values())),
        default=(None, {}),
    )
    section = Section("Summary")
    model = main.metrics.get("model") if main else None
    others = [run for run, _ in found.values() if model and run.metrics.get("model") not in (None, model)]
    if others:
        names = ", ".join(run.folder.name for run in others)
        section.notes.append(f"Of {model}; runs of other models are only below: {names}.")
    rows: dict[str, dict[str, Any]] = {}
    for run, own in sorted(found.values(), key=lambda item: item[0] is not main):
        if run in others:
            continue
        for name, row in own.items():
            kept = row if run is main else {k: v for k, v in row.items() if k not in FIDELITY}
            if kept:
                rows[name] = {**kept, **rows.get(name, {})}
    titles = {**FIDELITY, **EXTRAS}
    keys = [k for k in titles if k != "preset" and any(k in row for row in rows.values())]
    if keys:
        lines = [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]
        section.tables.append(Table(["preset", *(titles[k] for k in keys)], lines))
    if main and any("kl" in row for row in rows.values()):
        section.notes.append(
            f"Perplexity and KL are those of {main.folder.name}; texts and lengths are with the runs below."
        )
    _add_pareto(section, rows)
    return section


def _add_pareto(section: Section, rows: dict[str, dict[str, Any]]) -> None:
    points = {
        name: ((row["key_bits"] + row["value_bits"]) / 2, row["kl"])
        for name, row in rows.items()
        if row.get("kl") and "key_bits" in row
    }
    if points:
        section.pictures.append(("KL against real bits per channel", draw_pareto(points)))
        names = list(points)
        front = ", ".join(names[i] for i in pareto_front(list(points.values())))
        section.notes.append(f"On the Pareto front, fewest bits first: {front}.")


def _by_preset(run: FinishedRun) -> dict[str, dict[str, Any]]:
    """{preset: the columns of the summary that this run can fill}."""
    found: dict[str, dict[str, Any]] = {}
    means: dict[tuple[str, str], list[float]] = {}
    largest: dict[str, int] = {}
    if run.tool == "benchmark" and str(run.metrics.get("device", "")).startswith("CPU"):
        return {}  # times of a CPU, and savings relative to its float32, cannot be compared with those of a GPU
    for row in run.rows:
        if not row.get("preset"):
            continue
        name = run.label(row["preset"])
        own = found.setdefault(name, {})
        own |= {key: row[key] for key in list(FIDELITY)[1:] if "kl" in row and key in row}
        for key, column in (("accuracy", "needle"), ("score", "retrieval")):
            if run.tool == column and row.get(key) is not None:
                means.setdefault((name, column), []).append(row[key])
        cells = row.get("batch", 0) * row.get("tokens", 0)
        if row.get("level") == "model" and "memory_saved" in row and cells >= largest.get(name, 0):
            largest[name] = cells
            own |= {"saved": row["memory_saved"], "step": row.get("ratio_to_fp16")}
    for (name, column), values in means.items():
        found[name][column] = sum(values) / len(values)
    return {name: own for name, own in found.items() if own}


def memory(summarized: Section) -> Section:
    """The memory of a whole cache relative to a 16-bit cache, by length and head dim, for the shipped presets."""
    shipped = set(preset_names())
    names = [row[0] for table in summarized.tables for row in table.rows if row[0] in shipped]
    section = Section("Memory")
    if not names:
        return section
    section.notes.append(
        f"{MEMORY_NOTE} One sequence in bfloat16, {LAYERS} layers of {KV_HEADS} KV heads. Scales, means, sinks, the "
        "recent window, statistics and rotations are counted in both."
    )
    for dim in HEAD_DIMS:
        rows = []
        for name in names:
            preset = load_preset(name)
            rows.append([name, *(memory_cell(preset, dim, tokens, LAYERS, KV_HEADS) for tokens in MEMORY_TOKENS)])
        section.tables.append(Table(["preset", *map(size, MEMORY_TOKENS)], rows, f"heads of {dim} channels"))
    return section
