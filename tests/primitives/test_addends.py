from __future__ import annotations

import pytest
import torch

from turboquant_hf.primitives import lloyd_max
from turboquant_hf.primitives.addends import addends, nearest_sums, sums_on_grid

NUMBERS = {  # starts of the upper segments, then inner and outer x and y
    4: (2, 13, 24, 37, 2, 5, 7, 9),
    5: (0, 4, 9, 13, 19, 25, 31, 45, 1, 2, 3, 6),
}
BOTH = pytest.mark.parametrize("bits", NUMBERS, ids="{}-bit".format)


def sums(numbers) -> list[float]:
    """The definition: starts of four or eight segments, each with offsets 0, x, y, x + y."""
    *starts, x, y, outer_x, outer_y = numbers
    pairs = [(x, y)] * (3 * len(starts) // 4) + [(outer_x, outer_y)] * (len(starts) // 4)
    return [start + offset for start, (x, y) in zip(starts, pairs, strict=True) for offset in (0, x, y, x + y)]


def with_negative(upper) -> tuple[float, ...]:
    return (*(-1 - step for step in reversed(upper)), *upper)


@pytest.mark.parametrize(("bits", "outer"), [(4, (0, 7)), (5, (0, 1, 14, 15))], ids=["4-bit", "5-bit"])
def test_addends_make_the_steps(bits, outer):
    steps = with_negative(sums(NUMBERS[bits]))
    first, second = addends(steps)
    *_, x, y, outer_x, outer_y = NUMBERS[bits]
    assert second == (0, x, y, x + y, 0, outer_x, outer_y, outer_x + outer_y)
    assert [first[p] + second[4 * (p in outer) + s] for p in range(len(first)) for s in range(4)] == list(steps)


@BOTH
@pytest.mark.parametrize("changed", [1, 6, -1])
def test_other_steps_have_no_addends(bits, changed):
    upper = sums(NUMBERS[bits])
    upper[changed] += 1
    assert addends(with_negative(upper)) is None
    assert addends((0, 1, 2, 3)) is None


@BOTH
def test_nearest_sums_are_the_least_squares(bits):
    generator = torch.Generator().manual_seed(0)
    upper = torch.tensor(lloyd_max(bits + 1).levels)[2**bits :]
    mass = torch.randint(1, 100, upper.shape, generator=generator).float()
    found = nearest_sums(upper, mass)
    torch.testing.assert_close(nearest_sums(found, mass), found)

    def error(x: torch.Tensor) -> float:
        return float((mass * (x - upper).double().square()).sum())

    count = len(NUMBERS[bits])
    for place in range(count):
        change = torch.tensor(sums([0.01 * (i == place) for i in range(count)]))
        assert error(found) < min(error(found + change), error(found - change))


@BOTH
def test_fitted_levels_are_positive_and_in_order(bits):
    upper = torch.linspace(-0.5, 1, 2**bits)
    found = nearest_sums(upper, torch.ones(2**bits))
    assert found[0] > 0 and (found[4::4] > found[3:-1:4]).all()


@BOTH
def test_levels_on_the_grid_come_back_as_they_are(bits):
    wanted = (torch.tensor(sums(NUMBERS[bits])) + 0.5) * 0.04
    levels, unit = sums_on_grid(wanted, torch.ones(2**bits), 64)
    assert unit == pytest.approx(0.04)
    torch.testing.assert_close(levels.float(), wanted)
