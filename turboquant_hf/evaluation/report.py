"""One page from the metrics.json files of any runs: a self-contained HTML file, and Markdown without the pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from turboquant_hf.config import load_preset, preset_names
from turboquant_hf.evaluation import report_parts
from turboquant_hf.evaluation.ablate import pareto_front
from turboquant_hf.evaluation.environment import read_about
from turboquant_hf.evaluation.page import Section, Table, to_html, to_markdown
from turboquant_hf.evaluation.presets import expected_compression

FIDELITY = {
    "preset": "preset", "key_bits": "K bits", "value_bits": "V bits", "compression_ratio": "times smaller",
    "perplexity": "perplexity", "kl": "KL", "top1": "top-1 agreement",
}  # fmt: skip
"""Columns of the fidelity tables; a run whose rows have a `kl` gets one."""
EXTRAS = {
    "needle": "needles found", "retrieval": "retrieval, %", "saved": "memory held, times less",
    "step": "step time / fp16",
}  # fmt: skip
"""Columns of the summary that other runs fill."""
MEMORY_TOKENS = (4096, 32768, 131072)
HEAD_DIMS = (64, 128)
ORDER = ("benchmark", "perplexity", "needle", "retrieval", "longbench", "baselines", "ablate", "allocate", "distortion")
SUMMARIZED = ("benchmark", "perplexity", "needle", "retrieval", "baselines")
"""Commands whose rows are presets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders, or folders of run folders")
    parser.add_argument(
        "--output", type=Path, default=Path("report"), help="folder for report.html and report.md (%(default)s)"
    )
    parser.add_argument("--title", default="KV cache evaluation")


def run(args: argparse.Namespace) -> int:
    """Read, write report.html and report.md; 0 when done."""
    runs = read_runs(args.folders)
    sections = build(runs)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.html", to_html(args.title, sections)),
        ("report.md", to_markdown(args.title, sections)),
    ):
        (args.output / name).write_text(text, encoding="utf-8")
        print(f"Wrote {args.output / name} ({len(runs)} runs)")
    return 0


def read_runs(folders: Iterable[Path]) -> dict[Path, dict[str, Any]]:
    """Run folder -> its metrics, in the order of the page.

    Raises:
        ValueError: where no metrics.json lies under the folders, or one cannot be read.
    """
    runs = {}
    for path in sorted({path for folder in folders for path in folder.rglob("metrics.json")}):
        try:
            runs[path.parent] = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not supported: {error}") from None
        if not isinstance(runs[path.parent], dict):
            raise ValueError(f"{path} is not supported: it holds no mapping")
    if not runs:
        raise ValueError(f"no metrics.json under {', '.join(map(str, folders))}")
    return dict(sorted(runs.items(), key=lambda item: _rank(*item)))


def _rank(folder: Path, metrics: Mapping[str, Any]) -> tuple[int, str]:
    kind = kind_of(metrics)
    return (ORDER.index(kind) if kind in ORDER else len(ORDER)), str(folder)


def kind_of(metrics: Mapping[str, Any]) -> str:
    """Which command wrote this: what it says itself, else by what its rows hold."""
    row = next(iter(_results(metrics)), {})
    if "tool" in metrics:
        return str(metrics["tool"])
    if {"length", "depth", "accuracy"} <= row.keys():
        return "needle"
    if {"task", "score"} <= row.keys():
        return "longbench" if "category" in row else "retrieval"
    return "perplexity" if "kl" in row else ""


def build(runs: Mapping[Path, Mapping[str, Any]]) -> list[Section]:
    """A summary over all runs, memory by context, then a section a run."""
    summary = _summary(runs)
    sections = [summary, _memory(summary), *(_section(folder, metrics) for folder, metrics in runs.items())]
    return [section for section in sections if not section.empty]


def _summary(runs: Mapping[Path, Mapping[str, Any]]) -> Section:
    """One row a preset: what it costs and what it keeps, and the Pareto plot.

    KL and perplexity compare only on one text: they come from the perplexity run that measured the most presets, or
    from one of baselines where there is none. What other experiments compare are no presets.
    """
    found = {f: _by_preset(m) for f, m in runs.items() if kind_of(m) in SUMMARIZED}
    most = max(
        found,
        key=lambda folder: (kind_of(runs[folder]) == "perplexity", sum("kl" in row for row in found[folder].values())),
        default=None,
    )
    rows: dict[str, dict[str, Any]] = {}
    section = Section("Summary")
    model = runs[most].get("model") if most is not None else None
    others = [f for f in found if model and runs[f].get("model") not in (None, model)]
    if others:
        names = ", ".join(folder.name for folder in others)
        section.notes.append(f"Of {model}; runs of other models are only below: {names}.")
    mine = [folder for folder in found if folder not in others]
    for folder in sorted(mine, key=lambda folder: folder != most):
        for name, row in found[folder].items():
            kept = row if folder == most else {k: v for k, v in row.items() if k not in FIDELITY}
            if kept:
                rows[name] = {**kept, **rows.get(name, {})}
    titles = {**FIDELITY, **EXTRAS}
    keys = [k for k in titles if k != "preset" and any(k in row for row in rows.values())]
    if keys:
        lines = [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]
        section.tables.append(Table(["preset", *(titles[k] for k in keys)], lines))
    if any("kl" in row for row in rows.values()):
        section.notes.append(f"Perplexity and KL are those of {most.name}; texts and lengths are with the runs below.")
    points = {
        n: ((r["key_bits"] + r["value_bits"]) / 2, r["kl"]) for n, r in rows.items() if r.get("kl") and "key_bits" in r
    }
    if points:
        section.pictures.append(("KL against real bits per channel", report_parts.pareto(points)))
        names = list(points)
        front = ", ".join(names[i] for i in pareto_front(list(points.values())))
        section.notes.append(f"On the Pareto front, fewest bits first: {front}.")
    return section


def _by_preset(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """preset -> the summary's columns that this run can fill."""
    found: dict[str, dict[str, Any]] = {}
    means: dict[tuple[str, str], list[float]] = {}
    kind, largest = kind_of(metrics), {}
    if kind == "benchmark" and str(metrics.get("device", "")).startswith("CPU"):
        return {}  # neither the times of a CPU nor savings beside its float32 belong beside a GPU's
    for row in _results(metrics):
        if not row.get("preset"):
            continue
        name = report_parts.cache_name(row["preset"])
        own = found.setdefault(name, {})
        own |= {key: row[key] for key in list(FIDELITY)[1:] if "kl" in row and key in row}
        for key, column in (("accuracy", "needle"), ("score", "retrieval")):
            if kind == column and row.get(key) is not None:
                means.setdefault((name, column), []).append(row[key])
        size = row.get("batch", 0) * row.get("tokens", 0)
        if row.get("level") == "model" and "memory_saved" in row and size >= largest.get(name, 0):
            largest[name] = size
            own |= {"saved": row["memory_saved"], "step": row.get("ratio_to_fp16")}
    for (name, column), values in means.items():
        found[name][column] = sum(values) / len(values)
    return {name: own for name, own in found.items() if own}


def _memory(summary: Section) -> Section:
    """Shipped presets of the summary: how many times smaller a whole cache is, from the byte layout."""
    shipped = set(preset_names())
    names = [row[0] for table in summary.tables for row in table.rows if row[0] in shipped]
    section = Section("Memory")
    rows = []
    for name in names:
        preset = load_preset(name)
        places = [(dim, tokens) for dim in HEAD_DIMS for tokens in MEMORY_TOKENS]
        rows.append([name, *(round(expected_compression(preset, *place, 32, 8), 2) for place in places)])
    if rows:
        header = ["preset", *(f"{tokens // 1024}k, d {dim}" for dim in HEAD_DIMS for tokens in MEMORY_TOKENS)]
        section.tables.append(Table(header, rows))
        section.notes.append(
            "Times smaller than a 16-bit cache: 32 layers of 8 KV heads of d channels, one sequence. Scales, means, "
            "sinks, the recent window, statistics and rotations are counted; room allocated ahead is not."
        )
    return section


def _section(folder: Path, metrics: Mapping[str, Any]) -> Section:
    results, kind = _results(metrics), kind_of(metrics)
    section = Section(folder.name if kind in ("", folder.name) else f"{kind} ({folder.name})")
    about = report_parts.about(read_about(folder), metrics)
    findings = list(metrics.get("findings", []))
    if results and kind == "needle":
        section.tables += report_parts.needle_tables(results)
        section.pictures.append(("needles found by length and depth", report_parts.heatmaps(results)))
    elif results and "level" in results[0]:
        section.tables += report_parts.speed_tables(results)
    elif results and "task" in results[0]:
        section.tables.append(report_parts.task_table(results))
    elif results and {"preset", "kl"} <= results[0].keys():
        keys = [key for key in FIDELITY if key in results[0]]
        section.tables.append(Table([FIDELITY[k] for k in keys], [[row.get(k) for k in keys] for row in results]))
    elif results:
        section.tables.append(report_parts.plain_table(results))
    for more in filter(None, (metrics.get("pruned"), metrics.get("layer"))):
        section.tables.append(report_parts.plain_table(more))
    if kind != "needle":
        section.pictures += [(path.stem, path.read_bytes()) for path in sorted(folder.glob("*.png"))]
    if section.tables or section.pictures or findings:
        section.notes += [*about, *findings]
    return section


def _results(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = metrics.get("results", [])
    return results if isinstance(results, list) and all(isinstance(row, dict) for row in results) else []
