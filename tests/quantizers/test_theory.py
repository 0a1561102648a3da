"""Measured errors against theory, on vectors of norm 1, so that errors are relative."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.theory import SPHERE, TILE, fit, gaussian_tiles, mean_inner, relative_mse, round_trip, unit_tiles
from turboquant_hf.primitives import distortion, lloyd_max
from turboquant_hf.quantizers import QUANTIZERS

RULES = ("mse", "norm", "norm-corrected", "unbiased")
UNBIASED = (0.57, 0.131, 0.0349, 0.0093)  # MSE, d = 128, bits 1 to 4


@pytest.mark.parametrize("dim", SPHERE, ids="d{}".format)
@pytest.mark.parametrize("bits", range(1, 6), ids="{}bit".format)
def test_mse_is_the_spheres(dim, bits):
    assert relative_mse(QUANTIZERS["mse"](bits=bits), unit_tiles(dim)) == pytest.approx(SPHERE[dim][bits - 1], rel=0.03)


@pytest.mark.parametrize("rotation", ["hadamard", "qr"])
def test_mse_does_not_depend_on_the_direction_once_rotated(rotation):
    """Vectors in a cone around one channel, the worst case for an unrotated codebook."""
    x = 0.3 * unit_tiles(128) + torch.eye(128)[5]
    quantizer = QUANTIZERS["mse"](bits=4, rotation=rotation, scale="mse", rounds=2)
    assert relative_mse(quantizer, x) == pytest.approx(SPHERE[128][3], rel=0.3)
    assert relative_mse(QUANTIZERS["mse"](bits=4, rotation="identity"), x) > 3 * SPHERE[128][3]


def test_mse_in_blocks_uses_the_density_of_the_block():
    measured = relative_mse(QUANTIZERS["mse"](bits=3, block=16), unit_tiles(128))
    assert measured == pytest.approx(distortion(lloyd_max(3, 16), 16), rel=0.01)


@pytest.mark.parametrize("bits", range(1, 5), ids="{}bit".format)
def test_unbiased_scale_has_the_tables_error_and_no_bias(bits):
    x = unit_tiles(128)
    decoded = round_trip(QUANTIZERS["mse"](bits=bits, scale="unbiased"), x)
    assert (decoded - x).square().sum(dim=-1).mean().item() == pytest.approx(UNBIASED[bits - 1], rel=0.03)
    # Not only in the mean: <k, k^> = |k|^2 for every vector, up to the rounding of the stored half.
    torch.testing.assert_close((decoded * x).sum(dim=-1), torch.ones(x.shape[:-1]), atol=1e-3, rtol=0)
    shrunk = mean_inner(round_trip(QUANTIZERS["mse"](bits=bits), x), x)
    assert shrunk == pytest.approx(1 - SPHERE[128][bits - 1], abs=2e-3)


def test_scale_rules_at_two_bits():
    """Each rule's error follows from the plain distortion D: they differ by a factor on c alone."""
    x, d = unit_tiles(128), SPHERE[128][1]
    decoded = {rule: round_trip(QUANTIZERS["mse"](bits=2, scale=rule), x) for rule in RULES}
    mse = {rule: (decoded[rule] - x).square().sum(dim=-1).mean().item() for rule in RULES}
    assert mse["mse"] < mse["norm"] < mse["norm-corrected"] < mse["unbiased"]
    assert mse["norm-corrected"] == pytest.approx(2 - 2 * math.sqrt(1 - d), rel=0.02)
    assert mse["unbiased"] == pytest.approx(d / (1 - d), rel=0.02)
    norms = decoded["norm-corrected"].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dim", SPHERE, ids="d{}".format)
def test_polar_is_the_papers(dim):
    quantizer = QUANTIZERS["polar"]()
    assert relative_mse(quantizer, unit_tiles(dim)) == pytest.approx(0.0320, rel=0.03)
    assert quantizer.bits_per_channel(dim, TILE) == 3.875


@pytest.mark.parametrize(
    ("name", "options", "group"),
    [
        ("kivi", {"axis": "channel", "group": 32}, 32),
        ("kivi", {"axis": "channel", "group": 128}, 128),
        ("kivi", {"axis": "token", "group": 32}, 32),
        ("uniform", {"group": 64}, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 6, 8], ids="{}bit".format)
def test_affine_error_is_a_steps(name, options, group, bits):
    """step^2 / 12, except for the least and the greatest number of a group, which lie on the grid."""
    quantizer, x = QUANTIZERS[name](bits=bits, **options), gaussian_tiles(128, 16)
    packed = quantizer.encode(x, {})
    error = (quantizer.decode(packed, {}, 128, torch.float32) - x).square().mean().item()
    theory = packed["scale"].float().square().mean().item() / 12 * (1 - 2 / group)
    assert error == pytest.approx(theory, rel=0.03)
    spread = packed["scale"].float().mean().item() * (2**bits - 1)
    below = torch.special.ndtr(torch.linspace(-8, 8, 4001, dtype=torch.float64))
    mean_range = (1 - below**group - (1 - below) ** group).sum().item() * 16 / 4000  # of `group` normals
    assert spread == pytest.approx(mean_range, rel=0.01)


def test_symmetric_error_is_a_steps_and_nf4_beats_it():
    x = gaussian_tiles(128, 16)
    symmetric = QUANTIZERS["uniform"](codebook="symmetric")
    step = symmetric.encode(x, {})["scale"].float().square().mean().item() / 49
    error = (round_trip(symmetric, x) - x).square().mean().item()
    assert error == pytest.approx(step / 12 * (1 - 1 / 64), rel=0.03)
    assert relative_mse(QUANTIZERS["uniform"](codebook="nf4"), x) < 0.9 * error


def test_kivi_along_channels_ignores_their_strength():
    """Channels of unlike strength do not matter to rounding along tokens, but do to rounding along channels."""
    x, strength = gaussian_tiles(128, 8), torch.logspace(-1.5, 1.5, 128)
    for axis, ratio in (("channel", 1.0), ("token", 3.0)):
        quantizer = QUANTIZERS["kivi"](axis=axis)
        plain = (round_trip(quantizer, x) - x).square().mean()
        scaled = (round_trip(quantizer, x * strength) / strength - x).square().mean()
        assert scaled / plain >= 0.99 * ratio
        assert axis == "token" or scaled / plain < 1.01


@pytest.mark.parametrize(("outlier_bits", "bits"), [(3, 2), (4, 3)])
def test_outlier_error_is_its_groups(outlier_bits, bits):
    quantizer = QUANTIZERS["outlier"](outlier_bits=outlier_bits, bits=bits)
    theory = 0.25 * distortion(lloyd_max(outlier_bits, 32), 32) + 0.75 * distortion(lloyd_max(bits, 96), 96)
    assert relative_mse(quantizer, unit_tiles(128)) == pytest.approx(theory, rel=0.03)
    assert quantizer.layout(128, TILE, torch.float16)["codes"].nbytes * 8 == (bits + 0.25) * TILE * 128


def test_outlier_finds_the_strong_channels():
    strong = torch.randperm(128, generator=torch.Generator().manual_seed(3))[:32]
    x = gaussian_tiles(128)
    x[..., strong] *= 10
    quantizer = QUANTIZERS["outlier"]()
    assert set(fit(quantizer, x)["order"][0, 0, :32].tolist()) == set(strong.tolist())
    energy = torch.tensor([32 * 100.0, 96.0])
    error = torch.tensor([distortion(lloyd_max(3, 32), 32), distortion(lloyd_max(2, 96), 96)])
    assert relative_mse(quantizer, x) == pytest.approx((energy @ error / energy.sum()).item(), rel=0.03)
    assert relative_mse(quantizer, x) < 0.35 * relative_mse(QUANTIZERS["mse"](bits=2), x)


@pytest.mark.parametrize("times", [1, 4, 16], ids="{}x".format)
@pytest.mark.parametrize("options", [{}, {"widths": ((0.5, 4), (0.5, 2))}], ids=["4bit", "3bit"])
def test_conditioned_does_not_feel_a_constant_vector(options, times):
    quantizer, x = QUANTIZERS["conditioned"](**options), gaussian_tiles(128, 16)
    constant = gaussian_tiles(128, 1, seed=5)[0, 0, 0, 0]
    constant = constant * (times * x.norm(dim=-1).mean() / constant.norm())
    plain = (round_trip(quantizer, x) - x).square().mean()
    moved = (round_trip(quantizer, x + constant) - constant - x).square().mean()
    assert moved / plain == pytest.approx(1.0, abs=0.05)
    uncentred = QUANTIZERS["mse"]()
    shifted = (round_trip(uncentred, x + constant) - constant - x).square().mean()
    assert shifted > (1 + 0.5 * times**2) * (round_trip(uncentred, x) - x).square().mean()


def anisotropic(dim=128):
    """Keys, their rms [dim], the queries' rms [1, 1, dim]: channels differ 10-fold.

    With more, few channels carry the energy, and a rotated vector is no random point of the sphere.
    """
    generator = torch.Generator().manual_seed(2)
    key_rms, query_rms = (torch.logspace(-0.5, 0.5, dim)[torch.randperm(dim, generator=generator)] for _ in range(2))
    return gaussian_tiles(dim) * key_rms, key_rms, query_rms[None, None]


def score_error(quantizer, x, query_rms):
    """E[(q.(k - k^))^2] over queries of independent channels."""
    error = round_trip(quantizer, x, fit(quantizer, x, query_rms)) - x
    return (error.square() @ query_rms[0, 0].square()).mean().item()


def test_conditioned_score_error_is_cauchy_schwarzs():
    """D / d (sum_i rms_q_i rms_k_i)^2, against D / d sum_i rms_q_i^2 sum_i rms_k_i^2 without the balance."""
    x, key_rms, query_rms = anisotropic()
    d, query = relative_mse(QUANTIZERS["mse"](scale="mse"), unit_tiles(128)), query_rms[0, 0]
    conditioned = QUANTIZERS["conditioned"](center=False, scale="mse")
    balanced = score_error(conditioned, x, query_rms)
    assert balanced == pytest.approx(d / 128 * (query @ key_rms).item() ** 2, rel=0.05)
    plain = score_error(QUANTIZERS["mse"](scale="mse"), x, query_rms)
    assert plain == pytest.approx(d / 128 * (query @ query * (key_rms @ key_rms)).item(), rel=0.05)
    by_keys = score_error(QUANTIZERS["conditioned"](center=False, scale="mse", balance="key"), x, query_rms)
    assert balanced < 0.95 * by_keys and balanced < 0.5 * plain


def test_conditioned_defaults_and_groups_beat_mse_on_unlike_channels():
    x, _, query_rms = anisotropic()
    flat3 = score_error(QUANTIZERS["conditioned"](widths=((1.0, 3),)), x, query_rms)
    grouped3 = score_error(QUANTIZERS["conditioned"](widths=((0.5, 4), (0.5, 2))), x, query_rms)
    assert score_error(QUANTIZERS["conditioned"](), x, query_rms) < 0.5 * score_error(QUANTIZERS["mse"](), x, query_rms)
    assert grouped3 < 0.8 * flat3 < 0.8 * 0.5 * score_error(QUANTIZERS["mse"](bits=3), x, query_rms)


@pytest.mark.parametrize("known", [True, False], ids=["queries", "keys_only"])
def test_conditioned_balance_is_the_formulas(known):
    x, _, query_rms = anisotropic()
    key_rms = (x - x.mean(dim=-2, keepdim=True)).square().mean(dim=(2, 3)).sqrt()
    state = fit(QUANTIZERS["conditioned"](), x, query_rms if known else None)
    expected = (query_rms / key_rms).sqrt() if known else key_rms.rsqrt()
    ratio = state["balance"] / expected
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)
    groups = fit(QUANTIZERS["conditioned"](widths=((0.5, 4), (0.5, 2))), x, query_rms if known else None)
    important = (query_rms if known else 1) * key_rms
    assert groups["order"][0, 0].tolist() == important[0, 0].argsort(descending=True).tolist()
