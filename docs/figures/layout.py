"""Draws docs/design.md's picture: the way of a key and of a value into their tiles, and the bytes of a tile.

    python docs/figures/layout.py [FOLDER]

writes layout-light.png and layout-dark.png to FOLDER (default: the folder of this file). All sizes are asked from the
default preset's quantizers.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from turboquant_hf import load_preset
from turboquant_hf.config import DEFAULT_PRESET
from turboquant_hf.kernels.codes import tile_bytes

HERE = Path(__file__).parent
DIM, TILE = 128, 128
THEMES = {
    "light": {
        "paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "line": "#d1d9e0", "box": "#f6f8fa",
        "codes": "#0969da", "words": "#1a7f37", "scale": "#bc4c00", "mean": "#8250df",
    },
    "dark": {
        "paper": "#131416", "ink": "#f0f6fc", "faint": "#9198a1", "line": "#3d444d", "box": "#1f242b",
        "codes": "#58a6ff", "words": "#3fb950", "scale": "#f0883e", "mean": "#bc8cff",
    },
}  # fmt: skip
STEPS = {
    "A key": (
        "128 numbers\nof 16 bits",
        "minus the mean\nof 128 tokens",
        "times a factor\nper channel",
        "channels sorted\nby importance",
        "each half\nrotated",
        "each half divided\nby its length",
        "codes and\ntwo scales",
    ),
    "A value": ("128 numbers\nof 16 bits", "rotated", "divided by\nits length", "codes and\none scale"),
}


def parts(role: str) -> list[tuple[str, int, str]]:
    """(text, bytes, color) of all that a tile of keys or values stores of one head."""
    quantizer = getattr(load_preset(DEFAULT_PRESET), role)
    out = []
    for group in quantizer.groups(DIM, TILE):
        kind = "words" if group.in_words else "codes"
        text = f"{group.bits}-bit codes of {group.size} channels"
        out.append((text, tile_bytes((group,), TILE, quantizer.channel_major), kind))
    for name, field in quantizer.layout(DIM, TILE, torch.bfloat16).items():
        size = math.prod(field.shape) * field.dtype.itemsize
        if name == "codes":
            assert size == sum(size for _, size, _ in out)
        else:
            out.append(("scales" if name == "scale" else "the tile's mean", size, name))
    return out


def box(axis: Axes, left: float, top: float, width: float, height: float, text: str, **style) -> None:
    size, ink = style.pop("fontsize", 8.5), style.pop("ink")
    axis.add_patch(Rectangle((left, top - height), width, height, **style))
    axis.text(left + width / 2, top - height / 2, text, ha="center", va="center", fontsize=size, color=ink)


def draw_steps(axis: Axes, colors: dict[str, str]) -> None:
    for top, (title, steps) in zip((97, 85), STEPS.items(), strict=True):
        axis.text(0, top - 4, title, va="center", fontsize=11, fontweight="bold", color=colors["ink"])
        for i, text in enumerate(steps):
            last = i == len(steps) - 1
            edge = colors["words"] if last else colors["line"]
            left = 9 + 13.1 * i
            box(axis, left, top, 11.3, 8, text, facecolor=colors["box"], edgecolor=edge, ink=colors["ink"])
            if not last:
                axis.annotate("", (left + 13.1, top - 4), xytext=(left + 11.3, top - 4),
                              arrowprops={"arrowstyle": "-|>", "color": colors["faint"]})  # fmt: skip


def draw_tiles(axis: Axes, colors: dict[str, str]) -> None:
    raw = 2 * DIM * TILE
    axis.text(0, 69, f"A tile: {TILE} tokens of one KV head, head dim {DIM}, bytes to scale", fontsize=11,
              fontweight="bold", color=colors["ink"])  # fmt: skip
    text, style = f"keys or values in 16 bit: {raw:,} bytes", {"facecolor": colors["box"], "edgecolor": colors["line"]}
    box(axis, 9, 66.5, 91, 4, text, ink=colors["faint"], **style)
    for top, role in ((60, "keys"), (51, "values")):
        left, stored = 9.0, parts(role)
        total = sum(size for _, size, _ in stored)
        axis.text(0, top - 2, role, va="center", fontsize=10, color=colors["ink"])
        for _, size, kind in stored:
            width = 91 * size / raw
            axis.add_patch(Rectangle((left, top - 4), width, 4, facecolor=colors[kind], edgecolor=colors["paper"]))
            left += width
        axis.text(left + 1, top - 2, f"{total:,} bytes = {8 * total / DIM / TILE:.3g} bits per number", va="center",
                  fontsize=9, color=colors["ink"])  # fmt: skip
        left = 9
        for text, size, kind in stored:
            label = f"{text}: {size:,}"
            axis.text(left, top - 6, label, va="center", fontsize=8.5, color=colors[kind])
            left += 2.5 + 0.62 * len(label)


def draw_bytes(axis: Axes, colors: dict[str, str]) -> None:
    axis.text(0, 39.5, "Inside the codes", fontsize=11, fontweight="bold", color=colors["ink"])
    rows = (
        ("words", "5-bit codes along a trellis: 20 bytes for 32 codes of the keys' first group",
         [(66, "4 x 4 bytes: 4 plain bits of codes 0, 4, ..., of codes 1, 5, ..., and so on"),
          (25, "4 bytes: the path")]),
        ("words", "3-bit codes along a trellis: 12 bytes for 32 codes of a group",
         [(30, "4 bytes: 2 plain bits, codes 0, 2, ..."), (30, "4 bytes: 2 plain bits, codes 1, 3, ..."),
          (31, "4 bytes: the path, 1 bit per code")]),
        ("words", "4-bit codes along a trellis: 16 bytes for 32 neighbouring tokens of one channel of the values",
         [(22, "4 bytes: 2 plain bits"), (22, "4 bytes: 2 plain bits"), (22, "4 bytes: 1 plain bit"),
          (25, "4 bytes: the path")]),
    )  # fmt: skip
    for i, (kind, title, cells) in enumerate(rows):
        top, left = 37 - 12.5 * i, 9.0
        axis.text(9, top - 1.6, title, va="center", fontsize=9, color=colors[kind])
        for width, text in cells:
            box(
                axis,
                left,
                top - 3.5,
                width,
                5,
                text,
                facecolor=colors["box"],
                edgecolor=colors[kind],
                ink=colors["ink"],
            )
            left += width


def draw(colors: dict[str, str], path: Path) -> None:
    figure = Figure(figsize=(10.5, 7.6), layout="constrained", facecolor=colors["paper"])
    axis = figure.subplots()
    axis.set(xlim=(0, 101), ylim=(1, 98))
    axis.axis("off")
    for part in (draw_steps, draw_tiles, draw_bytes):
        part(axis, colors)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(folder: Path = HERE) -> None:
    for theme, colors in THEMES.items():
        draw(colors, folder / f"layout-{theme}.png")
        print(f"Wrote {folder / f'layout-{theme}.png'}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
