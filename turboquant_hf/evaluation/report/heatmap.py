"""Draws heatmaps of a share by prompt length and needle depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

SHARES, DIFFERENCES = "cividis", "PuOr"
"""Colour maps that colour-blind readers can read: dark to light, and orange to violet."""
CELL = (1.15, 0.62)
"""Width and height of a cell in inches."""

Grid = Mapping[tuple[int, float], float]
"""(length, depth) -> share."""


def plot_heatmap(path: Path | IO[bytes], grid: Grid, title: str, signed: bool = False) -> None:
    """Write a PNG of shares from 0 to 1, or with `signed` of differences of shares, -1 to 1."""
    plot_heatmaps(path, {title: grid}, signed)


def plot_heatmaps(path: Path | IO[bytes], grids: Mapping[str, Grid], signed: bool = False, columns: int = 2) -> None:
    """Write several heatmaps by title into one PNG, with one scale of colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    lengths = sorted({length for grid in grids.values() for length, _ in grid})
    depths = sorted({depth for grid in grids.values() for _, depth in grid})
    across = min(columns, len(grids))
    down = -(-len(grids) // across)
    width, height = max(CELL[0] * len(lengths), 3.6), max(CELL[1] * len(depths), 1.8)
    size = (1.8 + across * (0.9 + width), 0.7 + down * (0.9 + height))
    figure = Figure(figsize=size, layout="constrained", dpi=140)
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, squeeze=False)
    low, colors = (-1, DIFFERENCES) if signed else (0, SHARES)
    for axes, (title, grid) in zip(panels.flat, grids.items(), strict=False):
        values = [[grid.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(values, vmin=low, vmax=1, cmap=colors, aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=11)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=11)
        axes.set_title(title, fontsize=14)
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                _write(axes, column, row, value, signed)
    for axes in panels.flat[len(grids) :]:
        axes.set_axis_off()
    figure.supxlabel("prompt tokens", fontsize=13)
    figure.supylabel("depth of the needle", fontsize=13)
    figure.colorbar(image, ax=panels, fraction=0.04, format=PercentFormatter(1))
    figure.savefig(path, metadata={"Software": None})


def _write(axes, column: int, row: int, value: float, signed: bool) -> None:
    if value != value:
        return
    dark = abs(value) > 0.6 if signed else value < 0.5
    text = f"{value:+.0%}" if signed and value else f"{value:.0%}"
    axes.text(column, row, text, ha="center", va="center", fontsize=12, color="white" if dark else "black")
