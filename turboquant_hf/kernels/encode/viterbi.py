"""The search of `primitives.trellis.Trellis.encode` inside the Triton encoder: one word per thread, all in registers.

- A program writes its normalised vectors to memory of its own, because the values of a word belong to many threads.
- One thread searches one word. For each of the 16 states it keeps the cost of the best path there, and the path's bits.
  Nothing is traced back.
- The chosen levels then overwrite the vectors in memory, because the scale rules read levels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.common.spec import padded_size
from turboquant_hf.kernels.common.words import parities, rotated, word_plane
from turboquant_hf.primitives.trellis import WARM_UP

WORDS = 256
"""Words that a program searches at a time."""
STATES = tl.constexpr(16)
LEAD = tl.constexpr(WARM_UP)


def any_in_words(groups: tuple[CodeGroup, ...]) -> bool:
    return any(group.in_words for group in groups)


def room_for_points(x: torch.Tensor, groups: tuple[CodeGroup, ...], programs: int) -> torch.Tensor:
    """Memory for the vectors of `write_words`: float32, for `programs` programs per head of tiles x [B, H, N, T, D]."""
    if not any_in_words(groups):
        return x
    size = x.shape[0] * x.shape[1] * programs * x.shape[3] * padded_size(x.shape[4])
    return torch.empty(size, dtype=torch.float32, device=x.device)


@triton.constexpr_function
def _subset_of(register):
    """The subset of a value, from path bits of which bit i is p_(t-i): parities of h0 = 23 and h1 = 04 octal."""
    return 2 * ((register & 0o23).bit_count() & 1) + ((register & 0o04).bit_count() & 1)


@triton.constexpr_function
def words_at_once(group, tile):
    return min(WORDS, triton.next_power_of_2(group.size * tile // 32))


@triton.jit
def _offset(word, index, GROUP: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """Offset of value `index` of a word in vectors [T, block]. Neighbouring words have neighbouring channels."""
    QUARTER: tl.constexpr = GROUP.size // 4
    place = index % 2 * 16 + index // 2 % 2 * 8 + index // 4
    if CHANNEL_MAJOR:
        return (word // GROUP.size * 32 + place) * GROUP.block + word % GROUP.size
    else:
        lane = word % (T // 4)
        in_lane = word // (T // 4) * 32 + place
        pair = in_lane // QUARTER
        token = lane // 8 * 32 + pair // 2 * 4 + lane // 4 % 2 * 2 + pair % 2
        return token * GROUP.block + lane % 4 * QUARTER + in_lane % QUARTER


@triton.jit
def _nearest(x, p_edges, GROUP: tl.constexpr):
    """Number of the subset's level nearest to x, int32; the last for a NaN. p_edges: the first threshold, one per x."""
    pick = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(GROUP.bits - 1):
        higher = pick + (1 << (GROUP.bits - 2 - step))
        pick = tl.where(x <= tl.load(p_edges + higher - 1), pick, higher)
    return pick


@triton.constexpr_function
def _level(group, subset, index):
    return group.book[subset + 4 * index]


@triton.constexpr_function
def _edge(group, subset, index):
    """The threshold between levels index - 1 and index of a subset."""
    return (group.book[subset + 4 * index - 4] + group.book[subset + 4 * index]) / 2


@triton.jit
def _nearest_level(x, GROUP: tl.constexpr, SUBSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Of levels [LOW, HIGH) of a subset, the one nearest to x. Comparisons alone are quicker than loads."""
    if HIGH - LOW == 1:
        return tl.zeros_like(x) + _level(GROUP, SUBSET, LOW)
    else:
        MIDDLE: tl.constexpr = (LOW + HIGH) // 2
        below = _nearest_level(x, GROUP, SUBSET, LOW, MIDDLE)
        above = _nearest_level(x, GROUP, SUBSET, MIDDLE, HIGH)
        return tl.where(x <= _edge(GROUP, SUBSET, MIDDLE), below, above)


@triton.jit
def _search(
    costs, paths, first, steps, unmarked, word, m_word, p_points, GROUP: tl.constexpr, T: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    """Read `steps` values from `first` on: the cost of the best path to every state, and its bits, the oldest in bit 0.

    unmarked: the path bits of so many first steps are left out.
    """
    for step in range(steps):
        mark = tl.cast(step >= unmarked, tl.uint32) << tl.cast(tl.maximum(step - unmarked, 0), tl.uint32)
        o_x = _offset(word, (first + step) % 32, GROUP, T, CHANNEL_MAJOR)
        x = tl.load(p_points + o_x, mask=m_word, other=0.0)
        branches = ()
        for subset in tl.static_range(4):
            away = x - _nearest_level(x, GROUP, subset, 0, 1 << (GROUP.bits - 1))
            square = away * away
            branches = branches + (tl.where(square < float("inf"), square, 0.0),)  # noqa: RUF005
        new_costs = ()
        new_paths = ()
        for state in tl.static_range(STATES):
            zero = branches[_subset_of(state)] + costs[state // 2]
            one = branches[_subset_of(STATES + state)] + costs[STATES // 2 + state // 2]
            path = tl.where(one < zero, paths[STATES // 2 + state // 2], paths[state // 2])
            if state % 2:
                path |= mark
            new_costs = new_costs + (tl.minimum(zero, one),)  # noqa: RUF005
            new_paths = new_paths + (path,)  # noqa: RUF005
        costs = new_costs
        paths = new_paths
    return costs, paths


@triton.jit
def _path(
    word, m_word, p_points, GROUP: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr
):  # fmt: skip
    """The path bits of words, uint32. A search with free ends finds a state, in which a second one starts and ends."""
    none = tl.zeros(word.shape, tl.uint32)
    costs = ()
    paths = ()
    for _ in tl.static_range(STATES):
        costs = costs + (tl.zeros(word.shape, tl.float32),)  # noqa: RUF005
        paths = paths + (none,)  # noqa: RUF005
    costs, found = _search(
        costs, paths, 0, 2 * LEAD, LEAD - 4, word, m_word, p_points, GROUP, T, CHANNEL_MAJOR
    )  # fmt: skip
    best = costs[0]
    path = found[0]
    for state in tl.static_range(1, STATES):
        path = tl.where(costs[state] < best, found[state], path)
        best = tl.minimum(costs[state], best)
    # Bit i of a state is p_(t-i): of the steps LEAD - 1, LEAD - 2, ..., which are marked in bits 3, 2, 1 and 0.
    closing = (path >> 3) & 1
    for i in tl.static_range(1, 4):
        closing |= ((path >> (3 - i)) & 1) << i
    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (tl.where(closing == state, 0.0, float("inf")),)  # noqa: RUF005
    costs, found = _search(
        costs, paths, LEAD, 32, 0, word, m_word, p_points, GROUP, T, CHANNEL_MAJOR
    )  # fmt: skip
    for state in tl.static_range(STATES):
        path = tl.where(closing == state, found[state], path)
    return rotated(path, LEAD)


@triton.jit
def _with_field(fields, pick, index, i: tl.constexpr, GROUP: tl.constexpr, PLAIN: tl.constexpr):
    """A word of plain bits, with the bits of value `index` (i modulo 4) added if they belong to this word."""
    WIDTH: tl.constexpr = word_plane(GROUP, PLAIN, 0)
    if i % WIDTH == word_plane(GROUP, PLAIN, 2):
        field = (pick >> word_plane(GROUP, PLAIN, 1)) & ((1 << WIDTH) - 1)
        fields |= field.to(tl.uint32) << (index // WIDTH * WIDTH)
    return fields


@triton.jit
def write_words(
    point, t, p_points, p_codes, p_edges, p_levels, GROUP: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr
):  # fmt: skip
    """Code vectors `point` [tokens, channels] of one group, whose rows are the tokens t, and store its words.

    A NaN costs nothing, whatever its code. p_codes: the group's first byte; p_points: room for [T, block] numbers.

    Returns: the levels, 0 in channels that are not the group's.
    """
    BITS: tl.constexpr = GROUP.bits
    COUNT: tl.constexpr = GROUP.size * T // 32
    SUBSET: tl.constexpr = 1 << (BITS - 1)
    p_edges += GROUP.table
    p_levels += GROUP.table
    c = tl.arange(0, GROUP.block)
    o_point = t[:, None] * GROUP.block + c[None, :]
    m_point = (t < T)[:, None] & (c < GROUP.size)[None, :]
    tl.store(p_points + o_point, point, mask=m_point)
    tl.debug_barrier()
    for low in range(0, COUNT, words_at_once(GROUP, T)):
        word = low + tl.arange(0, words_at_once(GROUP, T))
        m_word = word < COUNT
        path = _path(word, m_word, p_points, GROUP, T, CHANNEL_MAJOR)
        z1, z0 = parities(path)
        plain = (path,)
        for _ in tl.static_range(BITS - 1):
            plain = (tl.zeros(word.shape, tl.uint32),) + plain  # noqa: RUF005
        for quad in range(8):
            for i in tl.static_range(4):
                index = quad * 4 + i
                o_x = _offset(word, index, GROUP, T, CHANNEL_MAJOR)
                x = tl.load(p_points + o_x, mask=m_word, other=0.0)
                subset = (((z1 >> index) & 1) << 1 | ((z0 >> index) & 1)).to(tl.int32)
                pick = _nearest(x, p_edges + subset * SUBSET, GROUP)
                tl.store(p_points + o_x, tl.load(p_levels + subset + 4 * pick), mask=m_word)
                new = ()
                for p in tl.static_range(BITS - 1):
                    new = new + (_with_field(plain[p], pick, index, i, GROUP, p),)  # noqa: RUF005
                plain = new + (path,)  # noqa: RUF005
        place = word
        if CHANNEL_MAJOR:
            place = word % GROUP.size * (T // 32) + word // GROUP.size
        p_word = p_codes.to(tl.pointer_type(tl.uint32)) + place * BITS
        for p in tl.static_range(BITS):
            tl.store(p_word + p, plain[p], mask=m_word)
    tl.debug_barrier()
    level = tl.load(p_points + o_point, mask=m_point, other=0.0)
    tl.debug_barrier()
    return level
