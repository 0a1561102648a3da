"""Pictures of time against context length, on log axes, with the time that reading the bytes needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turboquant_hf.evaluation.labels import LEVELS, UNCOMPRESSED, cache_label

COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")
"""One colour per preset, also for its floor. Uncompressed lines are black and grey."""
GREYS = ("0.0", "0.35", "0.55", "0.7", "0.8")
MARKERS = "os^vDPX<>"
"""One marker per cache or backend."""
COLUMNS = 3
BASELINES = ("DynamicCache", "StaticCache", "sdpa", "decoder layer")


def plot_level(rows: Sequence[Mapping[str, Any]], level: str, path: Path, about: str = "") -> bool:
    """Write a PNG with one panel per (shape, dtype, batch). Returns False if no row of this level has a time."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    unit = "us" if level == "kernel" else "ms"
    rows = [row for row in rows if row["level"] == level and row.get(unit) is not None]
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    if not panels:
        return False
    labels = list(dict.fromkeys(_label(row) for row in sorted(rows, key=_rank)))
    styles = _styles(rows)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns + 2.4, 3.7 * lines + 0.5), layout="constrained", dpi=110)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        own = [row for row in rows if _panel(row) == panel]
        for label in labels:
            points = sorted((row["tokens"], row[unit]) for row in own if _label(row) == label)
            if points:
                axis.plot(*zip(*points, strict=True), ms=5, label=label, **styles[label])
        _floors(axis, own, level, styles)
        lengths = sorted({row["tokens"] for row in own})
        axis.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel=LEVELS[level].unit)
        axis.set_xticks(lengths, [_tokens(length) for length in lengths])
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 10 * low else range(1, 10)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_locator(NullLocator())
        axis.tick_params(axis="both", which="both", labelsize=8)
        shape, dtype, batch = panel
        axis.set_title(f"{shape}, {dtype}, batch {batch}", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = {}
    for axis in axes[: len(panels)]:
        found, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    # On the left: a long centred title would run under the legend of a single panel.
    heading = "\n".join(filter(None, (LEVELS[level].title, about)))
    figure.suptitle(heading, fontsize=11, x=0.01, horizontalalignment="left")
    figure.savefig(path, metadata={"Software": None})
    return True


def _styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{label: style}: colour by preset, marker by cache or backend, dashes for compiled steps."""
    presets = list(dict.fromkeys(row["preset"] for row in rows if row.get("preset")))
    names = list(dict.fromkeys(row.get("cache") or row["backend"] for row in rows))
    plain = list(dict.fromkeys(row.get("cache") or row["backend"] for row in rows if not row.get("preset")))
    styles = {}
    for row in rows:
        name, preset = row.get("cache") or row["backend"], row.get("preset")
        color = COLORS[presets.index(preset) % len(COLORS)] if preset else GREYS[min(plain.index(name), len(GREYS) - 1)]
        styles[_label(row)] = {
            "color": color, "marker": MARKERS[names.index(name) % len(MARKERS)],
            "linestyle": "--" if row.get("mode") == "compiled" else "-",
        }  # fmt: skip
    return styles


def _floors(axis, rows: Sequence[Mapping[str, Any]], level: str, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the floors: bytes divided by copy bandwidth, dotted, in the colour of the lines that they bound."""
    unit = "floor_us" if level == "kernel" else "floor_ms"
    floors: dict[str | None, dict[int, float]] = {}
    for row in rows:
        if row.get(unit) is not None and not str(row.get("cache", "")).startswith("QuantizedCache"):
            own = floors.setdefault(row.get("preset"), {})
            own[row["tokens"]] = min(row[unit], own.get(row["tokens"], float("inf")))
    whole = cache_label(UNCOMPRESSED, rows[0].get("dtype"))
    for preset, points in floors.items():
        colors = [styles[_label(row)]["color"] for row in rows if row.get("preset") == preset]
        color = GREYS[0] if preset is None else colors[0]
        style = {"color": color, "marker": "_", "label": f"floor, {preset or whole}"}
        axis.plot(*zip(*sorted(points.items()), strict=True), ":", lw=1.5, ms=7, **style)


def _panel(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["shape"], row["dtype"], row["batch"]


def _label(row: Mapping[str, Any]) -> str:
    """The label of a line: the cache or backend, its preset, and whether it was compiled."""
    name = row.get("cache") or row["backend"]
    parts = [row["preset"], name] if row.get("preset") and not row.get("cache") else [name, row.get("preset")]
    return " ".join(part for part in parts if part) + (", compiled" if row.get("mode") == "compiled" else "")


def _rank(row: Mapping[str, Any]) -> tuple[int, str]:
    return int(not _label(row).startswith(BASELINES)), _label(row)


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"
