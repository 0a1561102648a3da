"""words.cuh step by step in plain Python: how a lane of decode.cu turns its words of a trellis into levels."""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import groups_of
from turboquant_hf.kernels.codes import TileCoding, tile_bytes
from turboquant_hf.kernels.decode.cuda.source import ROW_CENTRE, WORD_CENTRE, level_bytes
from turboquant_hf.kernels.encode.reference import decode_rotated
from turboquant_hf.primitives import Trellis, pack_words, trellis_code

EVEN, FIELD, TILE = 0x55555555, 0x33333333, 128


def select(mask: int, x: int, y: int) -> int:
    return (x & mask) | (y & ~mask & 0xFFFFFFFF)


def rotate_left(x: int, count: int) -> int:
    return (x << count | x >> (32 - count) % 32) & 0xFFFFFFFF if count % 32 else x


class Word:
    """`Word<BITS, SHARES>` after `take_parities(share)`."""

    def __init__(self, words: list[int], shares: int = 1, share: int = 0) -> None:
        bits, w = len(words), list(words)
        path = w[-1]
        z1, z0 = path ^ rotate_left(path, 1) ^ rotate_left(path, 4), rotate_left(path, 2)
        if shares > 1:
            self.parities = [select(EVEN, rotate_left(path, 2 - share), z1 * (2 - share) & 0xFFFFFFFF)]
            if bits > 2:
                w[0] = w[share]
            if bits == 5:
                w[2] = w[2 + share]
            if bits % 2 == 0:
                w[bits - 2] >>= share
        else:
            self.parities = [select(EVEN, z0, z1 << 1 & 0xFFFFFFFF), select(EVEN, z0 >> 1, z1)]
        self.plain = [w[i] if bits > 2 else w[0] >> i & EVEN if bits == 2 else 0 for i in (0, 1)]
        self.planes = [(self.parities, self.plain)]
        if bits == 4:
            agree, equal = [], []
            for plain, third in zip(self.plain[: 2 // shares], (w[2], w[2] >> 1), strict=False):
                agree.append(EVEN & ~(plain >> 1 ^ third))
                equal.append(agree[-1] & ~(plain >> 1 ^ plain))
            self.planes = [(self.plain, agree), (self.parities, equal)]
        self.units, self.wide = 8 // shares, w if bits == 5 else None

    def selectors(self, unit: int) -> list[tuple[int, ...]]:
        """Of the bytes of a unit, what the selectors of all look-ups say."""
        half = unit // 4
        phase = 2 * (unit // 2 % 2) + half
        found = []
        if self.wide:
            own, mask = self.wide[phase], 0xFFFFFFFF
            outer = ((own >> 1 & own & own << 1) | ~(own >> 1 | own | own << 1)) & 0x44444444
            subsets = self.parities[half] >> (0 if phase < 2 else 2)
            for code in (own, own ^ 0x88888888, (subsets & FIELD | outer) & mask):
                found.append([code >> 16 * (unit % 2) + 4 * j & 15 for j in range(4)])
            return list(zip(*found, strict=True))
        for low, high in self.planes:
            code = select(FIELD, low[half], high[half] << 2) if phase < 2 else select(FIELD, low[half] >> 2, high[half])
            found.append([code >> 16 * (unit % 2) + 4 * j & 15 for j in range(4)])
        return list(zip(*found, strict=True))


def number_of(selectors: tuple[int, ...]) -> int:
    """The level number that the selectors of a byte stand for."""
    if len(selectors) == 1:
        return selectors[0]
    if len(selectors) == 3:
        own, other, second = selectors
        assert other == own ^ 8 and second < 8 and second >> 2 == (own >> 1 in (0, 7))
        return 4 * own + (second & 3)
    first, second = selectors
    agree, upper = first >> 2, first >> 1 & 1
    assert first < 8 and second < 8  # a set top bit would repeat a sign
    assert second >> 2 == (agree and upper == first & 1)
    return 16 * (upper if agree else 1 - upper) + 4 * (first & 3) + (second & 3)


def looked_up(selectors: tuple[int, ...], code: Trellis) -> float:
    """`levels` of one byte, less the bias; levels are odd multiples of half a unit."""
    table = level_bytes(code.bits, code.steps)
    if code.bits < 4:
        return (table[selectors[0]] - WORD_CENTRE) * code.unit
    if code.bits == 5:  # a selector with its top bit set gives eight copies of the byte's top bit
        own, other, second = selectors
        found = [table[8 * half + (s & 7)] if s < 8 else 255 * (table[8 * half + (s & 7)] >> 7)
                 for half, s in enumerate((own, other))]  # fmt: skip
        return ((found[0] & found[1]) + table[16 + second] - ROW_CENTRE[5]) * code.unit
    first, second = selectors
    assert 0 <= table[first] + table[8 + second] < 128
    return (table[first] + table[8 + second] - WORD_CENTRE) * code.unit


def exact_values(codes: torch.Tensor, groups, channel_major: bool) -> torch.Tensor:
    """The levels of one tile, [TILE, channels], by the reference."""
    packed = {"codes": codes[None], "scale": torch.ones(1, 1, TILE)}
    return decode_rotated(packed, TileCoding(torch.empty(0), groups, channel_major=channel_major))[0]


def as_words(packed: torch.Tensor) -> torch.Tensor:
    """Bytes of the last axis as 32-bit words."""
    return packed.contiguous().view(torch.int32).long() & 0xFFFFFFFF


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_lane_decodes_a_word(bits, shares):
    """Byte j of unit u of a word is value 4 u + j for any path, and every level comes from the table."""
    code, generator = trellis_code(bits, 64), torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (40, 32), generator=generator).to(torch.uint8)
    wanted, levels = code.numbers(codes), code.decode(codes)
    for words, numbers, exact in zip(as_words(pack_words(codes, bits)).tolist(), wanted, levels, strict=True):
        found = []
        for share in range(shares):
            word = Word(words, shares, share)
            found += [selectors for unit in range(word.units) for selectors in word.selectors(unit)]
        order = [4 * (place % 8) + 2 * (place // 8 % 2) + place // 16 for place in range(32)]  # kernels/codes.py
        assert [number_of(selectors) for selectors in found] == numbers[order].tolist()
        decoded = torch.tensor([looked_up(selectors, code) for selectors in found])
        torch.testing.assert_close(decoded, exact[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_lane_finds_its_values(bits, shares):
    """`ChannelWords`: unit u, byte j of lane part t is token 32 t + 4 u + j of the row's channel."""
    groups, channels = groups_of((16, bits), make=trellis_code), 16
    codes = torch.randint(0, 256, (tile_bytes(groups, TILE, True),), dtype=torch.uint8)
    exact = exact_values(codes, groups, True)
    rows = as_words(codes).view(channels, 4, bits)
    found = torch.zeros(TILE, channels)
    for channel in range(channels):
        for t in range(4):
            for share in range(shares):
                word = Word(rows[channel, t].tolist(), shares, share)
                for u in range(word.units):
                    for j, selectors in enumerate(word.selectors(u)):
                        token = 32 * t + 4 * (u + share * word.units) + j
                        found[token, channel] = looked_up(selectors, groups[0].codebook)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 128, 192])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_a_lane_finds_its_keys(bits, size):
    """`TokenWords`: `Pair<I>` and `Token<I, R>` read the tokens that `OwnTokens` counts for a lane."""
    groups = groups_of((size, bits), make=trellis_code)
    codes = torch.randint(0, 256, (tile_bytes(groups, TILE, False),), dtype=torch.uint8)
    exact = exact_values(codes, groups, False)
    memory, units = as_words(codes), size // 16
    found = torch.full((TILE, size), torch.nan)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for turn in range(2):
            at = lane * bits + turn * 32 * units * bits
            for i in range(4):
                first, begin = 2 * units * i, 2 * units * i // 8
                count = (first + 2 * units + 7) // 8 - begin
                starts = [at + 32 * (begin + j) * bits for j in range(count)]
                pair = [Word(memory[start : start + bits].tolist()) for start in starts]
                for r in range(2):
                    token = g // 2 * 32 + g % 2 * 2 + 4 * (4 * turn + i) + r
                    for u in range(units):
                        place = first + r * units + u
                        for j, selectors in enumerate(pair[place // 8 - begin].selectors(place % 8)):
                            found[token, t * size // 4 + 4 * u + j] = looked_up(selectors, groups[0].codebook)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
