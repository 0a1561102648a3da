"""The search of `primitives.trellis.Trellis.encode` inside the Triton encoder: one word of 32 values per thread.

    place_prices     m_0 .. m_3 of every value, and i        (`prices`)
    search_words     path bits of all words: c'[s] = min(c[s / 2] + m_a, c[8 + s / 2] + m_b + mark)
                     for the 16 states s, twice 32 values
    take_levels      plain bits, and the levels that codes mean

The words of all groups of a tile are searched together, so that small groups do not leave threads idle. They stand side
by side in the memory of a program, in the order in which they are stored (`kernels.common.words.place_in_words`):

    p_room   int32 [32][words]   prices: from the top 8 bits each of m_3 - m_0, m_2 - m_0, m_1 - m_0, i;
                                 later the levels, as float32

- A cost has the high 16 bits of a register (signed), the path to it the low 16. One minimum chooses both.
- All prices are less m_0, which changes no choice. A quarter of the additions falls away: those of subset 0.
- A path is the choices of 16 values, the oldest in bit 0: 1 (the mark) for the way whose oldest path bit is 1.
  The choice at value t is p_(t-4). A tie of costs goes to the way without the mark, as in the reference.
- In 32 values a cost stays between -37 and 37 `DEAREST`.
- There may be fewer words than threads. Several threads then search the same word, and write the same. Nothing is
  overwritten that another thread may still read: there is a barrier before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.common.spec import group_count, group_of, padded_size
from turboquant_hf.kernels.common.words import in_token_order, in_word_order, parities, place_in_words, word_plane
from turboquant_hf.kernels.encode.prices import priced
from turboquant_hf.kernels.encode.rounding import INTERPRETED
from turboquant_hf.primitives import trellis

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


def room_for_words(x: torch.Tensor, groups: tuple[CodeGroup, ...], programs: int) -> torch.Tensor:
    """Memory for prices and levels (int32), for `programs` programs per head of tiles x [B, H, N, T, D]."""
    if not any_in_words(groups):
        return x
    size = x.shape[0] * x.shape[1] * programs * x.shape[3] * padded_size(x.shape[4])
    return torch.empty(size, dtype=torch.int32, device=x.device)


@triton.constexpr_function
def _subset_of(register):
    """The subset of a value, from path bits of which bit i is p_(t-i): parities of h0 = 23 and h1 = 04 octal."""
    return 2 * ((register & 0o23).bit_count() & 1) + ((register & 0o04).bit_count() & 1)


@triton.constexpr_function
def first_word(spec, tile, index):
    """Words of a tile's groups before number `index`."""
    return sum(group.size * tile // 32 for group in spec.groups[:index] if group.in_words)


@triton.constexpr_function
def word_count(spec, tile):
    return sum(group.size * tile // 32 for group in spec.groups if group.in_words)


@triton.constexpr_function
def path_place(spec, tile, index):
    """Where the path bits of word 0 would be if it were of group `index`, in units of 4 bytes from the tile's codes."""
    group = spec.groups[index]
    first = sum(other.size * tile // 32 for other in spec.groups[:index] if other.in_words)
    return group.offset // 4 + group.bits - 1 - first * group.bits


@triton.constexpr_function
def whole(group, rows, tile, in_order):
    """Whether the rows and channels of a block are the tokens and channels of a group, one by one."""
    return in_order and rows == tile and group.size == group.block


@triton.constexpr_function
def searches(spec):
    return any(group.in_words for group in spec.groups)


@triton.constexpr_function
def at_once(count, threads):
    """Of `count` words, how many are searched at a time."""
    return min(threads, triton.next_power_of_2(count))


@triton.constexpr_function
def _signed_byte(subset):
    """PTX: byte `subset` of a register as a signed number, times 2**16."""
    return f"prmt.b32 $0, $1, 0, 0x{8 + subset:X}{subset}44;"


@triton.jit
def _cost(price, subset: tl.constexpr):
    """m_subset - m_0, in the high half of a register."""
    if INTERPRETED:
        return (price << (8 * (3 - subset))) >> 24 << 16
    else:
        return tl.inline_asm_elementwise(
            _signed_byte(subset), "=r,r", [price], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip


@triton.jit
def _step(costs, price, mark, MARKED: tl.constexpr):
    """One value: the costs of the best ways to all states, with their paths. mark: 1 << number of the step."""
    zero = (mark * 0, _cost(price, 1), _cost(price, 2), _cost(price, 3))
    one = zero
    if MARKED:
        one = (mark, zero[1] | mark, zero[2] | mark, zero[3] | mark)
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
def _search(costs, p_price, COUNT: tl.constexpr, MARKED: tl.constexpr):
    """16 values, whose choices are marked in the paths if MARKED; their prices are loaded four values ahead."""
    coming = ()
    for i in tl.static_range(4):
        coming = coming + (tl.load(p_price + i * COUNT),)  # noqa: RUF005
    mark = tl.full((), 1, tl.int32)
    for quad in range(HALF // 4):
        prices = coming
        p_next = p_price + tl.minimum(quad + 1, HALF // 4 - 1) * 4 * COUNT
        coming = ()
        for i in tl.static_range(4):
            coming = coming + (tl.load(p_next + i * COUNT),)  # noqa: RUF005
        for i in tl.static_range(4):
            costs = _step(costs, prices[i], mark << i, MARKED)
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
def _path(word, p_prices, COUNT: tl.constexpr):
    """The path bits of words, uint32: a search with free ends finds the state that a second one starts and ends in.

    The circle is closed between values 15 and 16: both searches are of whole halves of the word. The first one leaves
    its paths out: bits 0..3 are the state that a way began in, bits 4..7 its state between the halves.
    """
    p_first = p_prices + word
    p_second = p_first + HALF * COUNT
    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (tl.full(word.shape, state, tl.int32),)  # noqa: RUF005
    costs = _search(costs, p_first, COUNT, False)
    ways = ()
    for state in tl.static_range(STATES):
        ways = ways + (costs[state] + (state << 4),)  # noqa: RUF005
    costs = _search(ways, p_second, COUNT, False)
    ways = ()
    for state in tl.static_range(STATES):
        ways = ways + (tl.where((costs[state] & 15) == state, costs[state], costs[state] + (OPEN << 16)),)  # noqa: RUF005
    closing = (_least(ways) >> 4) & 15

    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (tl.where(closing == state, 0, (5 * DEAREST) << 16),)  # noqa: RUF005
    early = _search(costs, p_second, COUNT, True)
    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (early[state] & -0x10000,)  # noqa: RUF005
    late = _of_state(_search(costs, p_first, COUNT, True), closing)
    # The choices of a half are p_(first - 4) .. p_(first + 11).
    middle = _of_state(early, _reversed(late & 15))
    return ((middle << 12) | (late >> 4) | (late << 28)).to(tl.uint32, bitcast=True)


@triton.jit
def _with_field(fields, plain, i: tl.constexpr, GROUP: tl.constexpr, PLAIN: tl.constexpr):
    """A word of plain bits, moved down 4 bits every 4 values, with those of a value that is i modulo 4 at the top."""
    WIDTH: tl.constexpr = word_plane(GROUP, PLAIN, 0)
    if i % WIDTH == word_plane(GROUP, PLAIN, 2):
        field = (plain >> word_plane(GROUP, PLAIN, 1)) & ((1 << WIDTH) - 1)
        fields |= field << (28 + i // WIDTH * WIDTH)
    return fields


@triton.jit
def _finish(path, p_room, p_levels, GROUP: tl.constexpr, TOTAL: tl.constexpr):
    """The words of plain bits that belong to paths; levels take the place of the prices at p_room."""
    z1, z0 = parities(path)
    plain = ()
    for _ in tl.static_range(GROUP.bits - 1):
        plain = plain + (tl.zeros(path.shape, tl.uint32),)  # noqa: RUF005
    for _quad in range(8):
        numbers = ()
        for i in tl.static_range(4):
            lowest = (tl.load(p_room + i * TOTAL) & 0xFF).to(tl.uint32)
            subset = ((z1 >> i) & 1) << 1 | ((z0 >> i) & 1)
            numbers = numbers + (lowest + ((subset - lowest) & 3),)  # noqa: RUF005
        for i in tl.static_range(4):
            level = tl.load(p_levels + numbers[i].to(tl.int32))
            tl.store(p_room + i * TOTAL, level.to(tl.int32, bitcast=True))
        new = ()
        for p in tl.static_range(GROUP.bits - 1):
            fields = plain[p] >> 4
            for i in tl.static_range(4):
                fields = _with_field(fields, numbers[i] >> 2, i, GROUP, p)
            new = new + (fields,)  # noqa: RUF005
        plain = new
        z1 = z1 >> 4
        z0 = z0 >> 4
        p_room += 4 * TOTAL
    return plain


@triton.jit
def _rows_in_room(G: tl.constexpr, SPEC: tl.constexpr, T: tl.constexpr):
    """Where in p_room the words of group G are: [32, words]."""
    COUNT: tl.constexpr = group_of(SPEC, G).size * T // 32
    TOTAL: tl.constexpr = word_count(SPEC, T)
    return tl.arange(0, 32)[:, None] * TOTAL + first_word(SPEC, T, G) + tl.arange(0, COUNT)[None, :]


@triton.jit
def _in_room(t, G: tl.constexpr, SPEC: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """Where in p_room the values of tokens t and of the channels of group G are, and which there are."""
    GROUP: tl.constexpr = group_of(SPEC, G)
    c = tl.arange(0, GROUP.block)
    word, index = place_in_words(t[:, None], c[None, :], GROUP, T, CHANNEL_MAJOR)
    at = index * word_count(SPEC, T) + first_word(SPEC, T, G) + word
    return at, (t < T)[:, None] & (c < GROUP.size)[None, :]


@triton.jit
def place_prices(
    point, t, p_room, p_cells, p_near, G: tl.constexpr, SPEC: tl.constexpr, T: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Store the prices of vectors `point` [tokens, channels] of group G, whose rows are the tokens t.

    A NaN costs nothing, whatever its code. Other values are below 2**15 units of the grid: points have norm
    sqrt(size). SORTED: whether row r is token r.
    """
    GROUP: tl.constexpr = group_of(SPEC, G)
    price = priced(point, p_cells + GROUP.cells, p_near + GROUP.table, GROUP)
    if whole(GROUP, point.shape[0], T, SORTED):
        tl.store(p_room + _rows_in_room(G, SPEC, T), in_word_order(price, CHANNEL_MAJOR))
    else:
        at, inside = _in_room(t, G, SPEC, T, CHANNEL_MAJOR)
        tl.store(p_room + at, price, mask=inside)


@triton.jit
def search_words(p_room, p_codes, SPEC: tl.constexpr, T: tl.constexpr, THREADS: tl.constexpr):
    """Find and store the path bits of all words of a tile, whose prices are in p_room."""
    TOTAL: tl.constexpr = word_count(SPEC, T)
    tl.debug_barrier()
    for low in range(0, TOTAL, at_once(TOTAL, THREADS)):
        word = tl.minimum(low + tl.arange(0, at_once(TOTAL, THREADS)), TOTAL - 1)
        path = _path(word, p_room, TOTAL)
        place = word * 0
        for g in tl.static_range(group_count(SPEC)):
            if group_of(SPEC, g).in_words:
                own = path_place(SPEC, T, g) + word * group_of(SPEC, g).bits
                place = tl.where(word >= first_word(SPEC, T, g), own, place)
        tl.store(p_codes.to(tl.pointer_type(tl.uint32)) + place, path)
    tl.debug_barrier()


@triton.jit
def take_levels(
    t, p_room, p_codes, p_levels, G: tl.constexpr, SPEC: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr, SORTED: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Store the plain bits of group G, whose paths are stored.

    Returns: the levels [tokens, channels], 0 in channels that are not the group's.
    """
    GROUP: tl.constexpr = group_of(SPEC, G)
    TOTAL: tl.constexpr = word_count(SPEC, T)
    COUNT: tl.constexpr = GROUP.size * T // 32
    for low in range(0, COUNT, at_once(COUNT, THREADS)):
        word = tl.minimum(low + tl.arange(0, at_once(COUNT, THREADS)), COUNT - 1)
        p_word = (p_codes + GROUP.offset).to(tl.pointer_type(tl.uint32)) + word * GROUP.bits
        path = tl.load(p_word + (GROUP.bits - 1))
        plain = _finish(path, p_room + first_word(SPEC, T, G) + word, p_levels + GROUP.table, GROUP, TOTAL)
        for p in tl.static_range(GROUP.bits - 1):
            tl.store(p_word + p, plain[p])
    tl.debug_barrier()
    p_level = p_room.to(tl.pointer_type(tl.float32))
    if whole(GROUP, BLOCK_T, T, SORTED):
        level = in_token_order(tl.load(p_level + _rows_in_room(G, SPEC, T)), BLOCK_T, CHANNEL_MAJOR)
    else:
        at, inside = _in_room(t, G, SPEC, T, CHANNEL_MAJOR)
        level = tl.load(p_level + at, mask=inside, other=0.0)
    tl.debug_barrier()
    return level
