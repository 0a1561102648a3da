"""What a preallocated layer holds: every array in one allocation, described by a plan that ops can name.

Two tensors are all that a compiled step sees of a layer: `arena`, uint8, with the arrays one after another, and
`counts`, int32: tiles encoded, length, a kernel's ticket, then for every head whether it is fitted, then for every head
how many tokens' queries were counted.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from dataclasses import dataclass
from functools import cached_property
from math import prod
from weakref import WeakValueDictionary

import torch

from turboquant_hf.cache.ring import STEP_TOKENS
from turboquant_hf.quantizers import Field, Quantizer
from turboquant_hf.quantizers.rotated import RotatedQuantizer, reads_packed

ALIGNMENT = 128
ROLES = ("keys", "values")


@dataclass(frozen=True)
class StaticPlan:
    """Shapes and rules of one layer. Equal plans share a name, so that layers and caches share compiled code.

    Attributes:
        quantizers, head_dims: of keys and values.
        batch, heads: B and H.
        max_len: tokens that fit.
        dtype: the model's.
        device: where the arrays are.
        tile, sinks, recent_window, min_statistics, sparse_v_threshold: see `CachePreset`.
    """

    quantizers: tuple[Quantizer, Quantizer]
    head_dims: tuple[int, int]
    batch: int
    heads: int
    max_len: int
    dtype: torch.dtype
    device: torch.device
    tile: int
    sinks: int
    recent_window: int
    min_statistics: int
    sparse_v_threshold: float = 0.0

    @cached_property
    def waits(self) -> bool:
        """Whether nothing is encoded before `min_statistics` tokens were seen."""
        return any(quantizer.needs_statistics for quantizer in self.quantizers)

    @cached_property
    def ring(self) -> int:
        """Slots R of the ring of raw tokens: what waits for the first encode, a tile and a step, in whole tiles."""
        first = max(self.recent_window + self.tile, self.min_statistics if self.waits else 0)
        wanted = first + self.tile + STEP_TOKENS
        return -(-min(wanted, self.max_len) // self.tile) * self.tile

    @cached_property
    def patience(self) -> int:
        """Length from which the first encode waits no longer, however much of it is padding: the ring is full."""
        return self.ring - STEP_TOKENS if self.ring < self.max_len else self.max_len

    @cached_property
    def capacity(self) -> int:
        """Tiles that can ever be encoded (at least one, so that no array is empty)."""
        return max((self.max_len - self.recent_window) // self.tile, 1)

    @cached_property
    def first_states(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What the quantizers make of empty tiles: the shapes of what they learn, and harmless values of it."""
        return tuple(
            quantizer.empty_state(self.heads, dim, self.tile)
            for quantizer, dim in zip(self.quantizers, self.head_dims, strict=True)
        )

    @cached_property
    def reads_packed(self) -> bool:
        """Whether attention can read these tiles as they are."""
        return reads_packed(*self.quantizers)

    @cached_property
    def has_kernels(self) -> bool:
        """Whether the kernels of `kernels.statistics.due` know how to fit and encode these quantizers."""
        keys, values = (set(state) for state in self.first_states)
        known = keys in ({"balance", "order"}, {"gain"}, set()) and values in ({"gain"}, set())
        return known and all(isinstance(quantizer, RotatedQuantizer) for quantizer in self.quantizers)

    @cached_property
    def fields(self) -> dict[str, Field]:
        """name -> shape and dtype; the batch always comes first."""
        lead = (self.batch, self.heads)
        fields = {"starts": Field((self.batch,), torch.int64)}
        for role, dim in zip(ROLES, self.head_dims, strict=True):
            fields[f"ring.{role}"] = Field((*lead, self.ring, dim), self.dtype)
            fields[f"sinks.{role}"] = Field((*lead, self.sinks, dim), self.dtype)
        parts = zip(ROLES, self.quantizers, self.head_dims, self.first_states, strict=True)
        for role, quantizer, dim, state in parts:
            for name, field in quantizer.layout(dim, self.tile, self.dtype).items():
                fields[f"{role}.{name}"] = Field((*lead, self.capacity, *field.shape), field.dtype)
            for name, value in state.items():
                fields[f"{role}.state.{name}"] = Field((self.batch, *value.shape[1:]), value.dtype)
        fields["query.energy"] = Field((*lead, self.head_dims[0]), torch.float32)
        fields["query.count"] = Field(lead, torch.float32)
        return fields

    @cached_property
    def offsets(self) -> dict[str, int]:
        """name -> first byte in the arena; the last entry, "", is its size."""
        offsets, position = {}, 0
        for name, field in self.fields.items():
            offsets[name] = position
            position += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        return {**offsets, "": position}

    def observes(self, query: torch.Tensor) -> bool:
        """Whether the statistics take these queries [B, Hq, q, D]."""
        fits = query.shape[1] % self.heads == 0 and query.shape[3] == self.head_dims[0]
        return self.quantizers[0].needs_statistics and fits

    def view(self, arena: torch.Tensor, name: str) -> torch.Tensor:
        """One array of an arena, without a copy."""
        field, start = self.fields[name], self.offsets[name]
        return arena[start : start + field.nbytes].view(field.dtype).view(field.shape)

    def views(self, arena: torch.Tensor, prefix: str) -> dict[str, torch.Tensor]:
        """The arrays below `prefix`, by the rest of their names."""
        start = len(prefix) + 1
        names = (name for name in self.fields if name.startswith(f"{prefix}.") and "." not in name[start:])
        return {name[start:]: self.view(arena, name) for name in names}

    def allocate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(arena, counts) of an empty layer."""
        arena = torch.zeros(self.offsets[""], dtype=torch.uint8, device=self.device)
        counts = torch.zeros(3 + 2 * self.heads, dtype=torch.int32, device=self.device)
        self.clear(arena, counts)
        return arena, counts

    def clear(self, arena: torch.Tensor, counts: torch.Tensor) -> None:
        """Forget everything, in place."""
        arena.zero_()
        counts.zero_()
        for role, state in zip(ROLES, self.first_states, strict=True):
            for name, value in state.items():
                self.view(arena, f"{role}.state.{name}").copy_(value.expand(self.batch, *value.shape[1:]))

    def tile_nbytes(self) -> int:
        """Bytes of one tile of all heads and sequences, keys and values."""
        parts = zip(self.quantizers, self.head_dims, strict=True)
        fields = [field for quantizer, dim in parts for field in quantizer.layout(dim, self.tile, self.dtype).values()]
        return self.batch * self.heads * sum(prod(field.shape) * field.dtype.itemsize for field in fields)


PLANS: WeakValueDictionary[str, StaticPlan] = WeakValueDictionary()
"""Name -> plan, for as long as somebody, such as a layer, holds that plan or an equal one that was named."""
_LOCK = threading.Lock()


def plan_name(plan: StaticPlan) -> str:
    """The name by which ops find this plan: text, because a compiler specialises on it.

    It is made from what the plan says. Compiled code outlives the cache that it was traced with, and serves the next
    one of the same size, whose plan gets the same name again.
    """
    digest = hashlib.sha256(repr(plan).encode()).hexdigest()[:16]
    with _LOCK:
        for number in itertools.count():  # beyond 0 where two kinds of quantizers read alike
            name = f"plan-{digest}-{number}"
            known = PLANS.setdefault(name, plan)
            if known == plan:
                break
    vars(plan)["named"] = None if known is plan else known  # whoever holds this one keeps that one, and its name, alive
    return name
