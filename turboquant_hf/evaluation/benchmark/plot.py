"""Time against context length, both on log axes, beside the time that the bytes alone need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
MARKERS = "os^vDP*X<"
COLUMNS = 3
BASELINES = ("DynamicCache", "StaticCache", "sdpa", "decoder layer")
TITLES = {
    "kernel": ("decode attention of one layer", "us a call"),
    "encode": ("packing a prompt, one layer", "ms"),
    "model": ("one decode step", "ms a step"),
}


def plot_level(rows: Sequence[Mapping[str, Any]], level: str, path: Path, about: str = "") -> bool:
    """Write a PNG with one panel a (shape, dtype, batch); False where no row of this level has a time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    unit = "us" if level == "kernel" else "ms"
    rows = [row for row in rows if row["level"] == level and row.get(unit) is not None]
    panels = sorted({_panel(row) for row in rows}, key=str)
    if not panels:
        return False
    labels = list(dict.fromkeys(_label(row) for row in sorted(rows, key=_rank)))
    styles = {label: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % 9]} for i, label in enumerate(labels)}
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 2.4, 3.7 * lines + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        own = [row for row in rows if _panel(row) == panel]
        for label in labels:
            points = sorted((row["tokens"], row[unit]) for row in own if _label(row) == label)
            if points:
                dash = "--" if label.startswith(BASELINES) else "-"
                axis.plot(*zip(*points, strict=True), dash, ms=5, label=label, **styles[label])
        _floors(axis, own, level)
        lengths = sorted({row["tokens"] for row in own})
        axis.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel=TITLES[level][1])
        axis.set_xticks(lengths, [_tokens(length) for length in lengths])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = axis.get_ylim()
        axis.yaxis.set_minor_formatter(
            NullFormatter() if high / low > 20 else FuncFormatter(lambda value, _: f"{value:g}")
        )
        axis.tick_params(axis="both", which="both", labelsize=8)
        shape, dtype, batch = panel
        axis.set_title(f"{shape}, {dtype}, batch {batch}", fontsize=10)
        axis.grid(alpha=0.3, which="both")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {}
    for axis in axes[: len(panels)]:
        found, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{TITLES[level][0]}{', ' + about if about else ''}", fontsize=11)
    figure.savefig(path, metadata={"Software": None})
    return True


def _floors(axis, rows: Sequence[Mapping[str, Any]], level: str) -> None:
    """Dotted: bytes over copy bandwidth, 16-bit and (the lightest preset of the panel) packed; no other work."""
    floor = "floor_us" if level == "kernel" else "floor_ms"
    kinds = {"floor, 16 bit": [r for r in rows if r.get("preset") is None]}
    for preset in sorted({r["preset"] for r in rows if r.get("preset")}):
        kinds[f"floor, {preset}"] = [r for r in rows if r.get("preset") == preset]
    greys = iter(("0.25", "0.45", "0.6", "0.7", "0.8"))
    for label, chosen in kinds.items():
        best: dict[int, float] = {}
        for row in chosen:
            if row.get(floor) is not None and not str(row.get("cache", "")).startswith("QuantizedCache"):
                best[row["tokens"]] = min(row[floor], best.get(row["tokens"], float("inf")))
        if best:
            points = sorted(best.items())
            axis.plot(
                *zip(*points, strict=True), ":", color=next(greys, "0.8"), lw=1.6, marker="_", ms=6, label=label
            )


def _panel(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["shape"], row["dtype"], row["batch"]


def _label(row: Mapping[str, Any]) -> str:
    """What one line shows: the cache or the backend, its preset, and whether it was compiled."""
    name = row.get("cache") or row["backend"]
    parts = [row["preset"], name] if row.get("preset") and not row.get("cache") else [name, row.get("preset")]
    return " ".join(part for part in parts if part) + (", compiled" if row.get("mode") == "compiled" else "")


def _rank(row: Mapping[str, Any]) -> tuple[int, str]:
    return int(not _label(row).startswith(BASELINES)), _label(row)


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"
