from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_hf.primitives import Trellis, distortion, lloyd_max, pack, packed_size, trellis, trellis_code, unpack
from turboquant_hf.primitives.addends import SUM_BITS, addends, nearest_sums
from turboquant_hf.primitives.training import _means, sphere_words, train
from turboquant_hf.primitives.trellis_codes import TRAINED

BITS = (1, 2, 3, 4, 5)
# Squared error on Gaussian values: 16 states, tail-biting words of 32.
DESIGN = {1: 0.3066, 2: 0.0862, 3: 0.0239, 4: 0.0069, 5: 0.0021}


def slow_numbers(codes: list[int], bits: int, h0: int = 0o23, h1: int = 0o04) -> list[int]:
    """The level that each code of a word stands for, by the definition, one value at a time."""
    path = [code >> (bits - 1) for code in codes]

    def parity(taps, t):
        return sum(path[(t - i) % len(path)] for i in range(taps.bit_length()) if taps >> i & 1) % 2

    plain = [code % 2 ** (bits - 1) for code in codes]
    return [4 * rest + 2 * parity(h0, t) + parity(h1, t) for t, rest in enumerate(plain)]


def error(code: Trellis, x: torch.Tensor) -> float:
    return float((code.decode(code.encode(x)) - x).square().mean())


@pytest.mark.parametrize("bits", BITS)
def test_error_on_gaussian_values_is_the_designs_and_below_lloyd_max(bits):
    x = sphere_words(None, 20_000, seed=3)
    found = error(trellis_code(bits), x)
    assert found <= 1.02 * DESIGN[bits]
    assert found < 0.86 * distortion(lloyd_max(bits))
    assert found > 4.0**-bits  # the rate-distortion bound


@pytest.mark.parametrize("dim", [16, 24, 48, 96, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_error_on_the_sphere_is_below_lloyd_maxs_own(bits, dim):
    assert error(trellis_code(bits, dim), sphere_words(dim, 2000, seed=3)) < 0.87 * distortion(
        lloyd_max(bits, dim), dim
    )


@pytest.mark.parametrize(("bits", "dim"), sorted(TRAINED), ids=str)
def test_shipped_levels_are_the_means_of_what_they_stand_for(bits, dim):
    """Lloyd's condition, but for the grid, which is coarse for 64 levels: moving levels to their means gains little.

    Levels of 4 and 5 bits are moved to the sums nearest to their means.
    """
    code, x = trellis_code(bits, dim or None), sphere_words(dim or None, 8000, seed=4)
    means, mass = _means(bits, torch.tensor(code.levels)[2**bits :], x)
    means = nearest_sums(means, mass) if bits in SUM_BITS else means
    moved = Trellis((*(-means.flip(0)).tolist(), *means.tolist()), "moved")
    assert error(code, x) < (1.03 if bits == 5 else 1.015) * error(moved, x)
    assert (mass > 0).all()


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_training_finds_levels_as_good_as_the_shipped_ones(bits):
    x = sphere_words(64, 8000, seed=4)
    trained = train(bits, 64, count=1000, rounds=20)
    assert error(trained, x) == pytest.approx(error(trellis_code(bits, 64), x), rel=0.02)
    assert trained.unit and max(trained.steps) < 64


@pytest.mark.parametrize("dim", [None, 16, 100])
@pytest.mark.parametrize("bits", BITS)
def test_levels_are_odd_multiples_of_half_a_unit(bits, dim):
    code = trellis_code(bits, dim)
    assert code.bits == bits and len(code.levels) == len(code.steps) == 2 ** (bits + 1)
    assert [(step + 0.5) * code.unit for step in code.steps] == pytest.approx(code.levels, rel=1e-12)
    assert code.steps == tuple(-1 - step for step in reversed(code.steps)) and max(code.steps) < 64


@pytest.mark.parametrize("dim", [None, 16, 32, 64])
@pytest.mark.parametrize(("bits", "outer"), [(4, (0, 7)), (5, (0, 1, 14, 15))], ids=["4-bit", "5-bit"])
def test_levels_are_sums_of_two_bytes(bits, outer, dim):
    code = trellis_code(bits, dim)
    first, second = addends(code.steps)
    for number, step in enumerate(code.steps):
        segment, subset = divmod(number, 4)
        assert step == first[segment] + second[4 * (segment in outer) + subset]
    assert min(second) == 0 and max(second) < 64


@pytest.mark.parametrize("bits", BITS)
def test_a_value_takes_exactly_its_bits(bits):
    x = sphere_words(None, 8, seed=0)
    codes = trellis_code(bits).encode(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and codes.max() < 2**bits
    packed = pack(codes, bits)
    assert packed.shape[-1] == packed_size(32, bits) == 4 * bits
    assert torch.equal(unpack(packed, bits, 32), codes)


@given(st.sampled_from(BITS), st.lists(st.integers(0, 15), min_size=32, max_size=32))
def test_numbers_follow_the_definition(bits, codes):
    codes = [code % 2**bits for code in codes]
    code, word = trellis_code(bits), torch.tensor(codes, dtype=torch.uint8)
    numbers = slow_numbers(codes, bits)
    assert code.numbers(word).tolist() == numbers
    assert code.decode(word).tolist() == [code.tensor()[number].item() for number in numbers]


@given(st.integers(0, 2**32 - 1))
def test_subsets_are_rotations_of_the_word_of_path_bits(word):
    def rotated(by):
        return (word << by | word >> 32 - by) % 2**32

    z1, z0 = word ^ rotated(1) ^ rotated(4), rotated(2)
    path = torch.tensor([word >> t & 1 for t in range(32)], dtype=torch.uint8)
    assert trellis_code(1).numbers(path).tolist() == [2 * (z1 >> t & 1) + (z0 >> t & 1) for t in range(32)]


@pytest.mark.parametrize("bits", BITS)
def test_a_rotated_word_means_rotated_levels(bits):
    code = trellis_code(bits)
    codes = torch.randint(2**bits, (50, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for by in (1, 5, 31):
        assert torch.equal(code.decode(codes.roll(by, 1)), code.decode(codes).roll(by, 1))
    # And where the search closes the circle hardly matters.
    x = sphere_words(None, 4000, seed=5)
    assert error(code, x.roll(11, 1)) == pytest.approx(error(code, x), rel=0.01)


@pytest.fixture
def fine_prices(monkeypatch) -> Callable[[], None]:
    """Lets the search count in whole numbers that are fine, and may be as high as they are."""

    def set_prices() -> None:
        monkeypatch.setattr(trellis, "PRICE", 2.0**17)
        monkeypatch.setattr(trellis, "DEAREST", 2**22)
        monkeypatch.setattr(trellis, "OPEN", 2**16)

    return set_prices


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_search_against_trying_all_words(bits, fine_prices):
    """4 states in words of 12: all 4,096 paths can be tried, each with its best plain bits."""
    fine_prices()
    code = Trellis(trellis_code(bits).levels, "tiny", h0=0o5, h1=0o2, word=12)
    x = sphere_words(None, 300, seed=0, word=12)
    paths = torch.tensor(list(itertools.product((0, 1), repeat=12)), dtype=torch.uint8)
    subsets = torch.stack([code.decode(paths << (bits - 1) | plain) for plain in range(2 ** (bits - 1))])
    errors = torch.stack([(subsets - word).square().amin(dim=0).sum(dim=1) for word in x])  # [words, paths]
    codes = code.encode(x)
    found = (code.decode(codes) - x).square().sum(dim=1)

    # The best of all words that pass through the same state where the search closes the circle ...
    closing = [(code.reach - 1) % 12, (code.reach - 2) % 12]
    same = (paths[:, closing] == (codes >> (bits - 1))[:, None, closing]).all(dim=2)
    torch.testing.assert_close(found, errors.masked_fill(~same, torch.inf).amin(dim=1))
    # ... which is mostly the best state.
    least = errors.amin(dim=1)
    assert (found <= least + 1e-5).float().mean() > 0.8
    assert found.mean() < 1.04 * least.mean()


@pytest.mark.parametrize(("bits", "dim"), [(1, 16), (2, None), (3, 64), (5, None)], ids=str)
def test_whole_numbers_cost_no_error(bits, dim, fine_prices):
    code, x = trellis_code(bits, dim), sphere_words(dim, 4000, seed=6)
    found = error(code, x)
    fine_prices()
    assert found < 1.005 * error(code, x)


@pytest.mark.parametrize("bits", BITS)
def test_the_cells_of_a_grid_name_the_nearest_levels(bits):
    code = trellis_code(bits)
    x = torch.linspace(-1.2 * code.levels[-1], 1.2 * code.levels[-1], 501)
    cell = (x / code.grid).floor().clamp(-128, 127).int() + 128
    lowest = code.cells()[cell].int()
    away = (x[:, None] - torch.tensor(code.levels)).abs()
    for subset in range(4):
        chosen = (lowest + (subset - lowest) % 4)[:, None].long()
        torch.testing.assert_close(away.gather(1, chosen)[:, 0], away[:, subset::4].amin(dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e30], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_nan_or_huge_value_does_not_change_the_other_codes(bits, odd):
    code, x = trellis_code(bits), sphere_words(None, 2000, seed=7)
    broken = x.clone()
    broken[:, 9:12] = odd
    kept = torch.ones(32, dtype=torch.bool)
    kept[9:12] = False
    codes = code.encode(broken)
    assert codes.max() < 2**bits
    squares = (code.decode(codes) - x).square()[:, kept]
    assert squares.mean() < error(code, x)  # three free values leave the others more room
    untouched = code.encode(torch.cat([broken[:1], x[1:2]]))
    assert torch.equal(untouched[1], code.encode(x[1:2])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_search_computes_in_float32(dtype):
    x = sphere_words(None, 20, seed=8).to(dtype).view(4, 5, 32)
    codes = trellis_code(3).encode(x)
    assert codes.shape == x.shape and torch.equal(codes, trellis_code(3).encode(x.float()))
    assert trellis_code(3).decode(codes, dtype).dtype == dtype


def test_words_are_searched_one_by_one():
    x = sphere_words(None, 70, seed=9)
    codes = trellis_code(2).encode(x)
    assert torch.equal(torch.cat([trellis_code(2).encode(part) for part in x.split(9)]), codes)
    assert trellis_code(2).encode(x[:0]).shape == (0, 32)
    strided = x.t().contiguous().t()
    assert torch.equal(trellis_code(2).encode(strided), codes)


@pytest.mark.parametrize(("bits", "design"), [(1, 0.2918), (2, 0.0827), (3, 0.0230), (4, 0.0066)])
def test_64_states_have_even_less_error(bits, design):
    large, x = trellis_code(bits, states=64), sphere_words(None, 4000, seed=3, word=64)
    assert large.memory == 6
    found = error(large, x)
    assert found <= 1.02 * design and found < 0.98 * error(trellis_code(bits), x.view(-1, 32))
    codes = large.encode(x[:1])
    assert large.numbers(codes)[0].tolist() == slow_numbers(codes[0].tolist(), bits, 0o103, 0o024)
    # Words may also be given in pieces, as they are packed.
    assert torch.equal(large.encode(x.view(-1, 2, 32)), large.encode(x).view(-1, 2, 32))
    assert torch.equal(large.decode(codes.view(2, 32)), large.decode(codes).view(2, 32))


LEVELS = (-1.0, -0.5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: trellis_code(0), "bits=0", id="0-bits"),
        pytest.param(lambda: trellis_code(6), "bits=6: must be from 1 to 5", id="6-bits"),
        pytest.param(lambda: trellis_code(2, 15), "dim=15", id="dim-15"),
        pytest.param(lambda: trellis_code(2, states=8), "states=8: must be 16 or 64", id="8-states"),
        pytest.param(lambda: Trellis(LEVELS[:2], "c"), "levels has 2 entries", id="two-levels"),
        pytest.param(lambda: Trellis(LEVELS[::-1], "c"), "must be increasing", id="unsorted"),
        pytest.param(lambda: Trellis(LEVELS, "c", h0=2, h1=4), "h0=0o2, h1=0o4", id="short-memory"),
        pytest.param(lambda: Trellis(LEVELS, "c", word=3), "word=3: must be at least", id="short-word"),
    ],
)
def test_trellis_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
