"""The search of `primitives.trellis.Trellis.encode` inside the Triton encoder: one word of 32 values per thread.

    prices   m_0 .. m_3 and i of every value                             (`prices`)
    search   c'[s] = min(c[s / 2] + m_a, c[8 + s / 2] + m_b + mark)      for the 16 states s, twice 32 values

    c[s]     the least cost of all ways to state s; bit i of the state at value t is the path bit p_(t-i)
    m_0..3   what the value costs in each of the four subsets of levels
    a, b     the subsets that p_t .. p_(t-4) give, where p_(t-4) is 0 (a) or 1 (b) and state s has the other bits
    i        the number of the lowest of the four levels that are nearest to the value, one per subset

- A cost has the high 16 bits of a register (signed), the path to it the low 16. One minimum chooses both.
- Two ways lead into a state. They differ in p_(t-4), and the choice at value t is that bit. A path holds the last 16
  choices, the earliest in bit 0. The mark is the bit of the present choice.
- If both ways cost the same, the way without the mark is the smaller number. The reference chooses it, too.
- m_0 is subtracted from all four prices of a value, which changes no choice. Subset 0 then costs nothing, and a quarter
  of the additions falls away.
- Costs stay between -32 * `DEAREST` and 37 * `DEAREST`: states that may not begin start at 5 * `DEAREST`, and each of
  32 values adds at most `DEAREST`. This fits in 16 bits.
- Few warps run per SM, because a tile fills the registers, so a thread must not wait for memory. Loads are issued
  early: a value eight values before it is needed, i and stored prices four.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.kernels.encode.prices import lowest_near, priced
from turboquant_hf.kernels.encode.rounding import INTERPRETED, looked_up
from turboquant_hf.primitives import trellis

H0, H1, _ = trellis.SIXTEEN_STATES
STATES = tl.constexpr(16)
HALF = tl.constexpr(16)
DEAREST = tl.constexpr(trellis.DEAREST)
OPEN = tl.constexpr(trellis.OPEN)


@triton.constexpr_function
def _subset_of(register):
    """The subset of a value, from path bits of which bit i is p_(t-i): parities of h0 and h1."""
    return 2 * ((register & H0).bit_count() & 1) + ((register & H1).bit_count() & 1)


def _step_text(marked: bool) -> str:
    """`_step` in PTX: $0 to $15 are the new costs, $16 to $31 the old ones, $32 the prices, $33 the mark.

    Written operation by operation in Triton, steps take seconds to compile, and shifts are merged into additions, which
    then are not merged with the minimums. Here one permutation (prmt) puts a price of 8 bits, with its sign, into the
    high half.
    """
    lines = [".reg .b32 a, b, none, zero<4>, one<4>;", "mov.b32 none, 0;"]
    for subset in (1, 2, 3):
        place = f"0x{8 | subset:X}{subset}54"
        lines.append(f"prmt.b32 zero{subset}, $32, none, {place};")
        if marked:
            lines.append(f"prmt.b32 one{subset}, $32, $33, {place};")
    for state in range(16):
        ways = [f"${16 + state // 2}", f"${24 + state // 2}"]
        for way, (register, name) in enumerate(((state, "zero"), (16 + state, "one" if marked else "zero"))):
            subset = _subset_of(register)
            price = f"{name}{subset}" if subset else "$33" if marked and way else ""
            if price:
                lines.append(f"add.s32 {'ab'[way]}, {ways[way]}, {price};")
                ways[way] = "ab"[way]
        lines.append(f"min.s32 ${state}, {ways[0]}, {ways[1]};")
    return "{" + " ".join(lines) + "}"


_COSTS = tl.constexpr((tl.int32,) * 16)
_OPERANDS = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 18))
_MARKED, _UNMARKED = tl.constexpr(_step_text(True)), tl.constexpr(_step_text(False))


@triton.jit
def _step(costs, price, mark, MARKED: tl.constexpr):
    """One value: the costs of the best ways to all states, with their paths. mark: 1 << number of the step."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            _MARKED if MARKED else _UNMARKED, _OPERANDS, costs + (price, mark), dtype=_COSTS, is_pure=True, pack=1
        )  # fmt: skip
    zero = (0, price << 16 >> 24 << 16, price << 8 >> 24 << 16, price >> 24 << 16)
    new = ()
    for state in tl.static_range(STATES):
        a = costs[state // 2] + zero[_subset_of(state)]
        b = costs[STATES // 2 + state // 2] + zero[_subset_of(STATES + state)]
        if MARKED:
            b += mark
        new = new + (tl.minimum(a, b),)  # noqa: RUF005
    return new


@triton.jit
def four(p_first, COUNT: tl.constexpr):
    """What is stored for values n .. n + 3 of each word. p_first points at value n; COUNT entries lie between two."""
    loaded = ()
    for i in tl.static_range(4):
        loaded = loaded + (tl.load(p_first + i * COUNT),)  # noqa: RUF005
    return loaded


@triton.jit
def _search(costs, p_price, COUNT: tl.constexpr):
    """16 values, whose choices are marked in the paths. Prices are loaded four values ahead."""
    coming = four(p_price, COUNT)
    mark = tl.full((), 1, tl.int32)
    for quad in range(HALF // 4):
        prices = coming
        coming = four(p_price + tl.minimum(quad + 1, HALF // 4 - 1) * 4 * COUNT, COUNT)
        for i in tl.static_range(4):
            costs = _step(costs, prices[i], mark << i, True)
        mark = mark << 4
    return costs


@triton.jit
def _four_lowest(points, p_cells, GROUP: tl.constexpr):
    lowest = ()
    for i in tl.static_range(4):
        lowest = lowest + (lowest_near(points[i], p_cells, GROUP),)  # noqa: RUF005
    return lowest


@triton.jit
def _first_search(costs, p_price, p_point, p_cells, p_near, GROUP: tl.constexpr, COUNT: tl.constexpr):
    """16 values without marks. Prices and stores them. i is loaded four values ahead, the values themselves eight."""
    points = four(p_point, COUNT)
    lowest = _four_lowest(points, p_cells, GROUP)
    coming = four(p_point + 4 * COUNT, COUNT)
    for quad in range(HALF // 4):
        near = ()
        for i in tl.static_range(4):
            near = near + (looked_up(p_near, lowest[i]),)  # noqa: RUF005
        later = _four_lowest(coming, p_cells, GROUP)
        last = four(p_point + tl.minimum(quad + 2, HALF // 4 - 1) * 4 * COUNT, COUNT)
        prices = ()
        for i in tl.static_range(4):
            prices = prices + (priced(points[i], lowest[i], near[i], GROUP),)  # noqa: RUF005
            tl.store(p_price + (4 * quad + i) * COUNT, prices[i])
        for i in tl.static_range(4):
            costs = _step(costs, prices[i], 0, False)
        points = coming
        coming = last
        lowest = later
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
def path_of(word, p_prices, p_points, p_cells, p_near, GROUP: tl.constexpr, COUNT: tl.constexpr):
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
    costs = _first_search(costs, p_price, p_point, p_cells, p_near, GROUP, COUNT)
    ways = ()
    for state in tl.static_range(STATES):
        ways = ways + (costs[state] + (state << 4),)  # noqa: RUF005
    LATE: tl.constexpr = HALF * COUNT
    costs = _first_search(ways, p_price + LATE, p_point + LATE, p_cells, p_near, GROUP, COUNT)
    # Where several threads search one word, one of them has stored its prices, and all read them below.
    tl.debug_barrier()
    ways = ()
    for state in tl.static_range(STATES):
        ways = ways + (tl.where((costs[state] & 15) == state, costs[state], costs[state] + (OPEN << 16)),)  # noqa: RUF005
    closing = (_least(ways) >> 4) & 15

    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (tl.where(closing == state, 0, (5 * DEAREST) << 16),)  # noqa: RUF005
    early = _search(costs, p_price + LATE, COUNT)
    costs = ()
    for state in tl.static_range(STATES):
        costs = costs + (early[state] & -0x10000,)  # noqa: RUF005
    late = _of_state(_search(costs, p_price, COUNT), closing)
    # The choices of a half are p_(first - 4) .. p_(first + 11).
    middle = _of_state(early, _reversed(late & 15))
    return ((middle << 12) | (late >> 4) | (late << 28)).to(tl.uint32, bitcast=True)
