"""The steps of a cache that runs inside a CUDA graph, plain torch: what is due is read from tensors, not from Python.

One layer, one step, in this order: `observe_due` (the step's queries), `fit_due`, `encode_due` for keys and for
values (`kernels.encode`), `advance_due`. Every one does nothing where nothing is due.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_hf.kernels.decode.inputs import RawTokens
from turboquant_hf.kernels.schedule import Schedule
from turboquant_hf.kernels.statistics.reference import (
    balance_channels,
    power_of_two,
    query_energy,
    tile_energy,
    typical_scale,
)


@dataclass(frozen=True, eq=False)
class QuerySums:
    """What `observe_due` adds up, from zeros on.

    Attributes:
        energy: float32 [B, H, D], sums of squares of queries.
        count: float32 [B, H], how many queries they are of.
        seen: int32 [H], how many tokens' queries were looked at.
    """

    energy: torch.Tensor
    count: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True)
class FitRule:
    """What a layer learns, and from how many tokens.

    Attributes:
        min_statistics: tokens of the longest sequence that are waited for.
        patience: a padded batch of more tokens than these waits no longer.
        center, sizes, balance: of the keys' quantizer, as in `tile_energy` and `balance_channels`.
        powers: whether the gains of keys and of values are powers of two.
    """

    min_statistics: int
    sizes: tuple[int, ...]
    patience: int = 2**30
    center: bool = False
    balance: str = "none"
    powers: tuple[bool, bool] = (False, False)


def observe_due(query: torch.Tensor, sums: QuerySums, schedule: Schedule) -> None:
    """Add the squares of the newest queries [B, Hq, q, D] to the sums, until the layer is fitted."""
    if int(schedule.fitted[0]):
        return
    tokens = query.shape[2]
    position = int(schedule.counts[1]) - tokens
    added, number = query_energy(query, sums.energy.shape[1], schedule.starts, position)
    sums.energy.add_(added)
    sums.count.add_(number[:, :, 0])
    sums.seen.add_(tokens)


def fit_due(
    ring: RawTokens,
    sums: QuerySums,
    schedule: Schedule,
    rule: FitRule,
    states: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """Learn the state of a layer from its ring once, when the first tile is due and enough tokens were seen.

    That is when `schedule.window` tokens follow the first tile, and `rule` waits no longer. The ring must still hold
    everything then: a longer prompt is for `Quantizer.fit`. Queries count as known where `sums.seen` is at least half
    of the tokens.

    Args:
        ring: [B, H, R, D] each, R a multiple of the tile; position p stands in slot p % R.
        states: buffers to write. Of keys: "balance" float32 [B, H, D] with "order" int16 [B, H, D], or "gain"
            float32 [B, H], or nothing; of values: "gain", or nothing.
    """
    key_state, tile, length = states[0], schedule.tile, int(schedule.counts[1])
    waits = length - int(schedule.starts.min()) < rule.min_statistics and length <= rule.patience
    if int(schedule.fitted[0]) or length < schedule.window + tile or waits:
        return
    whole = length // tile
    position = torch.arange(whole * tile, device=ring.keys.device)
    weight = (position >= schedule.starts[:, None] + schedule.sinks).float().unflatten(1, (whole, tile))
    number = weight.sum(dim=(1, 2))

    def tiles(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, : whole * tile].unflatten(2, (whole, tile))

    if "balance" in key_state:
        query_rms = None
        if 2 * int(sums.seen[0]) >= length:
            energy, count = sums.energy, sums.count[:, :, None]
            pooled = energy.sum(0, keepdim=True) / count.sum(0, keepdim=True).clamp(min=1)
            query_rms = torch.where(count > 0, energy / count.clamp(min=1), pooled).sqrt()
        energy = tile_energy(tiles(ring.keys), weight, rule.center)
        found = balance_channels(energy, number, query_rms, rule.sizes, rule.balance)
        for name, value in found.items():
            key_state[name].copy_(value)
    for x, state, power in zip((ring.keys, ring.values), states, rule.powers, strict=True):
        if "gain" in state:
            gain = typical_scale(tile_energy(tiles(x), weight, False), number)
            state["gain"].copy_(power_of_two(gain) if power else gain)
    schedule.fitted.fill_(1)


def advance_due(schedule: Schedule) -> None:
    """Count the tile that `encode_due` wrote in this step."""
    if schedule.is_due():
        schedule.counts[0] += 1
