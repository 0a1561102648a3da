"""The steps of `StaticState` for a device that nobody waits for: what is due is decided there."""

from __future__ import annotations

import torch

from turboquant_hf.cache.layer import _nan_for_inf
from turboquant_hf.cache.static_plan import PLANS
from turboquant_hf.cache.static_state import StaticState
from turboquant_hf.kernels import dispatch
from turboquant_hf.kernels.decode import RawTokens
from turboquant_hf.kernels.schedule import Schedule
from turboquant_hf.kernels.statistics.due import FitRule, QuerySums


class DueState(StaticState):
    """A step encodes at most one tile; after the first encode, tiles that waited with it follow one a step.

    Quantizers that the kernels know are fitted and encoded by them. For all others both are computed at every step
    and kept where due: right, and slow.
    """

    def observe(self, query: torch.Tensor) -> None:
        if self.plan.observes(query):
            dispatch.observe_due(query, self._query_sums(), self._schedule())

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
        plan, keys, schedule = self.plan, self.plan.quantizers[0], self._schedule()
        rule = FitRule(
            min_statistics=plan.min_statistics if plan.waits else 0,
            sizes=tuple(group.size for group in keys.groups(plan.head_dims[0])),
            patience=plan.patience,
            center=keys.centered,
            balance=getattr(keys, "balance", "none"),
            powers=tuple(quantizer.gain_is_power for quantizer in plan.quantizers),
        )
        dispatch.fit_due(RawTokens(*self.ring), self._query_sums(), schedule, rule, self.states)
        for quantizer, ring, state, arrays in zip(plan.quantizers, self.ring, self.states, self.tiles, strict=True):
            coding = quantizer.coding(state, ring.shape[-1], plan.heads, ring.device)
            dispatch.encode_due(ring, coding, schedule, arrays)
        dispatch.advance_due(schedule)

    def _query_sums(self) -> QuerySums:
        return QuerySums(self.view("query.energy"), self.view("query.count"), self.seen)

    def _schedule(self) -> Schedule:
        plan = self.plan
        return Schedule(
            self.counts[:2], self.fitted, self.starts,
            tile=plan.tile, window=plan.recent_window, sinks=plan.sinks, capacity=plan.capacity,
        )  # fmt: skip

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
