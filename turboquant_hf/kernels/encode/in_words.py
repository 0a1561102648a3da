"""Groups in words inside the Triton encoder: values go to memory in the order of words, and come back with levels.

Memory of a program, in words as they are stored (`kernels.common.words.place_in_words`), neighbours side by side:

    p_prices   int32   [32][words]   what `prices.priced` returns: the prices of a value, and i
    p_points   float32 [32][words]   the values
    p_reached  float32 [32][words]   the levels that stand for them

A small group has fewer words than the program has threads. Several threads then search the same word, and one of them
stores. Barriers make sure that no thread reads what is not stored yet, or what the next group has replaced.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.common.spec import padded_size
from turboquant_hf.kernels.common.words import in_token_order, in_word_order, parities, place_in_words, word_plane
from turboquant_hf.kernels.encode.viterbi import four, path_of

WORDS_PER_PROGRAM = 256
"""Words that a program searches at a time."""
FEWEST = 64
"""Words of a group and tile that the kernel is trusted with on a GPU; the plain encoder serves smaller groups."""


def any_in_words(groups: tuple[CodeGroup, ...]) -> bool:
    return any(group.in_words for group in groups)


def fits(x: torch.Tensor, groups: tuple[CodeGroup, ...]) -> bool:
    """Whether the kernel codes tiles x [B, H, N, T, D] right: on a GPU, groups in words need `FEWEST` words per tile.

    Before prices and levels had memory of their own, Triton 3.6 on an H200 coded a group of 64 words wrong behind a
    group of 32. This was not tried again. Tiles of 128 tokens have at least 64.
    """
    return not x.is_cuda or all(group.size * x.shape[3] >= 32 * FEWEST for group in groups if group.in_words)


def room_for_words(x: torch.Tensor, groups: tuple[CodeGroup, ...], programs: int) -> torch.Tensor:
    """Memory of `write_words`, float32, for `programs` programs per head of tiles x [B, H, N, T, D].

    12 bytes per value of a padded tile, as said above; x itself where no group is in words.
    """
    if not any_in_words(groups):
        return x
    size = x.shape[0] * x.shape[1] * programs * x.shape[3] * padded_size(x.shape[4])
    return torch.empty(3 * size, dtype=torch.float32, device=x.device)


@triton.constexpr_function
def words_at_once(count):
    return min(WORDS_PER_PROGRAM, triton.next_power_of_2(count))


@triton.jit
def _eight(p_first, COUNT: tl.constexpr):
    return four(p_first, COUNT) + four(p_first + 4 * COUNT, COUNT)


@triton.jit
def _with_field(fields, plain, i: tl.constexpr, GROUP: tl.constexpr, PLAIN: tl.constexpr):
    """`fields` with the plain bits of value i (of four) put at the top, if they belong to the word PLAIN.

    The caller shifts `fields` down by 4 before every four values.
    """
    WIDTH: tl.constexpr = word_plane(GROUP, PLAIN, 0)
    if i % WIDTH == word_plane(GROUP, PLAIN, 2):
        field = (plain >> word_plane(GROUP, PLAIN, 1)) & ((1 << WIDTH) - 1)
        fields |= field << (28 + i // WIDTH * WIDTH)
    return fields


@triton.jit
def _finish(path, word, p_prices, p_reached, p_levels, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """The words of plain bits that belong to paths. Stores the levels that the values have got."""
    BITS: tl.constexpr = GROUP.bits
    z1, z0 = parities(path)
    plain = ()
    for _ in tl.static_range(BITS - 1):
        plain = plain + (tl.zeros(word.shape, tl.uint32),)  # noqa: RUF005
    p_lowest = p_prices.to(tl.pointer_type(tl.uint8)) + 4 * word
    p_level = p_reached + word
    coming = _eight(p_lowest, 4 * COUNT)
    for octet in range(4):
        numbers = ()
        for i in tl.static_range(8):
            lowest = coming[i].to(tl.uint32)
            subset = ((z1 >> i) & 1) << 1 | ((z0 >> i) & 1)
            numbers = numbers + (lowest + ((subset - lowest) & 3),)  # noqa: RUF005
        coming = _eight(p_lowest + tl.minimum(octet + 1, 3) * 32 * COUNT, 4 * COUNT)
        levels = ()
        for i in tl.static_range(8):
            levels = levels + (tl.load(p_levels + numbers[i].to(tl.int32)),)  # noqa: RUF005
        for quad in tl.static_range(2):
            new = ()
            for p in tl.static_range(BITS - 1):
                fields = plain[p] >> 4
                for i in tl.static_range(4):
                    fields = _with_field(fields, numbers[4 * quad + i] >> 2, i, GROUP, p)
                new = new + (fields,)  # noqa: RUF005
            plain = new
        for i in tl.static_range(8):
            tl.store(p_level + i * COUNT, levels[i])
        z1 = z1 >> 8
        z0 = z0 >> 8
        p_level += 8 * COUNT
    return plain


@triton.jit
def write_words(
    point, t, p_room, p_codes, p_cells, p_near, p_levels, GROUP: tl.constexpr, T: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Code vectors `point` [tokens, channels] of one group, whose rows are the tokens t, and store its words.

    A NaN costs nothing, whatever its code (`priced`). Other values are below 2**15 units of the grid, because points
    have norm sqrt(size), or they belong to a token whose norm overflows. SORTED: whether row r is token r. p_codes: the
    group's first byte; p_room: 12 bytes per value.

    Returns: the points, read back so that they need no registers during the search, and their levels. Both are 0 in
    channels that are not the group's.
    """
    BITS: tl.constexpr = GROUP.bits
    COUNT: tl.constexpr = GROUP.size * T // 32
    TOKENS: tl.constexpr = point.shape[0]
    WHOLE: tl.constexpr = SORTED and TOKENS == T and GROUP.size == GROUP.block
    p_prices = tl.multiple_of(p_room.to(tl.pointer_type(tl.int32)), 16)
    p_points = tl.multiple_of(p_room + 32 * COUNT, 16)
    p_reached = tl.multiple_of(p_room + 2 * 32 * COUNT, 16)
    p_cells += GROUP.cells
    p_near += GROUP.table
    p_levels += GROUP.table
    if WHOLE:
        o_point = tl.arange(0, 32)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        tl.store(p_points + o_point, in_word_order(point, CHANNEL_MAJOR))
    else:
        c = tl.arange(0, GROUP.block)
        m_point = (t < T)[:, None] & (c < GROUP.size)[None, :]
        of_point, index = place_in_words(t[:, None], c[None, :], GROUP, T, CHANNEL_MAJOR)
        o_point = index * COUNT + of_point
        tl.store(p_points + o_point, point, mask=m_point)
    tl.debug_barrier()
    for low in range(0, COUNT, words_at_once(COUNT)):
        word = tl.minimum(low + tl.arange(0, words_at_once(COUNT)), COUNT - 1)
        path = path_of(word, p_prices, p_points, p_cells, p_near, GROUP, COUNT)
        plain = _finish(path, word, p_prices, p_reached, p_levels, GROUP, COUNT)
        p_word = p_codes.to(tl.pointer_type(tl.uint32)) + word * BITS
        for p in tl.static_range(BITS - 1):
            tl.store(p_word + p, plain[p])
        tl.store(p_word + (BITS - 1), path)
    tl.debug_barrier()
    if WHOLE:
        point = in_token_order(tl.load(p_points + o_point), TOKENS, CHANNEL_MAJOR)
        level = in_token_order(tl.load(p_reached + o_point), TOKENS, CHANNEL_MAJOR)
    else:
        point = tl.load(p_points + o_point, mask=m_point, other=0.0)
        level = tl.load(p_reached + o_point, mask=m_point, other=0.0)
    tl.debug_barrier()
    return point, level
