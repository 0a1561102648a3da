"""One page from the metrics.json files of any runs: a self-contained HTML file, and Markdown without the pictures."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turboquant_hf.evaluation.ablate import pareto_front
from turboquant_hf.evaluation.heatmap import plot_heatmap

FIDELITY = {
    "preset": "preset", "key_bits": "K bits", "value_bits": "V bits", "compression_ratio": "times smaller",
    "perplexity": "perplexity", "kl": "KL", "top1": "top-1 agreement",
}  # fmt: skip
"""Columns of the fidelity tables; a run whose rows have a `kl` gets one."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; font-variant-numeric: tabular-nums }
th:first-child, .text { text-align: left } th { background: #f4f4f4 } img { max-width: 100% }
.grid { display: flex; flex-wrap: wrap; gap: 1rem } .grid img { max-width: 32rem } .note { color: #555 }
"""


@dataclass
class Section:
    """A heading with sentences, tables (header, rows) and pictures (title, PNG)."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[tuple[list[str], list[list[Any]]]] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders, or folders of run folders")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder for report.html and report.md")
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
    """Run folder -> its metrics.

    Raises:
        ValueError: where no metrics.json lies under the folders, or one cannot be read.
    """
    runs = {}
    for path in sorted({path for folder in folders for path in folder.rglob("metrics.json")}):
        try:
            runs[path.parent] = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not supported: {error}") from None
    if not runs:
        raise ValueError(f"no metrics.json under {', '.join(map(str, folders))}")
    return runs


def build(runs: Mapping[Path, Mapping[str, Any]]) -> list[Section]:
    """A summary over all runs, then a section a run."""
    sections = [section for folder, metrics in runs.items() for section in [_section(folder, metrics)]]
    summary = _summary(runs)
    return [summary, *sections] if summary.tables else sections


def _summary(runs: Mapping[Path, Mapping[str, Any]]) -> Section:
    """One row a preset: what it costs and what it keeps, and the Pareto plot.

    KL and perplexity compare only on one text: they come from the run that measured the most presets. An ablation's
    variants are no presets.
    """
    found = {f: _by_preset(m) for f, m in runs.items() if "section" not in next(iter(_results(m)), {})}
    most = max(found, key=lambda folder: sum("kl" in row for row in found[folder].values()), default=None)
    rows: dict[str, dict[str, Any]] = {}
    for folder in sorted(found, key=lambda folder: folder != most):
        for name, row in found[folder].items():
            kept = row if folder == most else {k: v for k, v in row.items() if k not in FIDELITY}
            if kept:
                rows[name] = {**kept, **rows.get(name, {})}
    section = Section("Summary")
    keys = [k for k in (*list(FIDELITY)[1:], "needle", "speed") if any(k in row for row in rows.values())]
    if keys:
        section.tables.append(
            (["preset", *(FIDELITY.get(k, k) for k in keys)], [[n, *(r.get(k) for k in keys)] for n, r in rows.items()])
        )
        section.notes.append(f"Perplexity and KL are those of {most.name}; texts and lengths are with the runs below.")
    points = {
        n: ((r["key_bits"] + r["value_bits"]) / 2, r["kl"]) for n, r in rows.items() if r.get("kl") and "key_bits" in r
    }
    if points:
        section.pictures.append(("KL against real bits per channel", _pareto(points)))
        names = list(points)
        front = ", ".join(names[i] for i in pareto_front(list(points.values())))
        section.notes.append(f"On the Pareto front, fewest bits first: {front}.")
    return section


def _by_preset(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """preset -> the summary's columns that this run can fill."""
    found: dict[str, dict[str, Any]] = {}
    for row in _results(metrics):
        if "preset" not in row:
            continue
        own = found.setdefault(row["preset"], {})
        own |= {key: row[key] for key in list(FIDELITY)[1:] if "kl" in row and key in row}
        if "depth" in row and row.get("accuracy") is not None:
            own.setdefault("_found", []).append(row["accuracy"])
        speed = next((k for k in row if k.endswith("per_second")), None)
        if speed and isinstance(row[speed], (int, float)):
            own["speed"] = row[speed]
    for own in found.values():
        if accuracies := own.pop("_found", None):
            own["needle"] = sum(accuracies) / len(accuracies)
    return {name: own for name, own in found.items() if own}


def _section(folder: Path, metrics: Mapping[str, Any]) -> Section:
    results = _results(metrics)
    section = Section(f"{metrics.get('tool', folder.name)}")
    about = [
        f"{k}: {metrics[k]}"
        for k in ("model", "text", "context", "windows", "rows", "queries")
        if isinstance(metrics.get(k), (str, int))
    ]
    if isinstance(metrics.get("baseline"), Mapping):
        about += [
            f"uncompressed {k}: {_cell(v)}" for k, v in metrics["baseline"].items() if isinstance(v, (int, float))
        ]
    section.notes += ["; ".join(about)] if about else []
    section.notes += metrics.get("findings", [])
    if results and {"length", "depth", "accuracy"} <= set(results[0]):
        section.tables.append(_needle_table(results))
        section.pictures += _heatmaps(results)
        return section
    if results and "kl" in results[0]:
        keys = [key for key in FIDELITY if key in results[0]]
        section.tables.append(([FIDELITY[k] for k in keys], [[row.get(k) for k in keys] for row in results]))
    elif results:
        section.tables.append(_plain_table(results))
    section.pictures += [(path.stem, path.read_bytes()) for path in sorted(folder.glob("*.png"))]
    return section


def _results(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = metrics.get("results", [])
    return results if isinstance(results, list) and all(isinstance(row, dict) for row in results) else []


def _plain_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Any list of rows: its scalars, with mappings one level down as columns of their own."""
    flat = []
    for row in rows:
        wide = {}
        for key, value in row.items():
            wide |= {f"{key} {k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
        flat.append({k: v for k, v in wide.items() if v is None or isinstance(v, (str, int, float))})
    keys = list(dict.fromkeys(key for row in flat for key in row))
    return keys, [[row.get(key) for key in keys] for row in flat]


def _grids(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[int, float], float]]:
    grids: dict[str, dict[tuple[int, float], float]] = {}
    styles = {row.get("style") for row in results}
    for row in results:
        name = row["preset"] if len(styles) == 1 else f"{row['preset']}, {row.get('style')}"
        if row["accuracy"] is not None:
            grids.setdefault(name, {})[row["length"], row["depth"]] = row["accuracy"]
    return grids


def _needle_table(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    grids = _grids(results)
    lengths = sorted({row["length"] for row in results})
    rows = []
    for name, grid in grids.items():
        means = [[value for (length, _), value in grid.items() if length == wanted] for wanted in lengths]
        rows.append([name, *(sum(m) / len(m) if m else None for m in means)])
    return ["needle found, mean over depths", *(f"{length} tokens" for length in lengths)], rows


def _heatmaps(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, bytes]]:
    pictures = []
    for name, grid in _grids(results).items():
        stream = io.BytesIO()
        plot_heatmap(stream, grid, name)
        pictures.append((name, stream.getvalue()))
    return pictures


def _pareto(points: Mapping[str, tuple[float, float]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    places = list(points.values())
    front = pareto_front(places)
    axis.scatter(*zip(*places, strict=True), color="0.6", s=24)
    axis.plot(*zip(*(places[i] for i in front), strict=True), "o-", color="C0", label="Pareto front")
    for index, (name, place) in enumerate(points.items()):
        color = "C0" if index in front else "0.4"
        axis.annotate(name, place, textcoords="offset points", xytext=(5, 4), fontsize=7, color=color)
    axis.set(
        yscale="log", xlabel="real bits per channel, mean of keys and values", ylabel="KL to the uncompressed model"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, metadata={"Software": None})
    return stream.getvalue()


def to_html(title: str, sections: Sequence[Section]) -> str:
    """A page with its pictures inside."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
        for header, rows in section.tables:
            parts.append("<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>")
            parts += ["<tr>" + "".join(map(_td, row)) + "</tr>" for row in rows]
            parts.append("</table>")
        if section.pictures:
            images = (
                f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
                for name, data in section.pictures
            )
            parts.append(f"<div{' class=grid' if len(section.pictures) > 1 else ''}>{''.join(images)}</div>")
    return "\n".join(parts) + "\n</html>\n"


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The same words and tables."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.notes
        for header, rows in section.tables:
            lines = ["| " + " | ".join(header) + " |", "|" + " --- |" + " ---: |" * (len(header) - 1)]
            lines += ["| " + " | ".join(_cell(value).replace("|", "\\|") for value in row) + " |" for row in rows]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _td(value: Any) -> str:
    return f"<td{' class=text' if isinstance(value, str) else ''}>{html.escape(_cell(value))}</td>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
