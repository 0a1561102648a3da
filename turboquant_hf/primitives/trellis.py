"""Trellis-coded quantization: k bits per value choose among 2^(k+1) levels. Its error is 13 to 30 % below Lloyd-Max's.

The code is Ungerboeck's rate-1/2 code of 16 states in feed-forward form (IEEE Trans. Inf. Theory 28, 1982, table I:
h0 = 23, h1 = 04 octal), used as a quantizer as in Marcellin and Fischer (IEEE Trans. Commun. 38, 1990).

    levels    2^(k+1) increasing numbers; level i belongs to subset i mod 4
    path      one bit p_t per value
    subset    2 z1 + z0   with   z1 = p_t ^ p_(t-1) ^ p_(t-4)   and   z0 = p_(t-2)
    level     4 * (k - 1 plain bits) + 2 z1 + z0
    code      path bit (the highest bit), then the plain bits: k bits in memory

The trellis bites its tail: indices wrap around inside a word of 32 values. Bit t of a 32-bit word W is p_t, so that

    z1 of all values = W ^ rotl(W, 1) ^ rotl(W, 4)        z0 of all values = rotl(W, 2)

These are four instructions per 32 values, without a table, and they need no other word.
`kernels.codes.to_words` says which 32 values form a word, `primitives.packing` how they are packed.

The encoder is Viterbi's search, and closes the circle with a second one (`Trellis.encode`). It counts in whole numbers,
which are small enough to share a register with a path. A GPU may round one to its neighbour, because it rounds a
product and a sum together. For a value x, measured in grid units (`Trellis.grid`),

    i         how many of the thresholds (L[j] + L[j + 4]) / 2 are below x
    L[i .. i + 3]   the nearest levels of the four subsets, since level j belongs to subset j mod 4
    e_s       L (L - 2 x) of subset s: its squared error less x^2
    m_s       min(round((e_s - min e) * price), DEAREST): what the subset costs
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

from .codebook import constant
from .memo import once

SIXTEEN_STATES = (0o23, 0o04, 32)
"""h0, h1 and word of the code of 16 states, which the kernels are written for."""
WARM_UP = 16
"""Values, at least, that the search sees on each side of the point where it closes the circle."""
PRICE = 80.0
"""What an error of twice the median gap between levels costs in the search, in its whole numbers."""
DEAREST = 127
"""The most that a subset may cost for one value. The difference of two such costs fits in a signed byte."""
OPEN = 40
"""What it costs the first search to end in another state than it began in. From 24 to 80 it saves 1 % of error."""
CELLS = 256
"""Cells of a grid: from -CELLS / 2 units to CELLS / 2."""
MAGIC = 12582912.0
"""1.5 * 2**23: added to a float32 from 0 to 2**22, it leaves the nearest whole number in the low bits."""
WORDS_AT_ONCE = {"cpu": 1 << 12, "other": 1 << 16}
"""Words per search: few enough to stay in a CPU's cache, or enough to keep an accelerator busy."""


@dataclass(frozen=True)
class Trellis:
    """A trellis code for words of `word` numbers of variance 1.

    Args:
        levels: 2**(bits + 1) increasing numbers, bits from 1 to 7.
        name: for messages and tables.
        unit: where it is not 0, the levels are odd multiples of unit / 2, as in `Codebook`.
        h0, h1: bit i of h0 (of h1) says that p_(t-i) enters z1 (z0). The highest bit of h0 is the memory of the code.
        word: values per word. Tail biting costs little if a word has at least 8 times the memory of the code.

    Raises: ValueError where the levels are not increasing, their count is not 4, 8, ... 256, or h1 looks further back
        than h0.
    """

    levels: tuple[float, ...]
    name: str
    unit: float = 0.0
    h0: int = SIXTEEN_STATES[0]
    h1: int = SIXTEEN_STATES[1]
    word: int = SIXTEEN_STATES[2]

    def __post_init__(self) -> None:
        if len(self.levels) not in (4, 8, 16, 32, 64, 128, 256):
            raise ValueError(f"levels has {len(self.levels)} entries: must be a power of two from 4 to 256")
        if not all(low < high for low, high in pairwise(self.levels)):
            raise ValueError(f"levels={self.levels}: must be increasing")
        if not 0 < self.h1 < self.h0 or self.memory < 1:
            raise ValueError(f"h0={self.h0:#o}, h1={self.h1:#o}: must be positive, h0 the larger")
        if self.word < self.memory:
            raise ValueError(f"word={self.word}: must be at least the memory of the code, {self.memory}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return len(self.levels).bit_length() - 2

    @property
    def memory(self) -> int:
        """The number of earlier path bits that a value depends on. The code has 2**memory states."""
        return self.h0.bit_length() - 1

    @property
    def grid(self) -> float:
        """The unit of the search: levels are odd multiples of it, or simply at most 127 times as large."""
        return self.unit / 2 if self.unit else max(map(abs, self.levels)) / 127

    @property
    def price(self) -> float:
        """What a squared error of one `grid` squared costs in the search."""
        gap = median(high - low for low, high in pairwise(self.levels)) / self.grid
        return PRICE / (2 * gap) ** 2

    @property
    def _edges(self) -> tuple[float, ...]:
        """Thresholds of i, in grid units; on a grid they are whole numbers."""
        edges = ((low + high) / 2 / self.grid for low, high in zip(self.levels, self.levels[4:], strict=False))
        return tuple(float(round(edge)) if self.unit else edge for edge in edges)

    def cells(self) -> Tensor:
        """The number i of the values in each cell: uint8 [CELLS]. Cell n begins n - CELLS / 2 grid units from 0."""
        cell = torch.arange(-CELLS // 2, CELLS // 2)
        return torch.bucketize(cell, torch.tensor(self._edges), right=True).to(torch.uint8)

    @property
    def reach(self) -> int:
        """Values that the first search sees on each side of its point. Both sides together are whole rounds."""
        half = self.word // 2 if self.word % 2 == 0 else self.word
        return -(-max(WARM_UP, 4 * self.memory) // half) * half

    @property
    def steps(self) -> tuple[int, ...]:
        """The whole numbers k with level = (k + 1/2) unit; empty without a unit."""
        return tuple(round(level / self.unit - 0.5) for level in self.levels) if self.unit else ()

    def tensor(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels as a tensor [2**(bits + 1)], shared by all callers: do not write to it."""
        return constant(self.levels, torch.empty(0, device=device).device, dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Codes with nearly the least squared error: the least among all words that close the circle in the same state.

        A value whose squared error is not finite (a NaN, an infinity, 1e30) costs nothing, whatever its code. The codes
        of the other values are then chosen as if that value were not there.

        Args:
            x: whole words, one after the other, of any shape and float dtype; errors are float32.

        Returns: uint8, of the shape of x.
        """
        words = x.float().reshape(-1, self.word).t()  # [word, words]: one step of the search works on one row
        count = WORDS_AT_ONCE["cpu" if x.device.type == "cpu" else "other"]
        codes = [self._encode(part.contiguous()) for part in words.split(count, dim=1)]
        return torch.cat(codes, dim=1).t().reshape(x.shape)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels of the codes: `dtype`, of the shape of codes (integers below 2**bits, as `encode` returns them)."""
        return self.tensor(codes.device, dtype)[self.numbers(codes).int()]

    def numbers(self, codes: Tensor) -> Tensor:
        """The number of the level that each code stands for, uint8: the plain bits, z1, z0."""
        path = codes.reshape(-1, self.word) >> (self.bits - 1)
        plain = codes & (2 ** (self.bits - 1) - 1)
        return plain << 2 | self._subsets(path, dim=-1).view(codes.shape)

    def _subsets(self, path: Tensor, dim: int) -> Tensor:
        """2 z1 + z0, from path bits that wrap around along `dim`."""
        z1, z0 = torch.zeros_like(path), torch.zeros_like(path)
        for i in range(self.memory + 1):
            if self.h0 >> i & 1:
                z1 = z1 ^ path.roll(i, dim)
            if self.h1 >> i & 1:
                z0 = z0 ^ path.roll(i, dim)
        return z1 << 1 | z0

    def _encode(self, x: Tensor) -> Tensor:
        """Viterbi search, x [word, words] -> codes [word, words].

        A first search, with free ends, covers `reach` values on each side of a point and finds a state there. It
        prefers ways that end as they began. A second search goes round once, and must start and end at that point in
        that state. Nothing is traced back in the first one: its costs carry the first state and the state at the point,
        in bits below the cost, and a tie goes to the lower number.
        """
        costs, lowest = self._branches(x)
        number = torch.arange(2**self.memory, dtype=torch.int64, device=x.device)[:, None]
        shift, mask = self.memory, 2**self.memory - 1
        reach = self.reach
        wide, around = costs.long() << 2 * shift, [t % self.word for t in range(2 * reach)]
        ways, _ = self._search(number.expand(-1, x.shape[1]), wide, around[:reach])
        ways, _ = self._search(ways + (number << shift), wide, around[reach:])
        ways = ways + ((ways & mask) != number) * (OPEN << 2 * shift)
        state = ways.amin(dim=0) >> shift & mask
        pinned = (number != state) * ((self.memory + 1) * DEAREST)
        circle = [(reach + t) % self.word for t in range(self.word)]
        _, choices = self._search(pinned.int(), costs, circle)
        path, _ = self._trace(state, choices)
        path = path.roll(reach, 0)
        level = lowest + (self._subsets(path, dim=0) - lowest & 3)
        return path << (self.bits - 1) | level >> 2

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What each subset costs, int32 [word, 4, words], and i, uint8 [word, words], as said above."""
        x = torch.where(x.square().isfinite(), x, torch.nan) * constant((1 / self.grid,), x.device, x.dtype)
        # On the grid, edges are whole numbers: the kernel has a table of the cells between them.
        place = ((x - 0.5).round() if self.unit else x).nan_to_num(nan=-torch.inf)
        lowest = torch.bucketize(place, constant(self._edges, x.device, x.dtype), right=True, out_int32=True)
        subset = torch.arange(4, dtype=torch.int32, device=x.device)[:, None]
        levels = constant(tuple(level / self.grid for level in self.levels), x.device, x.dtype)
        level = levels[lowest[:, None] + (subset - lowest[:, None] & 3)]
        error = level * (level - 2 * x[:, None])
        away = error - error.amin(dim=1, keepdim=True)
        costs = (away * constant((self.price,), x.device, x.dtype) + MAGIC).clamp(max=MAGIC + DEAREST) - MAGIC
        return costs.nan_to_num(nan=0.0).int(), lowest.to(torch.uint8)

    def _search(self, cost: Tensor, costs: Tensor, order: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The cost of the best path to every state, [states, words], and the choice that this path made at every step.

        Bit i of a state is p_(t-i). Two states lead to each state, and they differ in their oldest bit. A choice is
        that bit; a tie goes to 0.
        """
        states, count = cost.shape
        subset = _branch_subsets(self.h0, self.h1, cost.device)
        choices = []
        for t in order:
            ways = costs[t].index_select(0, subset).view(states, 2, count) + cost[:, None]
            zero, one = ways.view(2, states, count)
            choices.append(one < zero)
            cost = torch.minimum(zero, one)
        return cost, choices

    def _trace(self, state: Tensor, choices: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Walk back from a state [words] after the last choice: path bits uint8 [steps, words], and the first state."""
        bits = []
        for choice in reversed(choices):
            bits.append((state & 1).to(torch.uint8))
            oldest = choice.gather(0, state[None])[0].long()
            state = state >> 1 | oldest << (self.memory - 1)
        return torch.stack(bits[::-1]), state


@once(maxsize=64)
@torch.inference_mode(False)
def _branch_subsets(h0: int, h1: int, device: torch.device) -> Tensor:
    """int64 [2 * states]: the subset for path bits r, where bit i of r is p_(t-i) and r >> 1 is the state before."""
    registers = range(2 ** h0.bit_length())
    subsets = [2 * ((r & h0).bit_count() & 1) + ((r & h1).bit_count() & 1) for r in registers]
    return torch.tensor(subsets, device=device)
