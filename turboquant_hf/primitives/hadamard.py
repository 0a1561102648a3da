"""Hadamard matrices of every order up to 128 that exists, and of many larger ones.

Constructions (Horadam, "Hadamard Matrices and Their Applications", 2007, chapter 2): Sylvester doubling,
Paley I and II over a finite field of any prime-power order, Kronecker products of known orders, Williamson's
array for 92 and 116.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# Williamson's four symmetric circulants of size n, for the Hadamard order 4 n. If bit i of a number is set, the entries
# i + 1 and n - i - 1 of the first row are -1; all other entries are +1. The numbers were found by matching the periodic
# autocorrelations of pairs.
_WILLIAMSON = {
    23: (0x0A7, 0x613, 0x31F, 0x254),
    29: (0x02F3, 0x06BB, 0x30A6, 0x0B11),
}


def has_hadamard(n: int) -> bool:
    """Whether `hadamard_matrix(n)` can be built: true for 1, 2, every multiple of 4 to 128 and many above."""
    return _builder(n) is not None


def hadamard_matrix(n: int) -> Tensor:
    """Hadamard matrix H of order n: entries +-1, H H^T = n I.

    Powers of two give Sylvester's matrix, H[i, j] = (-1)^popcount(i & j).

    Returns: float32 [n, n] on the CPU, a fresh tensor at every call.
    Raises: ValueError where no construction is known (see `has_hadamard`).
    """
    build = _builder(n)
    if build is None:
        raise ValueError(
            f"n={n}: no Hadamard construction is known; allowed are 1, 2, every multiple of 4 up to 128, "
            "q + 1 (prime power q = 3 mod 4), 2 (q + 1) (prime power q = 1 mod 4) and products of these"
        )
    return build()


@lru_cache(maxsize=4096)
def _builder(n: int) -> Callable[[], Tensor] | None:
    """The construction of order n, or None. Doubling comes first, so that powers of two are Sylvester's."""
    if n == 1:
        return lambda: _signs([[1]])
    if n >= 2 and n % 2 == 0 and has_hadamard(n // 2):
        return lambda: torch.kron(_signs([[1, 1], [1, -1]]), hadamard_matrix(n // 2))
    if n < 4 or n % 4:
        return None
    if (field := _prime_power(n - 1)) and (n - 1) % 4 == 3:
        return lambda: _paley_one(*field)
    if (field := _prime_power(n // 2 - 1)) and (n // 2 - 1) % 4 == 1:
        return lambda: _paley_two(*field)
    if n // 4 in _WILLIAMSON:
        return lambda: _williamson(n // 4)
    for a in range(12, int(n**0.5) + 1, 4):
        if n % a == 0 and has_hadamard(a) and has_hadamard(n // a):
            return lambda: torch.kron(hadamard_matrix(a), hadamard_matrix(n // a))
    return None


def _signs(rows: list[list[int]]) -> Tensor:
    # The device is always given, because callers may run under torch.set_default_device.
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float32, device="cpu")


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((i for i in range(2, int(q**0.5) + 1) if q % i == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _powers_of_generator(p: int, k: int) -> list[tuple[int, ...]]:
    """The p^k - 1 non-zero elements of GF(p^k) as powers g^0, g^1, ... of a generator, digits low first.

    Tries monic polynomials f of degree k until x has order p^k - 1 modulo f. Then every non-zero residue is a power of
    x and hence invertible, so the residues form the field. No separate test of irreducibility is needed.
    """
    one = (1,) + (0,) * (k - 1)
    for low in itertools.product(range(p), repeat=k):  # x^k = low_0 + low_1 x + ...
        powers, element = [one], one
        while len(powers) < p**k:
            carry = element[-1]
            element = tuple((digit + carry * c) % p for digit, c in zip((0, *element[:-1]), low, strict=True))
            if element == one or not any(element):
                break
            powers.append(element)
        if len(powers) == p**k - 1 and element == one:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a primitive polynomial")


def _quadratic_residues(p: int, k: int) -> Tensor:
    """Jacobsthal matrix [q, q], q = p^k: 1, -1 or 0 as i - j in GF(q) is a square, a non-square or zero."""
    place = torch.tensor([p**i for i in range(k)], device="cpu")
    character = torch.zeros(p**k, dtype=torch.float32, device="cpu")
    powers = torch.tensor(_powers_of_generator(p, k), device="cpu") @ place
    character[powers[0::2]] = 1
    character[powers[1::2]] = -1
    digits = torch.arange(p**k, device="cpu")[:, None] // place % p
    return character[(digits[:, None] - digits[None]) % p @ place]


def _bordered(core: Tensor, corner: float) -> Tensor:
    """[[0, 1 ... 1], [corner, core]]: a conference matrix of order q + 1."""
    out = torch.nn.functional.pad(core, (1, 0, 1, 0), value=1.0)
    out[0, 0] = 0
    out[1:, 0] = corner
    return out


def _paley_one(p: int, k: int) -> Tensor:
    """Order q + 1 for q = p^k = 3 mod 4: I plus the skew conference matrix."""
    return _eye(p**k + 1) + _bordered(_quadratic_residues(p, k), -1.0)


def _paley_two(p: int, k: int) -> Tensor:
    """Order 2 (q + 1) for q = p^k = 1 mod 4, from the symmetric conference matrix."""
    conference = _bordered(_quadratic_residues(p, k), 1.0)
    off_diagonal = torch.kron(conference, _signs([[1, 1], [1, -1]]))
    return off_diagonal + torch.kron(_eye(p**k + 1), _signs([[1, -1], [-1, -1]]))


def _williamson(n: int) -> Tensor:
    """Order 4 n from four commuting symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4 n I."""
    distance = torch.arange(n, device="cpu")
    distance = torch.minimum((distance[:, None] - distance) % n, (distance - distance[:, None]) % n)
    rows = [[1] + [-1 if mask >> i & 1 else 1 for i in range(n // 2)] for mask in _WILLIAMSON[n]]
    a, b, c, d = _signs(rows)[:, distance]
    blocks = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(line, dim=1) for line in blocks])
