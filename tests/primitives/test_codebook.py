from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_hf.primitives import Codebook, distortion, grid, lloyd_max, nf4, polynomial, uniform

# Relative squared error on the unit sphere by bits 1..5, from independent integration and simulation.
THEORY = {
    None: (0.3634, 0.1175, 0.0345, 0.0095, 0.0025),
    128: (0.3609, 0.1160, 0.0340, 0.0093, 0.00245),
    64: (0.3584, 0.1145, 0.0334, 0.0091, 0.0024),
}
DIMS = [None, 2, 3, 4, 5, 32, 96, 128, 1024]


def ids_of_dim(dim):
    return f"d{dim or '_gaussian'}"


def on_the_sphere(dim, count):
    """float64 coordinates of variance 1, [count * dim] (Gaussian: [count])."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, dim or 1, generator=generator, dtype=torch.float64)
    return (x if dim is None else x / x.norm(dim=1, keepdim=True) * math.sqrt(dim)).flatten()


@pytest.mark.parametrize("dim", THEORY, ids=ids_of_dim)
@pytest.mark.parametrize("bits", range(1, 6))
def test_distortion_of_lloyd_max_is_the_theorys(bits, dim):
    assert distortion(lloyd_max(bits, dim), dim) == pytest.approx(THEORY[dim][bits - 1], rel=0.01)


@pytest.mark.parametrize("dim", DIMS, ids=ids_of_dim)
@pytest.mark.parametrize("make", [lloyd_max, uniform])
def test_distortion_within_the_bounds_of_theory(make, dim):
    errors = [distortion(make(bits, dim), dim) for bits in range(1, 9)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False))
    if make is lloyd_max:
        assert all(e <= math.sqrt(3) * math.pi / 2 * 4.0**-bits for bits, e in enumerate(errors, 1))
        assert all(e <= distortion(uniform(bits, dim), dim) + 1e-15 for bits, e in enumerate(errors, 1))


@pytest.mark.parametrize("dim", [None, 2, 3, 32, 128], ids=ids_of_dim)
@pytest.mark.parametrize(
    "make",
    [lambda d: lloyd_max(3, d), lambda d: uniform(4, d), lambda d: nf4()],
    ids=["lloyd_max", "uniform", "nf4"],
)
def test_distortion_is_what_sampling_finds(make, dim):
    codebook = make(dim)
    x = on_the_sphere(dim, 400_000 // (dim or 1))
    error = (codebook.decode(codebook.encode(x), torch.float64) - x).square()
    margin = 5 * float(error.std()) / math.sqrt(len(error))
    assert float(error.mean()) == pytest.approx(distortion(codebook, dim), abs=margin)


def gaussian_centroids(low, high):
    pdf = lambda x: torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    above = lambda x: torch.erfc(x / math.sqrt(2)) / 2  # noqa: E731
    return (pdf(low) - pdf(high)) / (above(low) - above(high))


def five_dim_centroids(low, high):
    """f(x) ~ 1 - x^2 / 5."""
    low, high = low.clamp(-math.sqrt(5), math.sqrt(5)), high.clamp(-math.sqrt(5), math.sqrt(5))
    mass = lambda x: x - x**3 / 15  # noqa: E731
    first = lambda x: x**2 / 2 - x**4 / 20  # noqa: E731
    return (first(high) - first(low)) / (mass(high) - mass(low))


@pytest.mark.parametrize(
    ("dim", "centroids"), [(None, gaussian_centroids), (5, five_dim_centroids)], ids=["gaussian", "d5"]
)
@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_centroids(bits, dim, centroids):
    codebook = lloyd_max(bits, dim)
    edges = torch.tensor([-math.inf, *codebook.thresholds, math.inf], dtype=torch.float64)
    half = 2 ** (bits - 1)  # the upper half: the closed forms cancel less there
    levels = torch.tensor(codebook.levels[half:], dtype=torch.float64)
    torch.testing.assert_close(centroids(edges[half:-1], edges[half + 1 :]), levels, atol=1e-9, rtol=0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("make", [lloyd_max, uniform])
def test_codebooks_at_dim_3_are_uniform_quantizers(make, bits):
    """A coordinate of the sphere in three dimensions is uniform (Archimedes)."""
    n = 2**bits
    expected = [math.sqrt(3) * (2 * i + 1 - n) / n for i in range(n)]
    assert make(bits, 3).levels == pytest.approx(expected, abs=1e-9 if make is lloyd_max else 1e-5)
    assert distortion(make(bits, 3), 3) == pytest.approx(4.0**-bits, rel=1e-7)


@pytest.mark.parametrize(
    ("bits", "dim", "upper"),
    [
        pytest.param(1, None, [math.sqrt(2 / math.pi)], id="gaussian-1-bit"),
        pytest.param(2, None, [0.4528, 1.510], id="gaussian-2-bits-Max-1960"),
        pytest.param(1, 2, [2 * math.sqrt(2) / math.pi], id="circle-1-bit"),
    ],
)
def test_lloyd_max_known_levels(bits, dim, upper):
    assert lloyd_max(bits, dim).levels[2 ** (bits - 1) :] == pytest.approx(upper, rel=5e-4)


@pytest.mark.parametrize("dim", DIMS, ids=ids_of_dim)
@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_is_symmetric_and_fast(bits, dim):
    lloyd_max.cache_clear()
    start = time.perf_counter()
    codebook = lloyd_max(bits, dim)
    assert time.perf_counter() - start < 0.5
    assert codebook.bits == bits and len(codebook.levels) == 2**bits
    assert codebook.levels == tuple(-level for level in reversed(codebook.levels))
    assert lloyd_max(bits, dim) is codebook


@pytest.mark.parametrize("dim", [None, 2, 3, 64], ids=ids_of_dim)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_uniform_beats_every_other_step(bits, dim):
    n = 2**bits
    best = distortion(uniform(bits, dim), dim)
    steps = [0.002 + 4 * i / 400 for i in range(400)]
    others = [distortion(Codebook(tuple((i - (n - 1) / 2) * step for i in range(n)), "trial"), dim) for step in steps]
    assert best <= min(others) + 1e-15
    assert min(others) == pytest.approx(best, rel=0.05)


def test_nf4_levels_are_normal_quantiles():
    """QLoRA's construction: evenly spaced probabilities on each side of an exact zero."""

    def side(count):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count, dtype=torch.float64))[:-1]

    levels = torch.cat([-side(8), torch.zeros(1, dtype=torch.float64), side(9).flip(0)])
    assert nf4().levels == pytest.approx((levels / levels.max()).tolist(), abs=1e-6)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=2, unique=True)
    | st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8, unique=True),
    st.lists(st.floats(-6, 6, width=32), max_size=20),
)
def test_encode_finds_the_nearest_level(levels, numbers):
    codebook = Codebook(tuple(sorted(levels)), "any")
    x = torch.tensor(numbers, dtype=torch.float64)
    codes = codebook.encode(x)
    assert codes.dtype == torch.uint8
    distance = (x[:, None] - codebook.tensor(dtype=torch.float64)).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1), atol=1e-14, rtol=0)


def test_encode_gives_ties_to_the_lower():
    codebook = Codebook((-2.0, -1.0, 1.0, 4.0), "ties")
    assert codebook.thresholds == (-1.5, 0.0, 2.5)
    assert codebook.encode(torch.tensor([-1.5, 0.0, 2.5])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_encode_and_decode_any_float_dtype(dtype):
    codebook = lloyd_max(8, 128)
    x = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(0, 2)
    codes = codebook.encode(x)
    assert codes.shape == x.shape
    assert torch.equal(codes, codebook.encode(x.double()))
    decoded = codebook.decode(codes, dtype)
    assert decoded.dtype == dtype and decoded.shape == x.shape
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(codebook.encode(codebook.decode(everything)), everything)


def test_tensor_is_cached_and_usable_by_autograd():
    codebook = Codebook((-0.5, 0.75), "mine")
    with torch.inference_mode():
        first = codebook.tensor(dtype=torch.float64)
    assert codebook.tensor("cpu", torch.float64) is first
    assert first.tolist() == [-0.5, 0.75] and not first.is_inference()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: lloyd_max(0), "bits=0", id="lloyd_max-0-bits"),
        pytest.param(lambda: lloyd_max(9, 64), "bits=9", id="lloyd_max-9-bits"),
        pytest.param(lambda: lloyd_max(4, 1), "dim=1", id="lloyd_max-dim-1"),
        pytest.param(lambda: lloyd_max(4, 1025), "dim=1025", id="lloyd_max-dim-1025"),
        pytest.param(lambda: uniform(9), "bits=9", id="uniform-9-bits"),
        pytest.param(lambda: uniform(4, 0), "dim=0", id="uniform-dim-0"),
        pytest.param(lambda: distortion(nf4(), 1), "dim=1", id="distortion-dim-1"),
        pytest.param(lambda: Codebook((0.0, 1.0, 2.0), "c"), "levels has 3 entries", id="three-levels"),
        pytest.param(lambda: Codebook((0.0,), "c"), "levels has 1 entries", id="one-level"),
        pytest.param(lambda: Codebook((1.0, 0.0), "c"), "must be increasing", id="unsorted"),
        pytest.param(lambda: Codebook((1.0, math.nan), "c"), "must be increasing", id="nan"),
    ],
)
def test_codebook_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", [lloyd_max, uniform])
def test_codebooks_ignore_the_default_device_and_dtype(make):
    expected = make(3, 77)
    make.cache_clear()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert make(3, 77) == expected
            assert distortion(expected, 78) > 0
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dim", [16, 64, 128, None])
@pytest.mark.parametrize(("bits", "excess"), [(1, 1e-9), (2, 1e-9), (3, 0.0025), (4, 0.0205), (5, 0.0125)])
def test_polynomial_levels_follow_their_coefficients_and_stay_near_lloyd_max(bits, excess, dim):
    codebook = polynomial(bits, dim)
    x = 2 * torch.arange(2**bits, dtype=torch.float64) + 1 - 2**bits
    computed = sum(a * x ** (2 * i + 1) for i, a in enumerate(codebook.coefficients))
    assert torch.allclose(computed, torch.tensor(codebook.levels, dtype=torch.float64), atol=1e-6)
    ratio = distortion(codebook, dim) / distortion(lloyd_max(bits, dim), dim)
    assert 1 - 1e-9 <= ratio <= 1 + excess


@pytest.mark.parametrize("dim", [16, 64, 128, None])
@pytest.mark.parametrize(("bits", "excess"), [(1, 1e-6), (2, 1e-4), (3, 1e-3), (4, 0.006), (5, 0.045)])
def test_grid_levels_are_odd_multiples_of_half_a_unit_and_stay_near_lloyd_max(bits, excess, dim):
    codebook = grid(bits, dim)
    levels = torch.tensor(codebook.levels, dtype=torch.float64)
    steps = torch.tensor(codebook.steps, dtype=torch.float64)
    assert torch.allclose((steps + 0.5) * codebook.unit, levels, rtol=1e-12)
    assert steps.max() < 64 and torch.equal(steps, -1 - steps.flip(0))
    best = distortion(lloyd_max(bits, dim), dim)
    assert best <= distortion(codebook, dim) * (1 + 1e-9) <= best * (1 + excess) * (1 + 1e-9)
