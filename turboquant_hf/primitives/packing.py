"""Packed codes: the one description of the byte layout.

Codes of `bits` bits (1..8) are split into planes, one for each of the powers of two 8 | 4 | 2 | 1 that add up
to `bits`, widest first; the widest plane holds the low-order bits of the code:

    bits   1    2    3      4    5      6      7        8
    planes 1    2    2+1    4    4+1    4+2    4+2+1    8

n codes lie along the last axis, padded with zero codes to n8 = ceil(n / 8) * 8. A plane of width p takes
P = n8 * p / 8 bytes. Its byte j holds, in bits [f * p, (f + 1) * p), the field of the code with index
j + f * P, for f = 0 .. 8 / p - 1. So at 4 bits the low nibbles are the first half of the codes and the high
nibbles the second half. The planes stand one after the other along the last axis: n8 * bits / 8 bytes in all.
No field straddles two bytes.

A reader shifts and masks whole bytes and gets runs of neighbouring codes: nothing has to be interleaved.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (8, 4, 2, 1)


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


def _field_shifts(width: int, device: torch.device) -> Tensor:
    """uint8 [8 / width, 1]: 0, width, ... below 8. Made on the device: a copy from the host would wait."""
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]


def _check_bytes(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"{name}.dtype={tensor.dtype}: must be torch.uint8")
    if tensor.ndim == 0:
        raise ValueError(f"{name}.ndim=0: must be at least 1")
