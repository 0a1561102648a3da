"""The steps of `StaticState` for a device that nobody waits for: what is due is decided there."""

from __future__ import annotations

import torch

from turboquant_hf.cache.layer import _nan_for_inf
from turboquant_hf.cache.static_plan import PLANS
from turboquant_hf.cache.static_state import StaticState
from turboquant_hf.kernels import dispatch


class DueState(StaticState):
    """A step encodes at most one tile; after the first encode, tiles that waited with it follow one a step.

    Quantizers that the kernels know are fitted and encoded by them. For all others both are computed at every step
    and kept where due: right, and slow.
    """

    def observe(self, query: torch.Tensor) -> None:
        if self.plan.observes(query):
            energy, count = self.view("query.energy"), self.view("query.count")
            dispatch.observe_due(query, energy, count, self.seen, self.counts[:2], self.fitted, self.starts)

    def commit(self) -> None:
        if self.plan.has_kernels:
            self._commit_by_kernels()
        else:
            self._commit_where_due()

    def warm(self, workspace: torch.Tensor) -> None:
        """Make what kernels keep for good (rotations, tables) now: a CUDA graph would take it for its own memory."""
        plan = self.plan
        weight = torch.ones(plan.batch, 1, plan.tile, dtype=torch.float32, device=self.arena.device)
        for quantizer, ring, state in zip(plan.quantizers, self.ring, self.states, strict=True):
            tile = torch.zeros_like(ring[:, :, None, : plan.tile])
            quantizer.decode(quantizer.encode(tile, state, weight), state, ring.shape[-1], plan.dtype)
        if plan.reads_packed:
            self.attend(torch.zeros_like(self.ring[0][:, :, :1]), workspace, scaling=1.0)

    def _commit_by_kernels(self) -> None:
        plan, keys = self.plan, self.plan.quantizers[0]
        counts, common = self.counts[:2], {"tile": plan.tile, "window": plan.recent_window}
        dispatch.fit_due(
            *self.ring, self.view("query.energy"), self.view("query.count"), self.seen, counts, self.fitted,
            self.starts,
            **common,
            sinks=plan.sinks,
            min_statistics=plan.min_statistics if plan.waits else 0,
            patience=plan.patience,
            center=keys.centered,
            sizes=tuple(group.size for group in keys.groups(plan.head_dims[0])),
            balance=getattr(keys, "balance", "none"),
            key_state=self.states[0],
            value_state=self.states[1],
            powers=tuple(quantizer.gain_is_power for quantizer in plan.quantizers),
        )  # fmt: skip
        for quantizer, ring, state, arrays in zip(plan.quantizers, self.ring, self.states, self.tiles, strict=True):
            dim = ring.shape[-1]
            dispatch.encode_due(
                ring, quantizer.rotation_of(dim, plan.heads, ring.device), quantizer.groups(dim), counts, self.fitted,
                self.starts, **common, sinks=plan.sinks, out=arrays, **quantizer.encoding(state),
            )  # fmt: skip
        dispatch.advance_due(counts, self.fitted, **common, capacity=plan.capacity)

    def _commit_where_due(self) -> None:
        plan, (tiles, length) = self.plan, self.counts[:2]
        position = torch.arange(plan.ring, device=self.arena.device)
        counted = (position >= (self.starts + plan.sinks)[:, None]) & (position < length // plan.tile * plan.tile)
        weight = counted.float().unflatten(1, (-1, plan.tile))
        enough = (length - self.starts.min() >= plan.min_statistics) | (length > plan.patience)
        fit = (self.fitted[0] == 0) & (length >= plan.recent_window + plan.tile) & (enough if plan.waits else True)
        for quantizer, ring, state in zip(plan.quantizers, self.ring, self.states, strict=True):
            learned = quantizer.fit(ring.unflatten(2, (-1, plan.tile)), weight, self._query_rms(), waits=False)
            for name, value in learned.items():
                state[name].copy_(torch.where(fit, value, state[name]))
        self.fitted.copy_(torch.where(fit, 1, self.fitted))

        due = (self.fitted[0] != 0) & (length >= (tiles + 1) * plan.tile + plan.recent_window) & (tiles < plan.capacity)
        position = tiles * plan.tile + torch.arange(plan.tile, device=self.arena.device)
        weight = (position >= (self.starts + plan.sinks)[:, None]).float()[:, None]
        place = tiles.clamp(max=plan.capacity - 1).long().reshape(1)
        fresh = [ring.index_select(2, position % plan.ring)[:, :, None] for ring in self.ring]
        for quantizer, tile, state, arrays in zip(plan.quantizers, fresh, self.states, self.tiles, strict=True):
            for name, value in quantizer.encode(_nan_for_inf(tile, quantizer), state, weight).items():
                array = arrays[name]
                array.index_copy_(2, place, torch.where(due, value, array.index_select(2, place)))
        self._mark_bad_heads(fresh, weight, due)
        self.counts[:1] += due


def open_state(plan: str, arena: torch.Tensor, counts: torch.Tensor) -> StaticState:
    """The arrays of a layer, with the steps that suit their device."""
    host = dispatch.backend(PLANS[plan].device) == "torch"
    return (StaticState if host else DueState)(plan, arena, counts)
