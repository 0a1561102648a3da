from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turboquant_hf.primitives import CircularCodebook, from_polar, polar_codebook, to_polar

TURN = 2 * math.pi


def gaussian(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("levels", [1, 2, 4, 7])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
def test_to_polar_shapes_and_ranges(shape, levels):
    x = gaussian(*shape, 2**levels)
    radius, angles = to_polar(x)
    torch.testing.assert_close(radius, x.norm(dim=-1))
    assert [a.shape for a in angles] == [(*shape, 2 ** (levels - 1 - i)) for i in range(levels)]
    assert all((a >= 0).all() for a in angles)
    assert (angles[0] < TURN).all()
    assert all((a <= math.pi / 2).all() for a in angles[1:])


@given(
    st.sampled_from([2, 4, 16]).flatmap(lambda n: st.lists(st.floats(-1e3, 1e3) | st.just(0.0), min_size=n, max_size=n))
)
def test_from_polar_inverts_to_polar(numbers):
    x = torch.tensor(numbers, dtype=torch.float64)
    back = from_polar(*to_polar(x))
    assert (back - x).abs().max() <= 1e-13 * x.abs().max() + 1e-300


def test_to_polar_pairs_neighbours():
    radius, angles = to_polar(torch.tensor([0.0, -3.0, -4.0, 0.0]))
    assert radius.item() == 5
    torch.testing.assert_close(angles[0], torch.tensor([1.5 * math.pi, math.pi]))
    torch.testing.assert_close(angles[1], torch.tensor([math.atan2(4, 3)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_to_polar_computes_half_precision_in_float32(dtype):
    x = gaussian(5, 16).to(dtype)
    radius, angles = to_polar(x)
    assert radius.dtype == angles[0].dtype == torch.float32
    assert torch.equal(from_polar(radius, angles).to(dtype), x)


def test_to_polar_angle_just_below_zero_stays_below_one_turn():
    _, angles = to_polar(torch.tensor([1.0, -1e-12]))
    assert 0 <= angles[0].item() < TURN


@pytest.mark.parametrize("level", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_polar_codebook_levels_are_centroids_of_sampled_angles(level, bits):
    angles = to_polar(gaussian(2**21 // 2**level, 2**level))[1][-1].flatten()
    codebook = polar_codebook(level, bits)
    codes = codebook.encode(angles).long()
    counts = torch.bincount(codes, minlength=2**bits)
    means = torch.zeros(2**bits, dtype=torch.float64).index_add(0, codes, angles) / counts
    margin = 6 * float(angles.std()) / math.sqrt(int(counts.min()))
    torch.testing.assert_close(means, codebook.tensor(dtype=torch.float64), atol=margin, rtol=0)


def test_polar_codebook_reaches_polarquants_error():
    """Blocks of 16, 4 + 2 + 2 + 2 bits by level, exact radius: relative error .0320 at 3.875 bits."""
    x = gaussian(50_000, 16)
    radius, angles = to_polar(x)
    books = [polar_codebook(level, bits) for level, bits in enumerate((4, 2, 2, 2), 1)]
    decoded = [b.decode(b.encode(a), torch.float64) for b, a in zip(books, angles, strict=True)]
    error = (from_polar(radius, decoded) - x).square().sum() / x.square().sum()
    assert float(error) == pytest.approx(0.0320, rel=0.01)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_polar_codebook_level_1_wraps(bits, dtype):
    codebook = polar_codebook(1, bits)
    assert isinstance(codebook, CircularCodebook)
    x = torch.linspace(-9, 9, 4001, dtype=dtype)
    distance = (x.double()[:, None] - codebook.tensor(dtype=torch.float64)).remainder(TURN)
    distance = torch.minimum(distance, TURN - distance)
    chosen = distance.gather(1, codebook.encode(x).long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1), atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    codes = codebook.encode(torch.tensor([1e-6, TURN + 1e-5, -1e-5], dtype=dtype))
    assert codes.tolist() == [0, 0, 2**bits - 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: to_polar(torch.zeros(2, 12)), r"x.shape\[-1\]=12", id="size-12"),
        pytest.param(lambda: to_polar(torch.zeros(3, 1)), r"x.shape\[-1\]=1", id="size-1"),
        pytest.param(lambda: from_polar(torch.zeros(3), []), "angles", id="no-angles"),
        pytest.param(lambda: from_polar(torch.zeros(3), [torch.zeros(3, 2)]), r"\(3, 2\)", id="wrong-shape"),
        pytest.param(lambda: polar_codebook(0, 4), "level=0", id="level-0"),
        pytest.param(lambda: polar_codebook(11, 4), "level=11", id="level-11"),
        pytest.param(lambda: polar_codebook(2, 9), "bits=9", id="bits-9"),
    ],
)
def test_polar_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
