"""Numbers of any size are as accurate as numbers near 1, or become NaN. None becomes a plausible wrong number."""

from __future__ import annotations

import pytest
import torch

from tests.support.quantizers import CASES, fit, id_of, make, round_trip, tiles_of
from turboquant_hf.kernels.codes import load_scale
from turboquant_hf.quantizers import QUANTIZERS
from turboquant_hf.quantizers.rotated import RotatedQuantizer

DIM = 64
CODED = [case for case in CASES if case[0] != "lossless"] + [("mse", {"scale_format": "e4m4"})]
CENTRED = [case for case in CASES if case[0] == "conditioned" and case[1].get("center", True)]


def error(quantizer, x, state=None):
    """Relative error of every head, sinks left out: float64 [H]."""
    _, weight = tiles_of(DIM)
    decoded = round_trip(quantizer, x, fit(quantizer, x, weight) if state is None else state, weight, x.dtype)
    x, decoded = x[:, :, 1:].double(), decoded[:, :, 1:].double()
    return ((decoded - x).square().sum((0, 2, 3, 4)) / x.square().sum((0, 2, 3, 4))).sqrt()


def assert_usual(found, usual):
    torch.testing.assert_close(found, usual, rtol=0.08, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, s) for s in (1e-12, 1e-7, 1e5, 1e12)]
    + [(torch.bfloat16, s) for s in (1e-12, 1e5, 1e12)]
    + [(torch.float16, s) for s in (1e-3, 3e3)],
    ids=str,
)
@pytest.mark.parametrize("case", CODED, ids=id_of)
def test_the_error_does_not_depend_on_the_size_of_the_numbers(case, dtype, size):
    """One head has larger or smaller numbers than the others. All heads keep their error."""
    quantizer = make(*case)
    x, _ = tiles_of(DIM)
    large = x.clone()
    large[:, 1] *= size
    assert_usual(error(quantizer, large.to(dtype)), error(quantizer, x.to(dtype)))


@pytest.mark.parametrize("channels", [slice(3, 4), slice(None)], ids=["one-channel", "all-channels"])
@pytest.mark.parametrize("case", CODED, ids=id_of)
def test_the_error_does_not_depend_on_the_size_of_an_offset(case, channels):
    """The same vectors in smaller units, in which float16 holds every number, have the same error."""
    quantizer = make(*case)
    x, _ = tiles_of(DIM)
    x[:, 1, ..., channels] += 2.0**17
    found, small = error(quantizer, x), error(quantizer, 2.0**-10 * x)
    assert (found <= 1.1 * small + 1e-6).all(), (found, small)


@pytest.mark.parametrize("offset", [3e4, 1e5, -1e6], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CENTRED, ids=id_of)
def test_other_channels_do_not_suffer_from_an_offset(case, dtype, offset):
    """A former fault: float16 means were clamped, and the rest of the offset swamped the other channels."""
    quantizer, others = make(*case), [i for i in range(DIM) if i != 3]
    x, weight = tiles_of(DIM, dtype=dtype)
    moved = x.clone()
    moved[..., 3] += offset

    def errors(y):
        decoded = round_trip(quantizer, y, fit(quantizer, y, weight), weight, dtype)
        return (decoded - y)[:, :, 1:][..., others].double().square().mean().sqrt()

    # All of the key that is left once the channel is constant: a little less to code, or a little of its rounding.
    assert 0.8 * errors(x) < errors(moved) < 1.2 * errors(x)


@pytest.mark.parametrize("case", [case for case in CODED if "scale_format" not in case[1]], ids=id_of)
def test_later_numbers_that_do_not_fit_become_nan(case):
    """Statistics are frozen, so later numbers can leave the range of float16. They must become NaN then."""
    quantizer = make(*case)
    x, weight = tiles_of(DIM)
    decoded = round_trip(quantizer, 1e12 * x, fit(quantizer, x, weight), weight)
    bad = decoded.isnan().any(dim=-1)
    if getattr(quantizer, "codebook", "").startswith("trellis"):  # a token without weight has the scale 0 in words
        bad = bad[weight[:, None].bool().expand_as(bad)]
    assert bad.all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("conditioned", {"scale_format": "e3m5", "widths": ((0.5, 5), (0.5, 3))}), ("mse", {"scale_format": "e4m4"})],
    ids=str,
)
def test_gains_grow_with_later_numbers(name, options):
    """One-byte scales have no pattern for NaN. They get a larger unit, and older tiles hardly change."""
    quantizer = QUANTIZERS[name](**options)
    x, weight = tiles_of(DIM)
    state = fit(quantizer, x, weight)
    later = x.clone()
    later[1, 0] *= 1000.0
    old, new = quantizer.encode(x, state, weight), quantizer.encode(later, state, weight)
    before = quantizer.decode(old, state, DIM, torch.float32)
    grown = quantizer.make_room(later, state, weight, new, old)
    factor = grown["gain"] / state.get("gain", torch.ones(2, 2))
    assert factor[1, 0] > 1 and (factor.flatten()[[0, 1, 3]] == 1).all()
    decoded = quantizer.decode(new, grown, DIM, torch.float32)
    assert_usual((decoded - later)[1, 0].norm() / later[1, 0].norm(), (before - x)[1, 0].norm() / x[1, 0].norm())
    after = quantizer.decode(old, grown, DIM, torch.float32)
    assert (after - x)[1, 0].norm() < 2 * (before - x)[1, 0].norm(), "64 times finer than the unit"
    assert torch.equal(after[0], before[0]) and torch.equal(after[1, 1], before[1, 1])
    assert load_scale(new["scale"], quantizer.scale_format).max() < 126
    beyond = quantizer.make_room(1e30 * x, state, weight, quantizer.encode(1e30 * x, state, weight), old)
    assert beyond["gain"].isnan().all()


@pytest.mark.parametrize("case", CODED, ids=id_of)
def test_tokens_after_padding_and_zeros(case):
    """Numbers that came after the statistics must not be taken for small: they are read as they are, or as NaN."""
    quantizer = make(*case)
    x, weight = tiles_of(DIM)
    first, counted = x.clone(), weight.clone()
    first[0, 1] = 0.0  # a head of zeros
    first[1], counted[1] = 7.0, 0.0  # a sequence of padding
    found = error(quantizer, x, fit(quantizer, first, counted))
    usual = error(quantizer, x)
    # Its balance is nobody's, so that no more than the size is asked for.
    assert (found.isnan() | (found < 2 * usual + 0.02)).all(), (found, usual)
    if isinstance(quantizer, RotatedQuantizer):
        assert found.isfinite().all()
