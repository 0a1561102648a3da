from __future__ import annotations

import math

import pytest
import torch

from turboquant_hf.primitives import hadamard_matrix, has_hadamard, head_rotations, rotation_matrix
from turboquant_hf.primitives.rotation import _cached_head_rotations, _cached_rotation

KINDS = ["hadamard", "qr", "identity", "auto"]


def assert_orthogonal(r):
    eye = torch.eye(r.shape[-1], dtype=r.dtype).expand_as(r)
    torch.testing.assert_close(r @ r.mT, eye, atol=1e-12, rtol=0)


def clear_caches():
    _cached_rotation.cache_clear()
    _cached_head_rotations.cache_clear()


@pytest.mark.parametrize("dim", [*range(1, 131), 256, 576])
def test_rotation_matrix_auto_is_orthogonal(dim):
    r = rotation_matrix(dim, seed=dim, dtype=torch.float64)
    assert_orthogonal(r)
    kind = "hadamard" if has_hadamard(dim) else "qr"
    assert torch.equal(r, rotation_matrix(dim, seed=dim, kind=kind, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("dim", [1, 2, 12, 92, 128])
def test_rotation_matrix_is_orthogonal(kind, rounds, dim):
    assert_orthogonal(rotation_matrix(dim, seed=3, kind=kind, rounds=rounds, dtype=torch.float64))


def test_rotation_matrix_hadamard_is_h_times_signs():
    r = rotation_matrix(24, seed=5, kind="hadamard", dtype=torch.float64)
    signs = (hadamard_matrix(24).double().T @ r / math.sqrt(24)).round()
    assert torch.equal(signs, torch.diag(signs.diagonal())) and (signs.diagonal().abs() == 1).all()
    assert len(signs.diagonal().unique()) == 2


def test_rotation_matrix_rounds_are_fresh():
    one, two = (rotation_matrix(16, rounds=n, dtype=torch.float64) for n in (1, 2))
    assert not torch.allclose(one @ one, two)


def test_rotation_matrix_keeps_its_random_stream():
    """Saved codes can only be read with the matrix that they were written with, so it must never change."""
    signs = (rotation_matrix(16, seed=7, kind="hadamard")[0] * 4).int().tolist()
    assert signs == [1, -1, 1, -1, 1, 1, 1, 1, -1, 1, -1, 1, -1, 1, -1, -1]
    torch.testing.assert_close(
        rotation_matrix(3, seed=7)[0],
        torch.tensor([-0.12451980262994766, 0.6232473254203796, 0.7720476388931274]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_matrix_is_deterministic(kind):
    clear_caches()
    first = rotation_matrix(20, seed=1, kind=kind)
    assert rotation_matrix(20, seed=1, kind=kind) is first
    clear_caches()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with torch.inference_mode():
        again = rotation_matrix(20, seed=1, kind=kind)
    assert torch.equal(first, again)
    assert not again.is_inference()
    assert torch.equal(before, torch.get_rng_state())
    if kind != "identity":
        assert not torch.equal(first, rotation_matrix(20, seed=2, kind=kind))


@pytest.mark.parametrize("dim", [23, 24, 92], ids=["qr", "paley", "williamson"])
def test_rotation_matrix_ignores_the_default_device_and_dtype(dim):
    expected = rotation_matrix(dim, seed=4)
    clear_caches()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            again = rotation_matrix(dim, seed=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32 and torch.equal(expected, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rotation_matrix_casts_the_float64_matrix(dtype):
    exact = rotation_matrix(7, seed=2, dtype=torch.float64)
    assert torch.equal(rotation_matrix(7, seed=2, dtype=dtype), exact.to(dtype))


def test_rotation_matrix_qr_is_haar():
    """Moments of the orthogonal group: E[R_ij^2] = 1/d, E[R_00^4] = 3 / (d (d + 2)), E[trace] = 0."""
    draws = torch.stack([rotation_matrix(4, seed=s, kind="qr") for s in range(2000)])
    torch.testing.assert_close((draws**2).mean(0), torch.full((4, 4), 0.25), atol=0.025, rtol=0)
    torch.testing.assert_close((draws**4).mean(), torch.tensor(3 / 24), atol=0.005, rtol=0)
    assert draws.diagonal(dim1=1, dim2=2).sum(1).mean().abs() < 0.1


@pytest.mark.parametrize("dim", [48, 50], ids=["hadamard", "qr"])
def test_head_rotations(dim):
    r = head_rotations(6, dim, seed=9, dtype=torch.float64)
    assert r.shape == (6, dim, dim)
    assert_orthogonal(r)
    neighbours = torch.cat([r, head_rotations(6, dim, seed=10, dtype=torch.float64)])
    assert len({tuple(m.flatten().tolist()) for m in neighbours}) == 12
    clear_caches()
    assert torch.equal(r, head_rotations(6, dim, seed=9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 8, "rounds": 0}, "rounds=0"),
        ({"dim": 8, "kind": "dct"}, "kind='dct'"),
        ({"dim": 7, "kind": "hadamard"}, "n=7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rotation_matrix_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        rotation_matrix(**arguments)


def test_head_rotations_rejects_no_heads():
    with pytest.raises(ValueError, match="num_heads=0"):
        head_rotations(0, 8, seed=0)
