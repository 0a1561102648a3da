from __future__ import annotations

import pytest
import torch

from turboquant_hf.primitives import hadamard_matrix, has_hadamard

ORDERS = [1, 2, *range(4, 129, 4)]


@pytest.mark.parametrize("n", [*ORDERS, 180, 184, 244, 336, 1024])
def test_hadamard_matrix(n):
    h = hadamard_matrix(n)
    assert h.shape == (n, n) and h.dtype == torch.float32
    assert (h.abs() == 1).all()
    assert torch.equal(h @ h.T, n * torch.eye(n))


def test_has_hadamard_up_to_130():
    assert [n for n in range(-8, 131) if has_hadamard(n)] == ORDERS


def test_hadamard_matrix_of_a_power_of_two_is_sylvesters():
    expected = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    assert hadamard_matrix(32).tolist() == expected


@pytest.mark.parametrize("n", [-4, 0, 3, 6, 10, 129, 130, 156])
def test_hadamard_matrix_rejects(n):
    with pytest.raises(ValueError, match=f"n={n}: "):
        hadamard_matrix(n)
