"""What happens to the arrays of a preallocated layer: plain torch that asks the device for its counts.

The definition of the kernels that do the same without asking (`cache/static_ops.py` chooses). Token p lies in slot
p % R of the ring until it is in a tile; tile n holds positions [n T, (n + 1) T).
"""

from __future__ import annotations

from typing import Any

import torch

from turboquant_hf.cache.layer import _nan_for_inf
from turboquant_hf.cache.ring import unrolled
from turboquant_hf.cache.static_plan import PLANS, ROLES, StaticPlan
from turboquant_hf.cache.word import warn_of_nan
from turboquant_hf.kernels.decode import History, PackedSide, RawTokens, Scoring
from turboquant_hf.kernels.dispatch import append_tokens, bad_heads, decode_attention, query_energy
from turboquant_hf.kernels.encode.reference import saturated_heads

ENCODE_TILES = 64
"""Tiles that are encoded at once: bounds what a long prefill needs beside the cache."""


class StaticState:
    """One layer's arrays, opened for one op.

    Args:
        plan: the name of a `StaticPlan`.
        arena, counts: as `static_plan` describes them; written in place.
    """

    def __init__(self, plan: str, arena: torch.Tensor, counts: torch.Tensor) -> None:
        self.plan: StaticPlan = PLANS[plan]
        self.arena, self.counts = arena, counts
        self.ring = tuple(self.view(f"ring.{role}") for role in ROLES)
        self.sinks = tuple(self.view(f"sinks.{role}") for role in ROLES)
        self.tiles = tuple(self.plan.views(arena, role) for role in ROLES)
        self.states = tuple(self.plan.views(arena, f"{role}.state") for role in ROLES)
        self.starts = self.view("starts")
        heads = self.plan.heads
        self.ticket, self.fitted, self.seen = counts[2:3], counts[3 : 3 + heads], counts[3 + heads :]

    def view(self, name: str) -> torch.Tensor:
        return self.plan.view(self.arena, name)

    def read_counts(self) -> tuple[int, int]:
        """(tiles encoded, length); waits for the device."""
        tiles, length = self.counts[:2].tolist()
        return tiles, length

    def set_counts(self, tiles: int, length: int) -> None:
        self.counts[0] = tiles
        self.counts[1] = length

    # ------------------------------------------------------------------ writing

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store up to STEP_TOKENS new tokens raw. What does not fit is dropped on a GPU, and a ValueError on a CPU."""
        if not self.arena.is_cuda:
            self.check_room(self.read_counts()[1], keys.shape[2])
        sinks, ring = self.raw()
        append_tokens(keys, values, ring, sinks, self.starts, self.counts[:2], self.ticket, self.plan.max_len)

    def store(self, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor | None) -> None:
        """Store a chunk of any length: what is old enough goes to tiles at once, without passing through the ring."""
        tiles, length = self.read_counts()
        self.check_room(length, keys.shape[2])
        self._write_sinks(keys, values, length)
        first, stop = tiles * self.plan.tile, length + keys.shape[2]
        tail = (keys, values)
        if first < length:
            tail = tuple(torch.cat([old, new], dim=2) for old, new in zip(self.tail(first, length), tail, strict=True))
        self.set_counts(tiles, stop)
        if query is not None:
            self.observe(query)
        ready = self._encode_ready(*tail)
        self._write_ring(*(x[:, :, ready:] for x in tail), first + ready)

    def observe(self, query: torch.Tensor) -> None:
        """Count the queries [B, Hq, q, D] of the newest q tokens into the statistics, until the first encode."""
        if not self.plan.observes(query) or self.fitted[0]:
            return
        tokens = query.shape[2]
        energy, count = query_energy(query, self.plan.heads, self.starts, self.read_counts()[1] - tokens)
        self.view("query.energy").add_(energy)
        self.view("query.count").add_(count[:, :, 0])
        self.seen += tokens

    def commit(self) -> None:
        """Encode every tile in the ring that is full and older than the recent window, once enough was seen."""
        tiles, length = self.read_counts()
        if length - tiles * self.plan.tile - self.plan.recent_window >= self.plan.tile:
            self._encode_ready(*self.tail(tiles * self.plan.tile, length))

    def _encode_ready(self, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Encode what is due of the unencoded tokens [B, H, L, D], the newest at position length - 1: how many."""
        plan, (tiles, length) = self.plan, self.read_counts()
        ready = max(keys.shape[2] - plan.recent_window, 0) // plan.tile
        if ready == 0 or not (self.fitted[0] or self._seen_enough(length)):
            return 0
        if not self.fitted[0]:
            self._fit(keys, values, length)
        first = tiles * plan.tile
        for low in range(0, ready, ENCODE_TILES):
            high = min(low + ENCODE_TILES, ready)
            weight = self._weight(first + low * plan.tile, (high - low) * plan.tile)
            weight = weight.unflatten(1, (high - low, plan.tile))
            fresh = [x[:, :, low * plan.tile : high * plan.tile].unflatten(2, (-1, plan.tile)) for x in (keys, values)]
            stored = []
            for quantizer, x, state, arrays in zip(plan.quantizers, fresh, self.states, self.tiles, strict=True):
                out = {name: array[:, :, tiles + low : tiles + high] for name, array in arrays.items()}
                x = _nan_for_inf(x, quantizer)
                quantizer.encode_into(x, state, weight, out)
                earlier = {name: array[:, :, : tiles + low] for name, array in arrays.items()}
                self._make_room(quantizer, x, state, weight, out, earlier)
                stored += out.values()
            self._mark_bad_heads(fresh, weight)
            warn_of_nan([*stored, *(x for state in self.states for x in state.values())], plan.quantizers)
        self.set_counts(tiles + ready, length)
        return ready * plan.tile

    def _make_room(self, quantizer, x, state, weight, new, old) -> None:
        """`Quantizer.make_room` where a state has a gain; without one, tiles whose scales do not fit become NaN."""
        if "gain" in state:
            for name, value in quantizer.make_room(x, state, weight, new, old).items():
                state[name].copy_(value)
        elif "mean" in new:
            new["mean"].masked_fill_(saturated_heads(new["scale"], weight)[:, :, None, None], torch.nan)

    def _mark_bad_heads(self, fresh: list[torch.Tensor], weight: torch.Tensor, due: torch.Tensor | bool = True) -> None:
        gains = [state["gain"] for state in self.states if "gain" in state]
        if gains:
            bad = bad_heads(fresh, weight) & due
            for gain in gains:
                gain.masked_fill_(bad, torch.nan)

    def _seen_enough(self, length: int) -> bool:
        plan = self.plan
        if not plan.waits or length > plan.patience:
            return True
        return length - int(self.starts.min()) >= plan.min_statistics

    def _fit(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Freeze the statistics of all whole tiles, the recent window included."""
        plan, tokens = self.plan, keys.shape[2]
        whole = tokens // plan.tile
        weight = self._weight(length - tokens, whole * plan.tile).unflatten(1, (whole, plan.tile))
        query_rms = self._query_rms() if 2 * int(self.seen[0]) >= length else None
        for quantizer, x, state in zip(plan.quantizers, (keys, values), self.states, strict=True):
            first = x[:, :, : whole * plan.tile].unflatten(2, (whole, plan.tile))
            learned = quantizer.fit(first, weight, query_rms, waits=False)
            for name, value in learned.items():
                state[name].copy_(value)
        self.fitted.fill_(1)

    def _query_rms(self) -> torch.Tensor:
        energy, count = self.view("query.energy"), self.view("query.count")[:, :, None]
        pooled = energy.sum(0, keepdim=True) / count.sum(0, keepdim=True).clamp(min=1)
        return torch.where(count > 0, energy / count.clamp(min=1), pooled).sqrt()

    def _weight(self, start: int, tokens: int) -> torch.Tensor:
        """[B, tokens] float32: 0 for padding and sinks, 1 elsewhere."""
        position = torch.arange(start, start + tokens, device=self.arena.device)
        return (position >= (self.starts + self.plan.sinks)[:, None]).float()

    def crop(self, keep: int) -> None:
        """Keep the first `keep` tokens; a cut inside a tile decodes what is left of that tile into the ring."""
        tiles, length = self.read_counts()
        whole, part = divmod(keep, self.plan.tile)
        if whole >= tiles:
            self.set_counts(tiles, keep)
            return
        if part:
            start = whole * self.plan.tile
            self._write_ring(*(x[:, :, start:keep] for x in self.dense()), start)
        self.set_counts(whole, keep)

    def check_room(self, length: int, added: int) -> None:
        if length + added > self.plan.max_len:
            raise ValueError(
                f"max_cache_len={self.plan.max_len} is not enough: {length} tokens are held and {added} more came"
            )

    def _write_ring(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        slots = (torch.arange(keys.shape[2], device=keys.device) + position) % self.plan.ring
        for array, new in zip(self.ring, (keys, values), strict=True):
            array.index_copy_(2, slots, new)

    def _write_sinks(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        slots = self.starts[:, None] + torch.arange(self.plan.sinks, device=keys.device) - position
        inside = (slots >= 0) & (slots < keys.shape[2])
        slots = slots.clamp(0, keys.shape[2] - 1)[:, None, :, None]
        for array, new in zip(self.sinks, (keys, values), strict=True):
            picked = new.gather(2, slots.expand(-1, new.shape[1], -1, new.shape[3]))
            array.copy_(torch.where(inside[:, None, :, None], picked, array))

    # ------------------------------------------------------------------ reading

    def tail(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw keys and values of positions [start, stop), a copy in order."""
        slots = torch.arange(start, stop, device=self.arena.device) % self.plan.ring
        return tuple(array.index_select(2, slots) for array in self.ring)

    def sides(self) -> tuple[PackedSide, PackedSide]:
        """Whole arrays as the decode kernels read them (rotated quantizers only)."""
        parts = zip(self.plan.quantizers, self.tiles, self.states, self.plan.head_dims, strict=True)
        return tuple(quantizer.packed_side(tiles, state, dim) for quantizer, tiles, state, dim in parts)

    def raw(self) -> tuple[RawTokens, RawTokens]:
        """(sinks, ring)."""
        return RawTokens(*self.sinks), RawTokens(*self.ring)

    def attend(
        self, query: torch.Tensor, workspace: torch.Tensor, *, mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """`decode_attention` over what is held (rotated quantizers only): [B, Hq, q, D] -> [B, Hq, q, Dv]."""
        history = History(*self.sides(), *self.raw(), self.starts, self.counts[:2])
        scoring = Scoring(**options, sparse_v_threshold=self.plan.sparse_v_threshold)
        return decode_attention(query, history, scoring, mask=mask, workspace=workspace)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, max_len, D] in the model's dtype, zeros behind the newest. Does not wait for a GPU."""
        return self._dense(0), self._dense(1)

    def _dense(self, index: int) -> torch.Tensor:
        plan = self.plan
        used = plan.capacity if self.arena.is_cuda else self.read_counts()[0]
        decoded = None
        if used:
            arrays = {name: array[:, :, :used] for name, array in self.tiles[index].items()}
            dim = plan.head_dims[index]
            decoded = plan.quantizers[index].decode(arrays, self.states[index], dim, plan.dtype).flatten(2, 3)
        where = self.starts, self.counts, plan.tile, plan.max_len
        return unrolled(self.ring[index], decoded, self.sinks[index], *where)
