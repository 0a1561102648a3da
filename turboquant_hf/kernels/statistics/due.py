"""The steps of a cache that runs inside a CUDA graph, plain torch: what is due is read from tensors, not from Python.

One layer, one step, in this order: `observe_due` (the step's queries), `fit_due`, `encode_due` for keys and for
values (`kernels.encode`), `advance_due`. Every one does nothing where nothing is due. Shared arguments:

    counts    int32 [2]: tiles encoded, and tokens seen (of the padded batch, those of this step included)
    fitted    int32 [H]: not 0 where the layer's state is known; one flag a head, so that no program waits for another
    starts    int64 [B]: every sequence's first position
    ring      [B, H, R, D]: raw tokens, R a multiple of the tile; position p stands in slot p % R
    energy    float32 [B, H, D], count float32 [B, H], seen int32 [H]: what `observe_due` adds up, from zeros on
"""

from __future__ import annotations

import torch

from turboquant_hf.kernels.statistics.reference import (
    balance_channels,
    power_of_two,
    query_energy,
    tile_energy,
    typical_scale,
)


def observe_due(
    query: torch.Tensor,
    energy: torch.Tensor,
    count: torch.Tensor,
    seen: torch.Tensor,
    counts: torch.Tensor,
    fitted: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """Add the squares of the newest queries [B, Hq, q, D] to the statistics, until they have been used."""
    if int(fitted[0]):
        return
    tokens = query.shape[2]
    added, number = query_energy(query, energy.shape[1], starts, int(counts[1]) - tokens)
    energy += added
    count += number[:, :, 0]
    seen += tokens


def fit_due(
    keys: torch.Tensor,
    values: torch.Tensor,
    energy: torch.Tensor,
    count: torch.Tensor,
    seen: torch.Tensor,
    counts: torch.Tensor,
    fitted: torch.Tensor,
    starts: torch.Tensor,
    *,
    tile: int,
    window: int,
    sinks: int,
    min_statistics: int,
    patience: int = 2**30,
    center: bool,
    sizes: tuple[int, ...],
    balance: str,
    key_state: dict[str, torch.Tensor],
    value_state: dict[str, torch.Tensor],
    powers: tuple[bool, bool] = (False, False),
) -> None:
    """Learn the state of a layer from its ring once, when the first tile is due and enough tokens were seen.

    That is when `window` tokens follow the first tile, and the longest sequence has `min_statistics` or the padded
    batch more than `patience` tokens. The ring must
    still hold everything then: a longer prompt is for `Quantizer.fit`.

    Args:
        keys, values: rings.
        center, sizes, balance: of the keys' quantizer, as in `tile_energy` and `balance_channels`. Queries count as
            known where `seen` is at least half of the tokens.
        key_state: buffers to write: "balance" float32 [B, H, D] with "order" int16 [B, H, D], or "gain"
            float32 [B, H], or nothing.
        value_state: "gain" float32 [B, H], or nothing.
        powers: whether the gains of keys and of values are powers of two.
    """
    length = int(counts[1])
    waits = length - int(starts.min()) < min_statistics and length <= patience
    if int(fitted[0]) or length < window + tile or waits:
        return
    whole = length // tile
    position = torch.arange(whole * tile, device=keys.device)
    weight = (position >= starts[:, None] + sinks).float().unflatten(1, (whole, tile))
    number = weight.sum(dim=(1, 2))

    def tiles(ring: torch.Tensor) -> torch.Tensor:
        return ring[:, :, : whole * tile].unflatten(2, (whole, tile))

    if "balance" in key_state:
        query_rms = None
        if 2 * int(seen[0]) >= length:
            pooled = energy.sum(0, keepdim=True) / count.sum(0)[None, :, None].clamp(min=1)
            own = energy / count[:, :, None].clamp(min=1)
            query_rms = torch.where(count[:, :, None] > 0, own, pooled).sqrt()
        found = balance_channels(tile_energy(tiles(keys), weight, center), number, query_rms, sizes, balance)
        for name, value in found.items():
            key_state[name].copy_(value)
    for ring, state, power in zip((keys, values), (key_state, value_state), powers, strict=True):
        if "gain" in state:
            gain = typical_scale(tile_energy(tiles(ring), weight, False), number)
            state["gain"].copy_(power_of_two(gain) if power else gain)
    fitted.fill_(1)


def advance_due(counts: torch.Tensor, fitted: torch.Tensor, *, tile: int, window: int, capacity: int) -> None:
    """Count the tile that `encode_due` wrote in this step; `capacity` is the number of tiles that the arrays hold."""
    tiles, length = counts.tolist()
    if int(fitted[0]) and length >= (tiles + 1) * tile + window and tiles < capacity:
        counts[0] += 1
