"""The search of `primitives.trellis.Trellis.encode` inside the Triton encoder: one word of 32 values per thread.

    prices   m_0 .. m_3 and i of every value                             (`prices`)
    search   c'[s] = min(c[s / 2] + m_a, c[8 + s / 2] + m_b + mark)      for the 16 states s, twice 32 values
    words    path bits and plain bits, and the levels that they mean

    c[s]     the least cost of all ways to state s; bit i of the state at value t is the path bit p_(t-i)
    m_0..3   what the value costs in each of the four subsets of levels
    a, b     the subsets that p_t .. p_(t-4) give, where p_(t-4) is 0 (a) or 1 (b) and state s has the other bits
    i        the number of the lowest of the four levels that are nearest to the value, one per subset

Memory of a program, in words as they are stored (`kernels.common.words.place_in_words`), neighbours side by side:

    p_prices   int32   [32][words]   what `prices.priced` returns: the four m and i of a value
    p_points   float32 [32][words]   the values, and later the levels

- A cost has the high 16 bits of a register (signed), the path to it the low 16. One minimum chooses both.
- Two ways lead into a state. They differ in p_(t-4), and the choice at value t is that bit. A path holds the last 16
  choices, the earliest in bit 0. The mark is the bit of the present choice.
- If both ways cost the same, the way without the mark is the smaller number. The reference chooses it, too.
- m_0 is subtracted from all four prices of a value, which changes no choice. Subset 0 then costs nothing, and a quarter
  of the additions falls away.
- Costs stay between -32 * `DEAREST` and 41 * `DEAREST` in a search of 32 values, which fits in 16 bits.
- A small group has fewer words than the program has threads. Several threads then search the same word and write the
  same results. A barrier before each overwriting makes sure that no thread still reads the old contents.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.common.spec import padded_size
from turboquant_hf.kernels.common.words import in_token_order, in_word_order, parities, place_in_words, word_plane
from turboquant_hf.kernels.encode.prices import priced
from turboquant_hf.kernels.encode.rounding import INTERPRETED
from turboquant_hf.primitives import trellis

WORDS_PER_PROGRAM = 256
"""Words that a program searches at a time."""
FEWEST = 64
"""Words of a group and tile that the kernel is trusted with on a GPU; the plain encoder serves smaller groups."""
STATES = tl.constexpr(16)
HALF = tl.constexpr(16)
DEAREST = tl.constexpr(trellis.DEAREST)
OPEN = tl.constexpr(trellis.OPEN)


def any_in_words(groups: tuple[CodeGroup, ...]) -> bool:
    return any(group.in_words for group in groups)


def fits(x: torch.Tensor, groups: tuple[CodeGroup, ...]) -> bool:
    """Whether the kernel codes tiles x [B, H, N, T, D] right: on a GPU, groups in words need `FEWEST` words per tile.

    On an H200, Triton 3.6 coded a group of 64 words wrong behind a group of 32. Tiles of 128 tokens have at least 64.
    """
    return not x.is_cuda or all(group.size * x.shape[3] >= 32 * FEWEST for group in groups if group.in_words)


def room_for_points(x: torch.Tensor, groups: tuple[CodeGroup, ...], programs: int) -> torch.Tensor:
    """Memory of `write_words` (float32), for `programs` programs per head of tiles x [B, H, N, T, D]."""
    if not any_in_words(groups):
        return x
    size = x.shape[0] * x.shape[1] * programs * x.shape[3] * padded_size(x.shape[4])
    return torch.empty(2 * size, dtype=torch.float32, device=x.device)


@triton.constexpr_function
def _subset_of(register):
    """The subset of a value, from path bits of which bit i is p_(t-i): parities of h0 = 23 and h1 = 04 octal."""
    return 2 * ((register & 0o23).bit_count() & 1) + ((register & 0o04).bit_count() & 1)


@triton.constexpr_function
def words_at_once(count):
    return min(WORDS_PER_PROGRAM, triton.next_power_of_2(count))


@triton.constexpr_function
def _raised_byte(subset):
    """PTX: byte `subset` as a signed number times 2**16, and the low half of another register."""
    return f"prmt.b32 $0, $1, $2, 0x{8 | subset:X}{subset}54;"


@triton.jit
def _raised(price, low, subset: tl.constexpr):
    """What a subset costs, in the high half, and `low` in the low half.

    Shifts would be merged into the additions, which then are not merged with the minimums.
    """
    if INTERPRETED:
        return ((price << (8 * (3 - subset))) >> 24 << 16) | low
    else:
        return tl.inline_asm_elementwise(
            _raised_byte(subset), "=r,r,r", [price, low], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip


@triton.jit
def _step(costs, price, mark, MARKED: tl.constexpr):
    """One value: the costs of the best ways to all states, with their paths. mark: 1 << number of the step."""
    none = mark * 0
    zero = (none, _raised(price, none, 1), _raised(price, none, 2), _raised(price, none, 3))
    one = zero
    if MARKED:
        one = (mark, _raised(price, mark, 1), _raised(price, mark, 2), _raised(price, mark, 3))
    new = ()
    for state in tl.static_range(STATES):
        a = costs[state // 2]
        b = costs[STATES // 2 + state // 2]
        if _subset_of(state) != 0:
            a += zero[_subset_of(state)]
        if MARKED or _subset_of(STATES + state) != 0:
            b += one[_subset_of(STATES + state)]
        new = new + (tl.minimum(a, b),)  # noqa: RUF005
    return new


@triton.jit
def _four(p_first, COUNT: tl.constexpr):
    """What is stored for four neighbouring values of words."""
    loaded = ()
    for i in tl.static_range(4):
        loaded = loaded + (tl.load(p_first + i * COUNT),)  # noqa: RUF005
    return loaded


@triton.jit
def _search(costs, p_price, p_point, p_cells, p_near, GROUP: tl.constexpr, COUNT: tl.constexpr, FIRST: tl.constexpr):
    """16 values. The first search prices them, and stores the prices. The second one marks choices in the paths.

    What is stored is loaded four values ahead.
    """
    p_from = p_point if FIRST else p_price
    coming = _four(p_from, COUNT)
    mark = tl.full((), 1, tl.int32)
    for quad in range(HALF // 4):
        prices = coming
        coming = _four(p_from + tl.minimum(quad + 1, HALF // 4 - 1) * 4 * COUNT, COUNT)
        if FIRST:
            points = prices
            prices = ()
            for i in tl.static_range(4):
                price = priced(points[i], p_cells, p_near, GROUP)
                tl.store(p_price + (4 * quad + i) * COUNT, price)
                prices = prices + (price,)  # noqa: RUF005
        for i in tl.static_range(4):
            costs = _step(costs, prices[i], mark << i, not FIRST)
        mark = mark << 4
    return costs


@triton.jit
def _least(costs):
    least = costs[0]
    for state in tl.static_range(1, STATES):
        least = tl.minimum(least, costs[state])
    return least


@triton.jit
def _of_state(costs, state):
    """The path to a state."""
    path = costs[0]
    for s in tl.static_range(1, STATES):
        path = tl.where(state == s, costs[s], path)
    return path & 0xFFFF


@triton.jit
def _reversed(path):
    """The state after four choices, oldest in bit 0: bit i of a state is p_(t-i)."""
    return (path & 1) << 3 | (path & 2) << 1 | (path >> 1) & 2 | (path >> 3) & 1


@triton.jit
def _path(word, p_prices, p_points, p_cells, p_near, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """The path bits of words, uint32, by two searches. The circle is closed between values 15 and 16.

    First search, values 0 to 31: any start and end. It gives the best state between values 15 and 16. It needs no
    paths. Bits 0..3 of a cost hold the state that the way began in instead, bits 4..7 its state between 15 and 16.
    Second search, values 16 to 31 and then 0 to 15: it starts and ends in that state, and gives the path.
    """
    p_price = p_prices + word
    p_point = p_points + word
    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (tl.full(word.shape, state, tl.int32),)  # noqa: RUF005
    costs = _search(costs, p_price, p_point, p_cells, p_near, GROUP, COUNT, True)
    ways = ()
    for state in tl.static_range(STATES):
        ways = ways + (costs[state] + (state << 4),)  # noqa: RUF005
    LATE: tl.constexpr = HALF * COUNT
    costs = _search(ways, p_price + LATE, p_point + LATE, p_cells, p_near, GROUP, COUNT, True)
    tl.debug_barrier()
    ways = ()
    for state in tl.static_range(STATES):
        ways = ways + (tl.where((costs[state] & 15) == state, costs[state], costs[state] + (OPEN << 16)),)  # noqa: RUF005
    closing = (_least(ways) >> 4) & 15

    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (tl.where(closing == state, 0, (5 * DEAREST) << 16),)  # noqa: RUF005
    early = _search(costs, p_price + LATE, p_point, p_cells, p_near, GROUP, COUNT, False)
    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (early[state] & -0x10000,)  # noqa: RUF005
    costs = _search(costs, p_price, p_point, p_cells, p_near, GROUP, COUNT, False)
    late = _of_state(costs, closing)
    # The choices of a half are p_(first - 4) .. p_(first + 11).
    middle = _of_state(early, _reversed(late & 15))
    return ((middle << 12) | (late >> 4) | (late << 28)).to(tl.uint32, bitcast=True)


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
def _finish(path, word, p_prices, p_points, p_levels, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """The words of plain bits that belong to paths; levels take the place of the values."""
    BITS: tl.constexpr = GROUP.bits
    z1, z0 = parities(path)
    plain = ()
    for _ in tl.static_range(BITS - 1):
        plain = plain + (tl.zeros(word.shape, tl.uint32),)  # noqa: RUF005
    p_lowest = p_prices.to(tl.pointer_type(tl.uint8)) + 4 * word
    p_level = p_points + word
    coming = _four(p_lowest, 4 * COUNT)
    for quad in range(8):
        numbers = ()
        for i in tl.static_range(4):
            lowest = coming[i].to(tl.uint32)
            subset = ((z1 >> i) & 1) << 1 | ((z0 >> i) & 1)
            numbers = numbers + (lowest + ((subset - lowest) & 3),)  # noqa: RUF005
        coming = _four(p_lowest + tl.minimum(quad + 1, 7) * 16 * COUNT, 4 * COUNT)
        for i in tl.static_range(4):
            level = tl.load(p_levels + numbers[i].to(tl.int32))
            tl.store(p_level + i * COUNT, level)
        new = ()
        for p in tl.static_range(BITS - 1):
            fields = plain[p] >> 4
            for i in tl.static_range(4):
                fields = _with_field(fields, numbers[i] >> 2, i, GROUP, p)
            new = new + (fields,)  # noqa: RUF005
        plain = new
        z1 = z1 >> 4
        z0 = z0 >> 4
        p_level += 4 * COUNT
    return plain


@triton.jit
def write_words(
    point, t, p_room, p_codes, p_cells, p_near, p_levels, GROUP: tl.constexpr, T: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Code vectors `point` [tokens, channels] of one group, whose rows are the tokens t, and store its words.

    A NaN costs nothing, whatever its code (`priced`). Other values are below 2**15 units of the grid: points have norm
    sqrt(size). SORTED: whether row r is token r. p_codes: the group's first byte; p_room: 8 bytes per value.

    Returns: the levels, 0 in channels that are not the group's.
    """
    BITS: tl.constexpr = GROUP.bits
    COUNT: tl.constexpr = GROUP.size * T // 32
    TOKENS: tl.constexpr = point.shape[0]
    WHOLE: tl.constexpr = SORTED and TOKENS == T and GROUP.size == GROUP.block
    p_prices = tl.multiple_of(p_room.to(tl.pointer_type(tl.int32)), 16)
    p_points = tl.multiple_of(p_room + 32 * COUNT, 16)
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
        path = _path(word, p_prices, p_points, p_cells, p_near, GROUP, COUNT)
        plain = _finish(path, word, p_prices, p_points, p_levels, GROUP, COUNT)
        p_word = p_codes.to(tl.pointer_type(tl.uint32)) + word * BITS
        for p in tl.static_range(BITS - 1):
            tl.store(p_word + p, plain[p])
        tl.store(p_word + (BITS - 1), path)
    tl.debug_barrier()
    if WHOLE:
        level = in_token_order(tl.load(p_points + o_point), TOKENS, CHANNEL_MAJOR)
    else:
        level = tl.load(p_points + o_point, mask=m_point, other=0.0)
    tl.debug_barrier()
    return level
