"""Levels of a trellis's words on a CPU: whole words are taken apart by shifts, and a table gives two levels at a time.

The level number of a value is (plain bits, z1, z0), where z1 and z0 are parities of rotated path bits
(`primitives.trellis`). Four numbers of 32 bits have the low four bits of the level numbers of a word: nibble n of the
one for (a, b) belongs to code 4 n + 2 b + a. That code is the word's value 16 a + 8 b + n (`kernels.codes`), so these
numbers, one after the other, have the values in their own order.
"""

from __future__ import annotations

import torch

from turboquant_hf.kernels.codes import CodeGroup, from_places
from turboquant_hf.primitives import Trellis
from turboquant_hf.primitives.memo import once

EVEN, PAIRS, ONES = 0x55555555, 0x33333333, 0x11111111
"""Every second bit, the lower two of every four, the lowest of every four."""
MOST_BITS = 5
"""The widest codes: their level numbers have a fifth and a sixth bit, which are looked up beside a nibble."""


def word_levels(codes: torch.Tensor, group: CodeGroup, tile: int, channel_major: bool) -> torch.Tensor:
    """The levels of a group in words.

    Args:
        codes: uint8 [..., bytes of the group in a tile], beginning at multiples of 4 bytes.

    Returns: float32 [..., channels, tile] where `channel_major`, else [..., tile, channels].
    """
    book = group.codebook
    *plain, path = codes.view(torch.int32).unflatten(-1, (-1, book.bits)).unbind(-1)
    z1, z0 = _parity(path, book.h0), _parity(path, book.h1)
    # Of the codes with even and of those with odd numbers: pairs of bits (z1, z0).
    parities = (z0 & EVEN | z1 << 1 & ~EVEN, z0 >> 1 & EVEN | z1 & ~EVEN)
    nibbles, higher = [], []
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        subset = parities[a] >> 2 * b & PAIRS
        if len(plain) == 4:  # one plane of four bits
            nibbles.append(subset | (plain[2 * b + a] & PAIRS) << 2)
            higher.append(plain[2 * b + a] >> 2 & PAIRS)
            continue
        above = plain[a] if len(plain) > 1 else plain[0] >> a & EVEN if plain else torch.zeros_like(path)
        nibbles.append(subset | (above >> 2 * b & PAIRS) << 2)
        if len(plain) == 3:
            higher.append(plain[2] >> 2 * b + a & ONES)
    index = torch.stack(nibbles, dim=-1).view(torch.uint8)
    if higher:
        index = torch.stack([index, torch.stack(higher, dim=-1).view(torch.uint8)], dim=-1)
        index = index.view(torch.int16).squeeze(-1)
    if not channel_major:  # pairs are neighbouring channels: here they are moved at an eighth of the levels' bytes
        index = from_places(index, tile, group.size, channel_major=False)
    lead, rows = codes.shape[:-1], group.size if channel_major else tile
    index = index.reshape(lead.numel(), -1).long()  # torch deals the rows of a gather out to its threads
    pairs = _pairs(book).expand(index.shape[0], -1).gather(1, index)
    return pairs.view(torch.float32).view(*lead, rows, -1)


def _parity(path: torch.Tensor, taps: int) -> torch.Tensor:
    """The parity of the path bits that `taps` names, for every value of a word, int32."""
    found = torch.zeros_like(path)
    for i in range(taps.bit_length()):
        if taps >> i & 1:
            found ^= path << i | path >> 32 - i & (1 << i) - 1 if i else path
    return found


@once(maxsize=64)
@torch.inference_mode(False)
def _pairs(codebook: Trellis) -> torch.Tensor:
    """[1, 256, 8192 or 16384] float64, each the bytes of two levels: those of two nibbles.

    Bits 4 and 5 of a level's number stand 8 places above its nibble.
    """
    if codebook.bits > MOST_BITS or codebook.word != 32:
        raise ValueError(f"{codebook.name}: words of {codebook.word} codes of {codebook.bits} bits are not supported")
    more = max(codebook.bits - 3, 0)
    index, mask = torch.arange(1 << (12 + more if more else 8), device="cpu"), 16 * ((1 << more) - 1)
    numbers = torch.stack([index >> shift & 15 | index >> 4 + shift & mask for shift in (0, 4)], dim=-1)
    levels = codebook.tensor()[numbers % len(codebook.levels)]
    return levels.contiguous().view(torch.float64).view(1, -1)
