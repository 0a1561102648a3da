"""Draws README's picture from a table of docs/results.md: KL against bits per channel, one point per method.

    python docs/figures/quality.py [FOLDER]

writes quality-light.png and quality-dark.png to FOLDER (default: the folder of this file). The table is the one under
"Beside other methods"; the command that measured it stands above it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

HERE = Path(__file__).parent
HEADING = "## Beside other methods"
OURS = ("k4v4", "k3v3", "k2v2")
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0", "ours": "#0969da"},
    "dark": {"paper": "#0d1117", "ink": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d", "ours": "#58a6ff"},
}
SHORT = {
    "KIVI, 4 bits (`kivi-4`)": "KIVI 4",
    "KIVI, 2 bits": "KIVI 2",
    "KVQuant-style, 4 bits, 1 % outliers": "KVQuant-style 4",
    "KVQuant-style, 3 bits, 1 % outliers": "KVQuant-style 3",
    "`turbo4` of llama.cpp forks": "turbo4 (llama.cpp forks)",
    "paper-mse-4": "TurboQuant paper 4",
    "paper-mse-2": "TurboQuant paper 2",
    "paper-prod-4 (with QJL)": "TurboQuant paper 4, with QJL",
    "paper's 3.5 bits (outlier split)": "TurboQuant paper 3.5",
    "paper's 2.5 bits": "TurboQuant paper 2.5",
    "transformers QuantizedCache, HQQ, 4 bits": "HQQ 4",
    "transformers QuantizedCache, quanto, 4 bits": "quanto 4",
    "HQQ, 2 bits": "HQQ 2",
    "quanto, 2 bits": "quanto 2",
}
"""Labels of the methods whose name in the table is long."""
LABEL_PLACES = {
    "KIVI 4": "left", "HQQ 4": "above", "quanto 4": "below", "HQQ 2": "left", "TurboQuant paper 4": "left",
    "TurboQuant paper 2": "above",
}  # fmt: skip
"""Where a label stands beside its point: to the right where nothing is said."""
OFFSETS = {"right": (7, -3, "left"), "left": (-7, -3, "right"), "below": (0, -14, "center"), "above": (0, 7, "center")}


def read_points(page: Path) -> dict[str, tuple[float, float]]:
    """Label -> (bits per channel, KL) of every row of the first table below `HEADING`."""
    paragraphs = page.read_text(encoding="utf-8").split(HEADING)[1].split("\n\n")
    table = next(paragraph for paragraph in paragraphs if paragraph.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {SHORT.get(name, name): (float(bits), float(kl)) for name, bits, kl, *_ in rows[2:]}


def draw(points: dict[str, tuple[float, float]], colors: dict[str, str], path: Path) -> None:
    figure = Figure(figsize=(9, 5.2), layout="constrained", facecolor=colors["paper"])
    axis = figure.subplots()
    axis.set_facecolor(colors["paper"])
    rivals = [place for name, place in points.items() if name not in OURS]
    axis.scatter(*zip(*rivals, strict=True), s=34, color=colors["faint"], label="other methods", zorder=2)
    ours = sorted(points[name] for name in OURS)
    axis.plot(*zip(*ours, strict=True), "o-", ms=9, lw=2, color=colors["ours"], label="this project", zorder=3)
    for name, place in points.items():
        own = name in OURS
        x, y, side = OFFSETS["below"] if own else OFFSETS[LABEL_PLACES.get(name, "right")]
        style = {"fontsize": 12, "fontweight": "bold"} if own else {"fontsize": 9}
        axis.annotate(
            name, place, xytext=(x - 12 * own, y - 3 * own), textcoords="offset points", ha=side,
            color=colors["ours" if own else "ink"], **style,
        )  # fmt: skip
    axis.set(yscale="log", xlim=(1.9, 5.4), ylim=(0.0008, 4))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda kl, _: f"{kl:g}"))
    axis.set_xlabel("bits per channel, mean of keys and values, scales and means counted", color=colors["ink"])
    axis.set_ylabel("KL from the uncompressed model (lower is better)", color=colors["ink"])
    axis.grid(color=colors["grid"], lw=0.6)
    axis.tick_params(which="both", colors=colors["ink"])
    for spine in axis.spines.values():
        spine.set_color(colors["grid"])
    axis.legend(loc="upper right", facecolor=colors["paper"], edgecolor=colors["grid"], labelcolor=colors["ink"])
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(folder: Path = HERE) -> None:
    points = read_points(HERE.parent / "results.md")
    for theme, colors in THEMES.items():
        draw(points, colors, folder / f"quality-{theme}.png")
        print(f"Wrote {folder / f'quality-{theme}.png'} ({len(points)} methods)")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
