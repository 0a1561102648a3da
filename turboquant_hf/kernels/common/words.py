"""How Triton kernels read words of a trellis's codes (`kernels.codes.to_words`, `primitives.packing`)."""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.primitives import Trellis, planes


def word_planes(codebook: Trellis) -> tuple[tuple[int, int, int], ...]:
    """(width of the plane, shift of its field in the plain bits, index in the plane) of every word of plain bits.

    Raises: ValueError for another trellis than the one that kernels are written for.
    """
    if (codebook.h0, codebook.h1, codebook.word) != (0o23, 0o04, 32):
        raise ValueError(
            f"{codebook.name}: h0={codebook.h0:#o}, h1={codebook.h1:#o}, word={codebook.word} is not supported; "
            "allowed: h0=0o23, h1=0o4, word=32"
        )
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
def level_numbers(p_group, token, channel, GROUP: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """The number of the level that each code stands for: int32. token, channel: index tensors that broadcast."""
    BITS: tl.constexpr = GROUP.bits
    QUARTER: tl.constexpr = GROUP.size // 4
    if CHANNEL_MAJOR:
        word = channel * (T // 32) + token // 32
        place = token % 32 + channel * 0
    else:
        lane = token // 32 * 8 + token // 2 % 2 * 4 + channel // QUARTER
        in_lane = (token % 32 // 4 * 2 + token % 2) * QUARTER + channel % QUARTER
        word = in_lane // 32 * (T // 4) + lane
        place = in_lane % 32
    index = (place % 8 * 4 + place // 8 % 2 * 2 + place // 16).to(tl.uint32)
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
