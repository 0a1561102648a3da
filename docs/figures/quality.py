"""README's picture: KL against bits per channel, one point per method of a table in docs/results.md.

    python docs/figures/quality.py [FOLDER]

writes quality-light.png and quality-dark.png to FOLDER (default: the folder of this file). The table is the one under
"Beside other methods". It is what

    python docs/figures/quality.py --rows runs/baselines/metrics.json

prints of a run of `turboquant-hf baselines`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

HERE = Path(__file__).parent
HEADING = "## Beside other methods"
OURS = ("k4v4", "k4v3", "k3v3", "k25v25", "k2v2")
SCALAR = ("k4v4-scalar", "k3v3-scalar", "k2v2-scalar")
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0", "ours": "#0969da"},
    "dark": {"paper": "#0d1117", "ink": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d", "ours": "#58a6ff"},
}
OTHERS = {
    "kivi-4": ("KIVI 4", "KIVI, 4 bits"),
    "kivi-2": ("KIVI 2", "KIVI, 2 bits"),
    "kvquant-style-4": ("KVQuant-style 4", "as KVQuant, 4 bits, 1 % outliers"),
    "kvquant-style-3": ("KVQuant-style 3", "as KVQuant, 3 bits, 1 % outliers"),
    "turbo4": ("turbo4 (llama.cpp forks)", "`turbo4` of llama.cpp forks"),
    "paper-mse-4": ("TurboQuant paper 4", "TurboQuant_mse, 4 bits"),
    "paper-mse-2": ("TurboQuant paper 2", "TurboQuant_mse, 2 bits"),
    "paper-prod-4": ("TurboQuant paper 4, with QJL", "TurboQuant_prod, 4 bits, with QJL"),
    "paper-3.5": ("TurboQuant paper 3.5", "TurboQuant, 3.5 bits (outlier split)"),
    "paper-2.5": ("TurboQuant paper 2.5", "TurboQuant, 2.5 bits (outlier split)"),
    "polar-4": ("PolarQuant", "PolarQuant"),
    "transformers-hqq-4": ("HQQ 4", "transformers' QuantizedCache, HQQ, 4 bits"),
    "transformers-hqq-2": ("HQQ 2", "the same, 2 bits"),
    "transformers-quanto-4": ("quanto 4", "transformers' QuantizedCache, quanto, 4 bits"),
    "transformers-quanto-2": ("quanto 2", "the same, 2 bits"),
}
"""Name of a method -> (its label in the picture, what the table says that it is)."""
PLACES = {
    "kivi-4": "left", "transformers-hqq-4": "above", "transformers-hqq-2": "left", "kvquant-style-3": "left",
    "paper-mse-4": "below", "paper-mse-2": "above",
}  # fmt: skip
"""Where labels of other methods stand beside their points, if not to the right."""
OFFSETS = {
    "right": (7, -3, "left"), "left": (-7, -3, "right"), "below": (0, -14, "center"), "above": (0, 7, "center"),
    "corner": (-5, -15, "right"), "raised": (6, 3, "left"),
}  # fmt: skip


def read_points(page: Path) -> dict[str, tuple[float, float]]:
    """Method -> (bits per channel, KL) of every row of the first table below `HEADING`."""
    paragraphs = page.read_text(encoding="utf-8").split(HEADING)[1].split("\n\n")
    table = next(paragraph for paragraph in paragraphs if paragraph.startswith("|"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {name.strip("`"): (float(bits), float(kl)) for name, _, bits, kl, *_ in rows[2:]}


def table(metrics: dict[str, Any]) -> str:
    """The table's lines from the metrics of a run of `turboquant-hf baselines`, by KL."""
    what = {name: text for name, (_, text) in OTHERS.items()} | dict.fromkeys(OURS, "this project")
    what |= dict.fromkeys(SCALAR, "this project, each number rounded alone")
    lines = ["| method | what it is | bits, mean of K and V | KL | top-1 |", "|---|---|---|---|---|"]
    for row in sorted(metrics["results"], key=lambda row: row["kl"]):
        if (name := row["preset"]) in what:
            bits, digits = (row["key_bits"] + row["value_bits"]) / 2, 4 if row["kl"] < 0.1 else 3
            kl, top = f"{row['kl']:.{digits}f}".lstrip("0"), f"{row['top1']:.3f}".lstrip("0")
            lines.append(f"| `{name}` | {what[name]} | {bits:.2f} | {kl} | {top} |")
    return "\n".join(lines)


def draw(points: dict[str, tuple[float, float]], colors: dict[str, str], path: Path) -> None:
    figure = Figure(figsize=(9, 5.2), layout="constrained", facecolor=colors["paper"])
    axis = figure.subplots()
    axis.set_facecolor(colors["paper"])
    rivals = [points[name] for name in OTHERS if name in points]
    axis.scatter(*zip(*rivals, strict=True), s=34, color=colors["faint"], label="other methods", zorder=2)
    for names, style, label in (
        (SCALAR, {"ls": "--", "lw": 1, "marker": "o", "ms": 4}, "this project, each number rounded alone"),
        (OURS, {"lw": 2, "marker": "o", "ms": 9}, "this project"),
    ):
        if own := sorted(points[name] for name in names if name in points):
            axis.plot(*zip(*own, strict=True), color=colors["ours"], label=label, zorder=3, **style)
    for name in (*OTHERS, *SCALAR, *OURS):
        if name in points:
            label, place, color, size, weight = name, "corner", colors["ours"], 12, "bold"
            if name in SCALAR:
                place, size, weight = "raised", 9, "normal"
            elif name in OTHERS:
                label, place, color, size, weight = OTHERS[name][0], "right", colors["ink"], 9, "normal"
            x, y, side = OFFSETS[PLACES.get(name, place)]
            axis.annotate(
                label, points[name], xytext=(x, y), textcoords="offset points", ha=side,
                color=color, fontsize=size, fontweight=weight,
            )  # fmt: skip
    axis.set(yscale="log", xlim=(1.9, 5.4), ylim=(0.55 * min(kl for _, kl in points.values()), 4))
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
    if sys.argv[1:2] == ["--rows"]:
        print(table(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
    else:
        main(*map(Path, sys.argv[1:2]))
