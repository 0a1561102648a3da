"""What tiles are encoded with: count queries (`observe`), learn once (`fit`), then `encode`.

- `Storage.commit` says when tiles are encoded. It calls these functions.
- `encode` marks the heads of tiles that hold NaN or infinity: their gain becomes NaN, and so does all that is read.
- A sequence that begins with copies of one token teaches nothing about the tokens to come. It learns again once other
  tokens have come, and its tiles so far are encoded anew (`fit_again`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from turboquant_hf.cache.sides import Sides
from turboquant_hf.cache.word import warn_of_nan
from turboquant_hf.kernels.dispatch import effective_rank, query_energy
from turboquant_hf.kernels.encode.reference import bad_heads
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.quantizers.base import Packed, State

REPEATS = 2.0
"""Values of a smaller effective rank are repeats of one or two tokens; ordinary text has 4 to 30."""
FEW = 8.0
"""Below this rank, what follows repeats may be a few tokens among many repeats. The sequence then learns once more."""
AGAIN = 2
"""How often, at most, a sequence learns again."""


class Encoder:
    """What the quantizers of a layer learn from its first tokens and use to encode all tiles.

    Args:
        quantizers: those of keys and values.
        min_statistics: tokens to see before the first encode, for quantizers that learn.

    Attributes:
        states: what the quantizers of keys and values have learned; empty before `fit`.
        fitted: whether the states are learned, and frozen.
        energy: the sum of squares of the queries, float32 [B, H, D]; None before the first query.
        count: the number of queries in `energy`, [B, 1 or H, 1]; None before the first query.
        queried: tokens per sequence whose queries were counted.
        unsettled: int8 [B], how often a sequence may have to learn again: `AGAIN` times where it has shown nothing but
            repeats, once where it has learned from few other tokens. None where all have learned for good.
    """

    def __init__(self, quantizers: Sides, min_statistics: int) -> None:
        self.quantizers, self.min_statistics = quantizers, min_statistics
        self.states, self.fitted = Sides({}, {}), False
        self.energy: torch.Tensor | None = None
        self.count: torch.Tensor | None = None
        self.queried = 0
        self.unsettled: torch.Tensor | None = None
        self._first: _First | None = None

    @property
    def is_ready(self) -> bool:
        """Whether tiles can be encoded: there are statistics, or there are none to wait for."""
        return self.fitted or not any(quantizer.needs_statistics for quantizer in self.quantizers)

    @property
    def observes(self) -> bool:
        """Whether queries are still counted."""
        return (not self.fitted or self.unsettled is not None) and self.quantizers.keys.needs_statistics

    def observe(self, query: torch.Tensor, heads: int, starts: torch.Tensor, position: int) -> None:
        """Count queries [B, Hq, q, D] of the tokens from `position` on; `starts` [B]: first token of each sequence."""
        energy, count = query_energy(query.detach(), heads, starts, position)
        if self.energy is not None:
            energy, count = self.energy + energy, self.count + count
        self.energy, self.count = energy, count
        self.queried += query.shape[2]

    def buffers(self, shape: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Make `energy` and `count` buffers to which steps on the device add; shape: (B, H, D)."""
        energy = torch.zeros(shape, dtype=torch.float32, device=device)
        count = torch.zeros(*shape[:2], 1, dtype=torch.float32, device=device)
        if self.energy is not None:
            energy += self.energy
            count += self.count
        self.energy, self.count = energy, count
        return energy, count

    def has_seen_enough(self, tokens: int) -> bool:
        """Whether tiles may be encoded once the longest sequence has this many tokens."""
        return self.is_ready or tokens >= self.min_statistics

    def fit(self, tiles: Sides, weight: torch.Tensor, length: int) -> None:
        """Freeze the statistics of tiles [B, H, N, T, D] with weight [B, N, T] in a layer of `length` tokens.

        Queries are used if they were seen for at least half of the tokens. The next `encode` looks at what was learned.
        """
        self._first = first = _First(tiles, weight, self._query_rms(length))
        self.states = self.quantizers.map(
            lambda quantizer, x: quantizer.fit(x, weight, first.rms, flag=first.flag), tiles
        )
        self.fitted = True
        if any(quantizer.needs_statistics for quantizer in self.quantizers):
            first.rank = effective_rank(tiles.values, weight)

    def fit_again(self, tiles: Sides, weight: torch.Tensor, length: int, stores: Sides, stored: torch.Tensor) -> None:
        """Take the statistics again, as in `fit`, for unsettled sequences whose tiles are no repeats.

        Args:
            tiles, weight: what follows the stores.
            length: how many tokens have come since the last time.
            stores: whose tiles, with weight `stored` [B, N, T], are encoded anew.
        """
        rank = effective_rank(tiles.values, weight).nanmean(dim=-1)
        due = (self.unsettled > 0) & (rank >= REPEATS)
        if due.any():
            rows, rms, states = due.nonzero()[:, 0], self._query_rms(length), []
            for store, quantizer, x, state in zip(stores, self.quantizers, tiles, self.states, strict=True):
                if quantizer.needs_statistics:
                    old = {name: array[rows] for name, array in state.items()}
                    new = quantizer.fit(x[rows], weight[rows], None if rms is None else rms[rows])
                    new = store.encode_again(quantizer, old, new, rows, stored[rows], x)
                    state = _with_rows(state, rows, new)
                states.append(state)
            self.states = Sides(*states)
            more = (self.unsettled == AGAIN) & (rank < FEW)
            self._settle(torch.where(due, more.to(torch.int8), self.unsettled))
        else:
            self._settle(self.unsettled)

    def _settle(self, unsettled: torch.Tensor | None) -> None:
        """Go on counting queries while some sequence must learn again. Otherwise stop, and free the sums.

        Waits for the device.
        """
        if unsettled is None or not unsettled.any():
            self.unsettled = self.energy = self.count = None
            return
        self.unsettled, self.queried = unsettled, 0
        if self.energy is not None:  # in place: steps on the device add to them
            self.energy.zero_()
            self.count.zero_()

    def encode(self, tiles: Sides, weight: torch.Tensor, stores: Sides) -> None:
        """Append tiles [B, H, N, T, D] with weight [B, N, T] to the stores.

        The host looks at the device after all is launched, and what it finds hardly ever changes anything. Offloaded
        tiles also wait for their copies.
        """
        flag, first, self._first = torch.zeros(1, dtype=torch.int8, device=weight.device), self._first, None
        tiles = tiles.map(nan_for_inf, self.quantizers)
        packed = self._append(tiles, weight, stores, flag)
        if first is not None and first.flag.item():
            self.states = self.quantizers.map(lambda q, x: q.fit(x, first.weight, first.rms), first.tiles)
            for store in stores:
                store.count -= tiles.keys.shape[2]
            packed = self._append(tiles, weight, stores, flag.zero_())
        if flag.item():
            self._mend(tiles, weight, stores, packed)
        if first is not None:
            few = [AGAIN * (rank < REPEATS) for rank in first.ranks()]
            self._settle(torch.tensor(few, dtype=torch.int8, device=weight.device) if any(few) else None)

    def _append(self, tiles: Sides, weight: torch.Tensor, stores: Sides, flag: torch.Tensor) -> list[Packed]:
        parts = stores, self.quantizers, tiles, self.states
        return [store.encode(*side, weight, flag) for store, *side in zip(*parts, strict=True)]

    def _mend(self, tiles: Sides, weight: torch.Tensor, stores: Sides, packed: list[Packed]) -> None:
        """Widen the scales of newest tiles that do not fit. Mark heads that are not finite, in all their tiles."""
        parts = stores, self.quantizers, tiles, self.states, packed
        states = [store.make_room(*side, weight, new) for store, *side, new in zip(*parts, strict=True)]
        if any(new is not old for new, old in zip(states, self.states, strict=True)):
            self.states = Sides(*states)
        gains = [state["gain"] for state in self.states if "gain" in state]
        if gains:
            bad = bad_heads(tiles.keys, weight) | bad_heads(tiles.values, weight)
            for gain in gains:
                gain.masked_fill_(bad, torch.nan)
        warn_of_nan([x for arrays in (*packed, *states) for x in arrays.values()], self.quantizers)

    def restore(
        self,
        states: Sides,
        fitted: bool,
        energy: torch.Tensor | None,
        count: torch.Tensor | None,
        queried: int,
        unsettled: torch.Tensor | None,
    ) -> None:
        """Continue from what another encoder had learned."""
        self.states, self.fitted, self.unsettled = states, fitted, unsettled
        self.energy, self.count, self.queried = energy, count, queried

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every array by fn(array); fn changes the batch or the device."""
        self.states = self.states.map(lambda state: {name: fn(x) for name, x in state.items()})
        if self.energy is not None:
            self.energy, self.count = fn(self.energy), fn(self.count)
        if self.unsettled is not None:
            self.unsettled = fn(self.unsettled)

    @property
    def nbytes(self) -> int:
        """Bytes of the statistics, without the byte per sequence of `unsettled`."""
        kept = [x for x in (self.energy, self.count) if x is not None]
        return sum(x.nbytes for x in (*kept, *(x for state in self.states for x in state.values())))

    def _query_rms(self, length: int) -> torch.Tensor | None:
        if self.energy is None or 2 * self.queried < length:
            return None
        mean = self.energy / self.count.clamp(min=1)
        if len(mean) > 1:
            pooled = self.energy.sum(0, keepdim=True) / self.count.sum(0, keepdim=True).clamp(min=1)
            mean = torch.where(self.count > 0, mean, pooled)
        return mean.sqrt()


class _First:
    """What statistics were taken from, and what is still to be looked at once the device has them.

    Attributes:
        tiles, weight, rms: what quantizers were fitted to.
        flag: int8 [1], set to 1 where they must be fitted again, by the host's waiting (`Quantizer.fit`).
        rank: the effective rank of each head, float32 [B, H], or None where no quantizer learns.
    """

    def __init__(self, tiles: Sides, weight: torch.Tensor, rms: torch.Tensor | None) -> None:
        self.tiles, self.weight, self.rms = tiles, weight, rms
        self.flag = torch.zeros(1, dtype=torch.int8, device=weight.device)
        self.rank: torch.Tensor | None = None

    def ranks(self) -> list[float]:
        """The effective rank of each sequence, averaged over its heads; NaN where nothing counts."""
        heads = [] if self.rank is None else self.rank.tolist()
        known = [[x for x in row if x == x] for row in heads]
        return [sum(row) / len(row) if row else math.nan for row in known]


def _with_rows(state: State, rows: torch.Tensor, new: State) -> State:
    """`state` with sequences `rows` as in `new`. What only one of them has is neutral in the other: an offset of 0, a
    unit or gain of 1. Heads whose gain is NaN keep it.
    """
    merged = {}
    for name in {**state, **new}:
        like, neutral = state.get(name, new.get(name)), 0 if name == "offset" else 1
        batch = next(iter(state.values())).shape[0]
        array = state[name].clone() if name in state else like.new_full((batch, *like.shape[1:]), neutral)
        fresh = new[name] if name in new else torch.full_like(array[rows], neutral)
        merged[name] = array.index_copy(0, rows, torch.where(array[rows].isnan(), array[rows], fresh))
    return merged


def nan_for_inf(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """x with NaN for infinity: stored scales are clamped, which would turn infinity into a plausible number."""
    return x if quantizer.marks_infinity else torch.where(x.isinf(), torch.nan, x)
