"""Heatmaps of a share by prompt length and needle depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def plot_heatmap(path: Path, grid: Mapping[tuple[int, float], float], title: str, signed: bool = False) -> None:
    """Write a PNG of (length, depth) -> share: 0 to 1, or with `signed` a difference of shares, -1 to 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({length for length, _ in grid})
    depths = sorted({depth for _, depth in grid})
    values = [[grid.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    figure = Figure(figsize=(2.6 + 0.75 * len(lengths), 1.6 + 0.42 * len(depths)), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    low, colors = (-1, "RdBu") if signed else (0, "RdYlGn")
    image = axes.imshow(values, vmin=low, vmax=1, cmap=colors, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize=11)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            dark = abs(value) > 0.6 if signed else value < 0.15 or value > 0.9
            text = f"{value:+.0%}" if signed and value else f"{value:.0%}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    figure.colorbar(image, ax=axes)
    figure.savefig(path, metadata={"Software": None})
