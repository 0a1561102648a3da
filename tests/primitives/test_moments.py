"""Linear maps from second moments, against the theory of `primitives.moments`."""

from __future__ import annotations

import pytest
import torch

from turboquant_hf.primitives import rounding_error, rounding_map, shrunk

DIM = 12


def moment(seed: int, *lead: int, rank: int = 2 * DIM) -> torch.Tensor:
    """E[x x'] of correlated vectors with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, rank, DIM, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(-1, 1, DIM, dtype=torch.float64) @ torch.randn(DIM, DIM, generator=generator).double()
    return x.transpose(-1, -2) @ x / rank


def test_channels_are_uncorrelated_and_as_important_as_they_are_strong():
    keys, queries = moment(0, 3), moment(1, 3)
    matrix, energy = rounding_map(keys, queries)
    inverse = torch.linalg.inv(matrix)
    expected = torch.diag_embed(energy)
    # The ridge that keeps singular moments invertible shows in the last digits.
    atol = 1e-4 * float(energy.max())
    torch.testing.assert_close(matrix @ keys @ matrix.transpose(1, 2), expected, rtol=0.0, atol=atol)
    torch.testing.assert_close(inverse.transpose(1, 2) @ queries @ inverse, expected, rtol=0.0, atol=atol)
    assert (energy.diff(dim=1) <= 0).all()


def test_the_error_is_the_square_of_the_nuclear_norm_and_no_other_matrix_has_less():
    keys, queries = moment(2), moment(3)
    matrix, energy = rounding_map(keys, queries)
    least = rounding_error(matrix, keys, queries)
    bound = torch.linalg.matrix_norm(_root(queries) @ _root(keys), ord="nuc").square()
    torch.testing.assert_close(least, bound, rtol=1e-4, atol=0.0)
    generator = torch.Generator().manual_seed(4)
    for size in (1e-3, 1e-1, 1.0):
        noise = torch.randn(20, DIM, DIM, generator=generator, dtype=torch.float64)
        others = matrix + size * matrix.norm() / DIM * noise
        assert (rounding_error(others, keys, queries) > least).all()


def test_of_diagonals_it_is_the_balance_of_root_mean_squares():
    keys, queries = shrunk(moment(5), 1.0), shrunk(moment(6), 1.0)
    matrix, _ = rounding_map(keys, queries)
    rms = [x.diagonal().sqrt() for x in (keys, queries)]
    order = (rms[0] * rms[1]).argsort(descending=True)
    expected = torch.diag((rms[1] / rms[0]).sqrt())[order]
    torch.testing.assert_close(matrix.abs(), expected, rtol=1e-4, atol=1e-9)


def test_a_full_matrix_has_less_error_than_a_diagonal_one_and_that_less_than_none():
    keys, queries = moment(7), moment(8)
    costs = [rounding_error(rounding_map(*(shrunk(x, s) for x in (keys, queries)))[0], keys, queries) for s in (0, 1)]
    assert costs[0] < costs[1] < rounding_error(torch.eye(DIM), keys, queries)


def test_predicted_errors_are_those_of_rounding():
    keys, queries = moment(9), moment(10)
    generator = torch.Generator().manual_seed(11)
    matrix, _ = rounding_map(keys, queries)
    draws = [torch.randn(200_000, DIM, generator=generator, dtype=torch.float64) for _ in range(2)]
    energy = torch.trace(matrix @ keys @ matrix.T)
    noise = draws[0] * (energy / DIM).sqrt() * 0.1  # white, with a share of the energy
    errors = (draws[1] @ _root(queries) * (noise @ torch.linalg.inv(matrix).T)).sum(dim=1)
    torch.testing.assert_close(
        errors.square().mean(), 0.01 * rounding_error(matrix, keys, queries) / DIM, rtol=0.03, atol=0.0
    )


@pytest.mark.parametrize("rank", [0, 1, DIM // 2])
def test_moments_of_nothing_and_of_a_few_directions_have_maps_that_can_be_undone(rank):
    keys = moment(12, rank=rank) if rank else torch.zeros(DIM, DIM)
    matrix, energy = rounding_map(keys, moment(13))
    assert matrix.isfinite().all() and energy.isfinite().all() and (energy > 0).all()
    torch.testing.assert_close(torch.linalg.inv(matrix) @ matrix, torch.eye(DIM).double(), rtol=0.0, atol=1e-6)


def test_shrinking_keeps_the_diagonal():
    x = moment(14)
    assert torch.equal(shrunk(x, 0.0), x)
    half = shrunk(x, 0.5)
    torch.testing.assert_close(half.diagonal(), x.diagonal())
    torch.testing.assert_close(half - torch.diag(half.diagonal()), (x - torch.diag(x.diagonal())) / 2)


def _root(x: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
