"""Chooses widths layer by layer: prices, the choice under a budget, and the preset that results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation.presets.widths import flat_preset, key_quantizer, value_quantizer
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.quantizers.layers import LayerOverride

ROLES = ("keys", "values")

Costs = dict[tuple[str, int, int], float]
"""{(role, layer, width): KL if only that side of that layer has that width}."""


def choose_widths(
    costs: Costs, prices: Mapping[tuple[str, int], float], layers: int, budget: float
) -> dict[tuple[str, int], int]:
    """{(role, layer): width} with the least total cost within a budget: a knapsack over all layers and both sides.

    Args:
        costs: as `sensitivity` returns them.
        prices: (role, width) -> real bits per channel.
        layers: KV layers.
        budget: the largest allowed mean of the chosen prices.

    Raises:
        ValueError: the cheapest widths cost more than the budget.
    """
    slots = [(role, layer) for role in ROLES for layer in range(layers)]
    limit = budget * len(slots) + 1e-6
    best: dict[float, tuple[float, tuple[int, ...]]] = {0.0: (0.0, ())}
    for role, layer in slots:
        step: dict[float, tuple[float, tuple[int, ...]]] = {}
        for spent, (cost, chosen) in best.items():
            for width in (width for owner, width in prices if owner == role):
                # Prices are multiples of a power of two, so that equal sums are equal floats.
                price, total = spent + prices[role, width], (cost + costs[role, layer, width], (*chosen, width))
                if price <= limit and total < step.get(price, (float("inf"),)):
                    step[price] = total
        best = step
    if not best:
        least = sum(min(price for (owner, _), price in prices.items() if owner == role) for role in ROLES) / 2
        raise ValueError(f"budget={budget:g} real bits is not supported; allowed: at least {least:g}")
    return dict(zip(slots, min(best.values())[1], strict=True))


def price_list(widths: Sequence[int], head_dim: int) -> dict[tuple[str, int], float]:
    """{(role, width): real bits per channel of 16-bit input}, scales and means included."""
    sides = {("keys", w): key_quantizer(w) for w in widths} | {("values", w): value_quantizer(w) for w in widths}
    tile = CachePreset().tile
    return {side: quantizer.bits_per_channel(head_dim, tile) for side, quantizer in sides.items()}


def allocated_preset(choice: Mapping[tuple[str, int], int], name: str) -> CachePreset:
    """A preset with the most common widths, and overrides for the layers with other widths."""
    layers = 1 + max(layer for _, layer in choice)
    chosen = {role: [choice[role, layer] for layer in range(layers)] for role in ROLES}
    key_bits, value_bits = (max(sorted(set(side)), key=side.count) for side in chosen.values())
    overrides = []
    for layer, (keys, values) in enumerate(zip(*chosen.values(), strict=True)):
        override = LayerOverride(
            keys=key_quantizer(keys) if keys != key_bits else None,
            values=value_quantizer(values) if values != value_bits else None,
        )
        if override != LayerOverride():
            overrides.append((layer, override))
    return replace(flat_preset(key_bits, value_bits), name=name, layers=tuple(overrides))


def flat_rivals(widths: Sequence[int], budget: float) -> list[CachePreset]:
    """Flat presets whose codes have `budget` bits, mean of keys and values; if there are none, the largest below."""
    pairs = [(k, v) for k in widths for v in widths if k + v <= 2 * budget + 1e-6]
    most = max(k + v for k, v in pairs)
    return [flat_preset(k, v) for k, v in pairs if k + v == most]


def flat_cost(costs: Costs, preset: CachePreset, widths: Sequence[int], layers: int) -> float:
    keys = next(w for w in widths if key_quantizer(w) == preset.keys)
    values = next(w for w in widths if value_quantizer(w) == preset.values)
    return sum(costs["keys", layer, keys] + costs["values", layer, values] for layer in range(layers))


def preset_data(preset: CachePreset) -> dict[str, Any]:
    """Plain data that `CachePreset.from_dict` reads back, defaults of quantizers left out."""
    data: dict[str, Any] = {"name": preset.name}
    data |= {role: _quantizer_data(getattr(preset, role)) for role in ROLES}
    defaults = CachePreset()
    for name in (f.name for f in fields(preset) if f.name not in {"name", "layers", *ROLES}):
        if getattr(preset, name) != getattr(defaults, name):
            data[name] = getattr(preset, name)
    if preset.layers:
        data["layers"] = {
            layer: {role: _quantizer_data(q) for role in ROLES if (q := getattr(override, role)) is not None}
            for layer, override in preset.layers
        }
    return data


def _quantizer_data(quantizer: Quantizer) -> dict[str, Any]:
    options = {}
    for field in fields(quantizer):
        value = getattr(quantizer, field.name)
        if field.init and (field.default is MISSING or value != field.default):
            options[field.name] = (
                [list(x) if isinstance(x, tuple) else x for x in value] if isinstance(value, tuple) else value
            )
    return {"quantizer": quantizer.name, **options}
