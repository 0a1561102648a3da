"""The Pareto front of size and error, and its picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

LABEL_SHIFTS = (3, *(sign * step for step in range(8, 400, 8) for sign in (-1, 1)))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates (smaller is better), by the first one."""
    front, best = [], float("inf")
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            front.append(index)
            best = points[index][1]
    return front


def _meet(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    """Whether two labels (left, height, length) overlap."""
    return abs(one[1] - other[1]) < 8 and one[0] < other[0] + other[2] and other[0] < one[0] + one[2]


def draw_pareto(points: Mapping[str, tuple[float, float]]) -> bytes:
    """A PNG of named (bits per channel, KL) points and their front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    places = list(points.values())
    front = pareto_front(places)
    axis.scatter(*zip(*places, strict=True), color="0.6", s=24)
    axis.plot(*zip(*(places[i] for i in front), strict=True), "o-", color="C0", label="Pareto front")
    axis.set(
        yscale="log", xlabel="real bits per channel, mean of keys and values", ylabel="KL to the uncompressed model"
    )
    axis.margins(x=0.12)
    figure.draw_without_rendering()
    taken: list[tuple[float, float, float]] = []
    for index in sorted(range(len(places)), key=lambda i: (i not in front, -places[i][1])):
        name, (x, y) = list(points)[index], axis.transData.transform(places[index]) * 72 / figure.dpi
        # The lowest height, in points, at which the label overlaps no other label: a letter takes about 4 by 8 points.
        free = (s for s in LABEL_SHIFTS if not any(_meet((x, y + s, 4 * len(name)), other) for other in taken))
        shift = next(free, LABEL_SHIFTS[0])
        taken.append((x, y + shift, 4 * len(name)))
        color = "C0" if index in front else "0.4"
        axis.annotate(name, places[index], textcoords="offset points", xytext=(5, shift), fontsize=7, color=color)
    axis.grid(alpha=0.3)
    axis.legend()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, metadata={"Software": None})
    return stream.getvalue()
