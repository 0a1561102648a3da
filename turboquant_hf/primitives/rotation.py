"""Random orthogonal matrices from a seed. The same seed gives the same matrix on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .hadamard import hadamard_matrix, has_hadamard
from .memo import once

__all__ = ["hadamard_matrix", "has_hadamard", "head_rotations", "rotation_matrix"]

KINDS = ("auto", "hadamard", "qr", "identity")


def rotation_matrix(
    dim: int,
    *,
    seed: int = 0,
    kind: str = "auto",
    rounds: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Seeded orthogonal matrix R, used as `y = x @ R.T` (arXiv 2504.19874; Hadamard form: 2404.00456).

    - "hadamard": R = H diag(signs) / sqrt(dim) with random signs, a product of `rounds` such factors.
    - "qr": uniform (Haar) over the orthogonal group: Q of a Gaussian matrix, columns signed so that the
      triangular factor has a positive diagonal (Mezzadri, math-ph/0609050). `rounds` has no effect.
    - "auto": "hadamard" where the order is known, "qr" elsewhere.
    - "identity": no rotation.

    The matrix is computed in float64 on the CPU, then cast and moved. Hadamard matrices are the same to the last bit on
    every machine; "qr" depends on LAPACK's rounding.

    Args:
        dim: number of channels, at least 1.
        seed: any integer that torch.Generator takes.
        rounds: number of Hadamard factors, at least 1.

    Returns: `dtype` [dim, dim] on `device`. The tensor is shared by all callers: do not write to it.
    Raises: ValueError on an unknown kind, dim < 1, rounds < 1, or kind="hadamard" with an order not known.
    """
    # An empty tensor resolves "cuda" to the index of the current GPU, so that a cached matrix is never on another one.
    return _cached_rotation(dim, seed, kind, rounds, dtype, torch.empty(0, device=device).device)


def head_rotations(
    num_heads: int,
    dim: int,
    *,
    seed: int,
    kind: str = "auto",
    rounds: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One rotation per head, `num_heads` >= 1 of them, as in `rotation_matrix`.

    The heads' seeds are drawn from `seed`. Heads therefore differ, and neighbouring seeds (layers) share no matrix.

    Returns: `dtype` [num_heads, dim, dim] on `device`, shared by all callers: do not write to it.
    Raises: ValueError on num_heads < 1 and as `rotation_matrix` does.
    """
    device = torch.empty(0, device=device).device
    return _cached_head_rotations(num_heads, dim, seed, kind, rounds, dtype, device)


# Inference mode is off while a tensor is made that outlives the call: a tensor made in inference mode can never take
# part in autograd later.
@once(maxsize=256)
@torch.inference_mode(False)
def _cached_rotation(dim: int, seed: int, kind: str, rounds: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _rotation(dim, seed, kind, rounds).to(device=device, dtype=dtype)


@once(maxsize=128)
@torch.inference_mode(False)
def _cached_head_rotations(
    num_heads: int, dim: int, seed: int, kind: str, rounds: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: must be at least 1")
    seeds = torch.randint(2**63 - 1, (num_heads,), generator=_generator(seed), device="cpu").tolist()
    return torch.stack([_rotation(dim, s, kind, rounds) for s in seeds]).to(device=device, dtype=dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def _rotation(dim: int, seed: int, kind: str, rounds: int) -> Tensor:
    """`rotation_matrix` in float64 on the CPU, not cached."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    if dim < 1:
        raise ValueError(f"dim={dim}: must be at least 1")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: must be at least 1")
    if kind == "auto":
        kind = "hadamard" if has_hadamard(dim) else "qr"
    if kind == "hadamard":
        return _random_hadamard(dim, rounds, _generator(seed))
    if kind == "qr":
        return _haar(dim, _generator(seed))
    return torch.eye(dim, dtype=torch.float64, device="cpu")


def _random_hadamard(dim: int, rounds: int, generator: torch.Generator) -> Tensor:
    hadamard = hadamard_matrix(dim).double()
    out = torch.eye(dim, dtype=torch.float64, device="cpu")
    for _ in range(rounds):
        signs = 2 * torch.randint(2, (dim, 1), generator=generator, device="cpu") - 1
        out = hadamard @ (signs * out)  # whole numbers until the division below: exact
    return out / math.sqrt(dim**rounds)


def _haar(dim: int, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()
