from __future__ import annotations

import pytest
import torch

from turboquant_hf.primitives import lloyd_max
from turboquant_hf.primitives.addends import addends, nearest_sums, sums_on_grid

NUMBERS = (2, 13, 24, 37, 2, 5, 7, 9)  # starts of the upper segments, then inner and outermost x and y


def sums(numbers) -> list[float]:
    """The definition: starts of four segments, each with offsets 0, x, y, x + y."""
    *starts, x, y, outer_x, outer_y = numbers
    pairs = [(x, y)] * 3 + [(outer_x, outer_y)]
    return [start + offset for start, (x, y) in zip(starts, pairs, strict=True) for offset in (0, x, y, x + y)]


def test_addends_make_the_steps():
    upper = sums(NUMBERS)
    steps = (*(-1 - step for step in reversed(upper)), *upper)
    first, second = addends(steps)
    assert second == (0, 2, 5, 7, 0, 7, 9, 16)
    assert [first[p] + second[4 * (p in (0, 7)) + s] for p in range(8) for s in range(4)] == list(steps)


@pytest.mark.parametrize("changed", [1, 6, 15])
def test_other_steps_have_no_addends(changed):
    upper = sums(NUMBERS)
    upper[changed] += 1
    assert addends((*(-1 - step for step in reversed(upper)), *upper)) is None
    assert addends((0, 1, 2, 3)) is None


def test_nearest_sums_are_the_least_squares():
    generator = torch.Generator().manual_seed(0)
    upper = torch.tensor(lloyd_max(5).levels)[16:]
    mass = torch.randint(1, 100, (16,), generator=generator).float()
    found = nearest_sums(upper, mass)
    torch.testing.assert_close(nearest_sums(found, mass), found)

    def error(x: torch.Tensor) -> float:
        return float((mass * (x - upper).double().square()).sum())

    for place in range(8):
        change = torch.tensor(sums([0.01 * (i == place) for i in range(8)]))
        assert error(found) < min(error(found + change), error(found - change))


def test_fitted_levels_are_positive_and_in_order():
    upper = torch.linspace(-0.5, 1, 16)
    found = nearest_sums(upper, torch.ones(16))
    assert found[0] > 0 and (found[4::4] > found[3:-1:4]).all()


def test_levels_on_the_grid_come_back_as_they_are():
    wanted = (torch.tensor(sums(NUMBERS)) + 0.5) * 0.04
    levels, unit = sums_on_grid(wanted, torch.ones(16), 64)
    assert unit == pytest.approx(0.04)
    torch.testing.assert_close(levels.float(), wanted)
