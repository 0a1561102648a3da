"""How Triton kernels read words of a trellis's codes (`kernels.codes.to_words`, `primitives.packing`)."""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.primitives import SIXTEEN_STATES, Trellis, planes


def word_planes(codebook: Trellis) -> tuple[tuple[int, int, int], ...]:
    """(width of the plane, shift of its field in the plain bits, index in the plane) of every word of plain bits.

    Raises: ValueError for another trellis than the one that kernels are written for.
    """
    if (codebook.h0, codebook.h1, codebook.word, codebook.reach) != (*SIXTEEN_STATES, 16):
        raise ValueError(f"{codebook.name}: h0={codebook.h0:#o}, h1={codebook.h1:#o}, word={codebook.word}: unknown")
    plain = planes(codebook.bits - 1) if codebook.bits > 1 else ()
    return tuple((width, shift, index) for width, shift in plain for index in range(width))


@triton.constexpr_function
def word_plane(group, word, entry):
    return group.words[word][entry]


@triton.jit
def rotated(word, COUNT: tl.constexpr):
    """uint32 words, with their bits rotated left by COUNT."""
    return (word << COUNT) | (word >> (32 - COUNT))


@triton.jit
def parities(path):
    """z1 and z0 of all values of words of path bits (`primitives.trellis`)."""
    return path ^ rotated(path, 1) ^ rotated(path, 4), rotated(path, 2)


@triton.jit
def place_in_words(token, channel, GROUP: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """The word of a value, in the order stored, and its index there: int32, for index tensors that broadcast."""
    QUARTER: tl.constexpr = GROUP.size // 4
    if CHANNEL_MAJOR:
        word = channel * (T // 32) + token // 32
        place = token % 32 + channel * 0
    else:
        lane = token // 32 * 8 + token // 2 % 2 * 4 + channel // QUARTER
        in_lane = (token % 32 // 4 * 2 + token % 2) * QUARTER + channel % QUARTER
        word = in_lane // 32 * (T // 4) + lane
        place = in_lane % 32
    return word, place % 8 * 4 + place // 8 % 2 * 2 + place // 16


@triton.jit
def in_word_order(x, CHANNEL_MAJOR: tl.constexpr):
    """[T, C] -> [32, words], as `place_in_words` says. T and C are powers of two from 32 and 16."""
    T: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    if CHANNEL_MAJOR:
        places = tl.permute(tl.reshape(x, (T // 32, 2, 2, 8, C)), (3, 2, 1, 4, 0))
    else:
        lanes = tl.permute(tl.reshape(x, (T // 32, 8, 2, 2, 4, C // 4)), (1, 3, 5, 0, 2, 4))
        places = tl.permute(tl.reshape(lanes, (C // 8, 2, 2, 8, T // 4)), (3, 2, 1, 0, 4))
    return tl.reshape(places, (32, T * C // 32))


@triton.jit
def in_token_order(words, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """The inverse of `in_word_order`: [32, words] -> [T, C]."""
    C: tl.constexpr = words.shape[1] * 32 // T
    if CHANNEL_MAJOR:
        x = tl.permute(tl.reshape(words, (8, 2, 2, C, T // 32)), (4, 2, 1, 0, 3))
    else:
        lanes = tl.permute(tl.reshape(words, (8, 2, 2, C // 8, T // 4)), (3, 2, 1, 0, 4))
        x = tl.permute(tl.reshape(lanes, (8, 2, C // 4, T // 32, 2, 4)), (3, 0, 4, 1, 5, 2))
    return tl.reshape(x, (T, C))


@triton.jit
def level_numbers(p_group, token, channel, GROUP: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """Which levels the codes of (token, channel), index tensors that broadcast, mean: int32."""
    BITS: tl.constexpr = GROUP.bits
    word, index = place_in_words(token, channel, GROUP, T, CHANNEL_MAJOR)
    index = index.to(tl.uint32)
    p_word = p_group.to(tl.pointer_type(tl.uint32)) + word * BITS
    z1, z0 = parities(tl.load(p_word + (BITS - 1)))
    number = ((z1 >> index) & 1) << 1 | ((z0 >> index) & 1)
    for plain in tl.static_range(BITS - 1):
        if word_plane(GROUP, plain, 2) == 0:
            number |= _plain_bits(p_word + plain, index, word_plane(GROUP, plain, 0), word_plane(GROUP, plain, 1))
    return number.to(tl.int32)


@triton.jit
def _plain_bits(p_plane, index, WIDTH: tl.constexpr, SHIFT: tl.constexpr):
    """The bits that one plane adds to the level numbers of the values `index` of their words."""
    fields = tl.load(p_plane + (index % WIDTH).to(tl.int32))
    return ((fields >> (index // WIDTH * WIDTH)) & ((1 << WIDTH) - 1)) << (SHIFT + 2)
