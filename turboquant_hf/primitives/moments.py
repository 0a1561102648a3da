"""Linear maps from second moments: the best basis for rounding a vector of which only inner products matter.

A vector x is rounded as y = A x, so an error n of y is an error A^-1 n of x. Let S = E[x x'], let the error be weighed
by W (for keys E[q q'], for values W_o' W_o), and let the rounding error of y be white with the energy of y. Then

    E[error' W error]  is proportional to  tr(A S A') tr(A^-T W A^-1),

and over all matrices A it is least for

    A = diag(l^-1/4) U' W^1/2,    W^1/2 S W^1/2 = U diag(l) U'.

Both traces are then the sum of l^1/2. The channels of y are uncorrelated. Channel i has the energy l_i^1/2, and its
error counts in proportion to l_i^1/2, too. Among diagonal matrices, the best is A_ii = (W_ii / S_ii)^1/4: by the
Cauchy-Schwarz inequality, the sum of A_ii^2 S_ii times the sum of W_ii / A_ii^2 is least where both sums have the same
terms up to a factor.
"""

from __future__ import annotations

import torch

RIDGE = 1e-6
"""This share of the mean diagonal is added to the diagonal, so that a direction that was never seen can be inverted."""


def shrunk(moment: torch.Tensor, share: float) -> torch.Tensor:
    """moment [..., D, D] moved towards its own diagonal: 0 leaves it as it is, 1 keeps only the diagonal."""
    diagonal = torch.diag_embed(moment.diagonal(dim1=-2, dim2=-1))
    return torch.lerp(moment, diagonal, share)


def rounding_map(moment: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix A of this file's text, its rows sorted by importance, and the energies of the channels of y = A x.

    Args:
        moment: S, [..., D, D], symmetric and positive semidefinite. Zeros count as the identity.
        weight: W, likewise.

    Returns: float64 [..., D, D] and [..., D], the energies in descending order.
    """
    values, vectors = torch.linalg.eigh(_regular(weight))
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
    products, basis = torch.linalg.eigh(root @ _regular(moment) @ root)
    products, basis = products.flip(-1), basis.flip(-1)
    matrix = products.pow(-0.25).unsqueeze(-1) * basis.transpose(-1, -2) @ root
    return matrix, products.sqrt()


def rounding_error(matrix: torch.Tensor, moment: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """tr(A S A') tr(A^-T W A^-1), [...]: what a map [..., D, D] costs vectors of these moments, up to a factor."""
    matrix = matrix.double()
    inverse = torch.linalg.inv(matrix)
    energy = (matrix @ moment.double() * matrix).sum(dim=(-2, -1))
    return energy * (inverse * (weight.double() @ inverse)).sum(dim=(-2, -1))


def _regular(moment: torch.Tensor) -> torch.Tensor:
    """In float64, symmetric, and invertible."""
    moment = moment.double()
    moment = (moment + moment.transpose(-1, -2)) / 2
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    eye = torch.eye(moment.shape[-1], dtype=torch.float64, device=moment.device)
    return torch.where(mean > 0.0, moment + RIDGE * mean * eye, eye)
