"""Needle pictures: large enough to read, and without red against green."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from turboquant_hf.evaluation.report import heatmap

GRID = {(length, depth): 0.5 for length in (512, 1024, 2048) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)}


def picture(draw) -> np.ndarray:
    stream = io.BytesIO()
    draw(stream)
    stream.seek(0)
    return imread(stream)


@pytest.mark.parametrize("count", [1, 5])
def test_a_cell_has_room_for_its_number(count):
    image = picture(lambda stream: heatmap.plot_heatmaps(stream, {str(i): GRID for i in range(count)}))
    rows, columns = -(-count // 2), min(count, 2)
    assert image.shape[0] > rows * 5 * 80 and image.shape[1] > columns * 3 * 150


def test_more_is_lighter_and_a_loss_differs_from_a_gain_without_red_and_green():
    colors = matplotlib.colormaps[heatmap.SHARES](np.linspace(0, 1, 50))[:, :3]
    light = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) > 0).all()
    low, high = matplotlib.colormaps[heatmap.DIFFERENCES]([0.15, 0.85])[:, :3]
    assert low[2] < 0.2 and high[2] > 0.5, "told apart by blue, which nearly everybody sees"
