"""Packed codes: the only description of the bytes of a row and of a word (`kernels.codes` makes tiles of them).

Codes of `bits` bits (1..8) are split into planes. There is one plane for each of the powers of two 8, 4, 2 and 1 that
add up to `bits`. The widest plane comes first and holds the low-order bits of the code:

    bits   1    2    3      4    5      6      7        8
    planes 1    2    2+1    4    4+1    4+2    4+2+1    8

n codes lie along the last axis, padded with zero codes to n8 = ceil(n / 8) * 8. A plane of width p takes
P = n8 * p / 8 bytes. Bits [f * p, (f + 1) * p) of its byte j hold the field of code j + f * P, for f = 0 .. 8 / p - 1.
At 4 bits, for example, the low nibbles are the first half of the codes and the high nibbles are the second half. The
planes stand one after the other along the last axis, n8 * bits / 8 bytes in all. No field straddles two bytes.

A reader shifts and masks whole bytes and gets runs of neighbouring codes. It never has to interleave.

Codes of a trellis (`primitives.trellis`) are packed 32 at a time, because one thread reads 32 codes whole. 32 codes of
`bits` bits take `bits` 32-bit words (little-endian), side by side. The planes of the bits - 1 plain bits come first,
split and ordered as above. A plane of width w takes w words, and bits [w * m, w * (m + 1)) of its word j are the field
of code w * m + j. The last word is the path: its bit i is the highest bit of code i.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (8, 4, 2, 1)
WORD = 32
"""Codes that `pack_words` packs together."""


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """The planes of a code in the order stored, each (width in bits, shift of its field inside the code).

    Example: planes(7) is ((4, 0), (2, 4), (1, 6)).
    Raises: ValueError where bits is not in 1..8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be from 1 to 8")
    out: list[tuple[int, int]] = []
    shift = 0
    for width in WIDTHS:
        if bits & width:
            out.append((width, shift))
            shift += width
    return tuple(out)


def packed_size(n: int, bits: int) -> int:
    """Bytes that n codes of `bits` bits take: ceil(n / 8) * bits.

    Raises: ValueError where n < 0 or bits is not in 1..8.
    """
    if n < 0:
        raise ValueError(f"n={n}: must not be negative")
    return -(-n // 8) * sum(width for width, _ in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis in the layout of this module.

    Args:
        codes: uint8 [..., n], each below 2**bits. The range is not checked (that would wait for the device);
            higher bits are dropped.

    Returns: uint8 [..., packed_size(n, bits)].
    Raises: ValueError on another dtype, a 0-d tensor, or bits not in 1..8.
    """
    _check_bytes("codes", codes)
    octets = packed_size(codes.shape[-1], 1)
    padded = torch.nn.functional.pad(codes, (0, octets * 8 - codes.shape[-1]))
    out = []
    for width, shift in planes(bits):
        fields = (padded >> shift) & (2**width - 1)
        fields = fields.reshape(*codes.shape[:-1], 8 // width, octets * width)
        out.append((fields << _field_shifts(width, codes.device)).sum(dim=-2, dtype=torch.uint8))
    return torch.cat(out, dim=-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes that `pack` packed.

    Args:
        packed: uint8 [..., packed_size(n, bits)].

    Returns: uint8 [..., n], strided where n is not a multiple of 8.
    Raises: ValueError on another dtype or size, n < 0, or bits not in 1..8.
    """
    _check_bytes("packed", packed)
    if packed.shape[-1] != packed_size(n, bits):
        raise ValueError(f"packed.shape[-1]={packed.shape[-1]}: must be {packed_size(n, bits)} for n={n}, bits={bits}")
    octets = packed_size(n, 1)
    codes = packed.new_zeros(*packed.shape[:-1], octets * 8)
    start = 0
    for width, shift in planes(bits):
        plane = packed[..., None, start : start + octets * width]
        fields = (plane >> _field_shifts(width, packed.device)) & (2**width - 1)
        codes |= (fields << shift).reshape(codes.shape)
        start += octets * width
    return codes[..., :n]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack words of a trellis's codes in the layout of this module.

    Args:
        codes: uint8 [..., 32], each below 2**bits.

    Returns: uint8 [..., 4 * bits].
    Raises: ValueError on another dtype or size, or bits not in 1..8.
    """
    _check_bytes("codes", codes)
    if codes.shape[-1] != WORD:
        raise ValueError(f"codes.shape[-1]={codes.shape[-1]}: must be {WORD}")
    out = []
    for width, shift in _word_planes(bits):
        fields = ((codes >> shift) & (2**width - 1)).view(*codes.shape[:-1], 4, 8 // width, width)
        whole = (fields << _field_shifts(width, codes.device)).sum(dim=-2, dtype=torch.uint8)
        out.append(whole.transpose(-1, -2).flatten(-2))
    return torch.cat(out, dim=-1)


def unpack_words(packed: Tensor, bits: int) -> Tensor:
    """The words of codes that `pack_words` packed.

    Args:
        packed: uint8 [..., 4 * bits].

    Returns: uint8 [..., 32].
    Raises: ValueError on another dtype or size, or bits not in 1..8.
    """
    _check_bytes("packed", packed)
    if packed.shape[-1] != 4 * bits:
        raise ValueError(f"packed.shape[-1]={packed.shape[-1]}: must be {4 * bits} for bits={bits}")
    codes = packed.new_zeros(*packed.shape[:-1], WORD)
    start = 0
    for width, shift in _word_planes(bits):
        whole = packed[..., start : start + 4 * width].unflatten(-1, (width, 4)).transpose(-1, -2)
        fields = (whole.unsqueeze(-2) >> _field_shifts(width, packed.device)) & (2**width - 1)
        codes |= (fields << shift).reshape(codes.shape)
        start += 4 * width
    return codes


def _word_planes(bits: int) -> tuple[tuple[int, int], ...]:
    """`planes` of the plain bits, then the path bit's."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: must be from 1 to 8")
    return (*(planes(bits - 1) if bits > 1 else ()), (1, bits - 1))


def _field_shifts(width: int, device: torch.device) -> Tensor:
    """uint8 [8 / width, 1]: 0, width, ... below 8. Made on the device, because a copy from the host would wait."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]


def _check_bytes(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name}.dtype={tensor.dtype}: must be torch.uint8")
    if tensor.ndim == 0:
        raise ValueError(f"{name}.ndim=0: must be at least 1")
