"""Measured errors of sketches (`qjl`, `prod`) against theory, on vectors of norm 1, so that errors are relative."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.theory import SPHERE, gaussian_tiles, mean_inner, relative_mse, round_trip, unit_tiles
from turboquant_hf.quantizers import QUANTIZERS

PROD = {  # d * E[(q.k - q.k^)^2], d = 128, bits 1 to 4
    "gaussian": (1.55, 0.56, 0.181, 0.054),
    "orthogonal": (0.57, 0.205, 0.066, 0.019),
}


def first_moment(dim):
    """E|u_1| for a uniform unit vector u."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def sketch_mse(sketch, rows, dim):
    """E|x^ - x|^2 of a sketch of `rows` signs for a unit x. Orthogonal rows: whole rotations, or part of one."""
    if sketch == "gaussian":
        return (math.pi / 2 * dim - 1) / rows
    part = min(rows, dim)
    return (1 / (part * first_moment(dim) ** 2) - 1) * part / rows


@pytest.mark.parametrize("sketch", PROD)
@pytest.mark.parametrize("bits", range(1, 5), ids="{}bit".format)
def test_prod_inner_product_error(sketch, bits):
    """8 sketches x 4,096 keys x 64 queries: the sampling error is below 1 %."""
    queries = torch.nn.functional.normalize(gaussian_tiles(128, 1, seed=1)[0, 0, 0, :64], dim=-1)
    errors = []
    for seed in range(8):
        options = {"sketch": sketch, "seed": seed}
        quantizer = QUANTIZERS["qjl"](bits=1, **options) if bits == 1 else QUANTIZERS["prod"](bits=bits, **options)
        x = unit_tiles(128, 32, seed=10 + seed)
        errors.append(((round_trip(quantizer, x) - x) @ queries.T).square().mean().item())
    measured = 128 * sum(errors) / len(errors)
    assert measured == pytest.approx(PROD[sketch][bits - 1], rel=0.03)
    left = 1.0 if bits == 1 else SPHERE[128][bits - 2]
    assert measured == pytest.approx(left * sketch_mse(sketch, 128, 128), rel=0.03)


@pytest.mark.parametrize("sketch", PROD)
@pytest.mark.parametrize("rows", [32, 128, 256, 384])
def test_prod_sketch_size(sketch, rows):
    quantizers = [QUANTIZERS["prod"](bits=3, sketch=sketch, sketch_size=rows, seed=seed) for seed in range(4)]
    measured = sum(relative_mse(quantizer, unit_tiles(128, 16)) for quantizer in quantizers) / 4
    assert measured == pytest.approx(SPHERE[128][1] * sketch_mse(sketch, rows, 128), rel=0.03)


@pytest.mark.parametrize("sketch", PROD)
@pytest.mark.parametrize("bits", [1, 2, 3], ids="{}bit".format)
def test_qjl_variance(sketch, bits):
    measured = sum(
        relative_mse(QUANTIZERS["qjl"](bits=bits, sketch=sketch, seed=seed), unit_tiles(64, 16)) for seed in range(8)
    )
    assert measured / 8 == pytest.approx(sketch_mse(sketch, bits * 64, 64), rel=0.03)


@pytest.mark.parametrize("dim", [4, 16, 128], ids="d{}".format)
def test_orthogonal_sketches_have_no_bias(dim):
    """Exact over random keys for any unit rows; the Gaussian constant would be 6, 1.6 and 0.2 % off."""
    x = unit_tiles(dim, 8192 // dim + 64)
    for quantizer in (
        QUANTIZERS["qjl"](sketch="orthogonal"),
        QUANTIZERS["qjl"](bits=2, sketch="orthogonal"),
        QUANTIZERS["prod"](bits=2, sketch="orthogonal", sketch_size=3 * dim // 4),
    ):
        inner = (round_trip(quantizer, x) * x).sum(dim=-1)
        sampling = inner.std().item() / math.sqrt(inner.numel())
        assert inner.mean().item() == pytest.approx(1.0, abs=4 * sampling + 2e-4)
        assert sampling < 4e-3


def test_gaussian_sketches_have_no_bias():
    x = unit_tiles(32, 16)
    for name, bits in (("qjl", 1), ("prod", 2)):
        means = torch.tensor(
            [mean_inner(round_trip(QUANTIZERS[name](bits=bits, seed=seed), x), x) for seed in range(48)]
        )
        assert means.mean().item() == pytest.approx(1.0, abs=4 * means.std().item() / math.sqrt(48))
        assert means.std().item() / math.sqrt(48) < 5e-3


@pytest.mark.parametrize("sketch", PROD)
@pytest.mark.parametrize(("name", "bits"), [("qjl", 1), ("prod", 2)])
def test_the_mean_of_many_sketches_is_the_key(name, bits, sketch):
    """There is no bias in any direction: the squared error of the mean of n estimates is that of one, divided by n."""
    x, count = unit_tiles(32, 1), 64
    estimates = [round_trip(QUANTIZERS[name](bits=bits, sketch=sketch, seed=seed), x) for seed in range(count)]
    one = sum((estimate - x).square().sum(dim=-1).mean() for estimate in estimates) / count
    mean = (sum(estimates) / count - x).square().sum(dim=-1).mean()
    assert (mean * count).item() == pytest.approx(one.item(), rel=0.1)


def test_sketches_and_rotations_differ():
    prod = QUANTIZERS["prod"](block=64, rotation="qr", sketch="orthogonal")
    first, second = prod.sketches(128, torch.device("cpu"))
    rotation = prod.stage.rotation_of(128, 1, torch.device("cpu"))
    for left, right in ((first, second), (first, rotation[:64, :64]), (second, rotation[64:, 64:])):
        cosine = torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0)
        assert abs(cosine.item()) < 0.1
