"""Which quantizers single layers have in place of a preset's: overrides by KV-layer ordinal, or by a slice of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turboquant_hf.checks import check_keys, shown
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.quantizers.data import quantizer_from

SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(:([1-9]\d*)?)?")
"""A slice of KV-layer ordinals as text, with a positive step."""


@dataclass(frozen=True)
class LayerOverride:
    """The quantizers of one KV layer that differ from the preset's; None keeps the preset's quantizer."""

    keys: Quantizer | None = None
    values: Quantizer | None = None


def layer_overrides(data: Any) -> tuple[tuple[int | str, LayerOverride], ...]:
    """`CachePreset.layers` from plain data.

    Raises:
        ValueError: for an entry that names no layer, or overrides something else than keys and values.
    """
    items = list(data.items()) if isinstance(data, Mapping) else data
    if not isinstance(items, (list, tuple)) or not all(isinstance(x, (list, tuple)) and len(x) == 2 for x in items):
        raise ValueError(f"layers={shown(data)} is not supported; allowed: KV-layer ordinals with keys and values")
    result = []
    for index, override in items:
        if isinstance(index, str) and index.removeprefix("-").isdecimal():
            index = int(index)  # the keys of a mapping that was in JSON, such as a saved generation config
        allowed = SLICE.fullmatch(index) if isinstance(index, str) else type(index) is int
        if not allowed:
            raise ValueError(
                f"layers: {shown(index)} is not supported; allowed: KV-layer ordinals (whole numbers), or slices of "
                "them such as '::2'"
            )
        if not isinstance(override, LayerOverride):
            if not isinstance(override, Mapping):
                raise ValueError(f"layers: {index}: {shown(override)} is not supported; allowed: keys and values")
            check_keys(f"layers: {index}", override, {"keys", "values"})
            override = LayerOverride(**{role: quantizer_from(value, role) for role, value in override.items()})
        result.append((index, override))
    return tuple(result)


def ordinals(which: int | str, num_layers: int) -> range:
    """The KV layers of `num_layers` that an entry of `CachePreset.layers` names."""
    if isinstance(which, str):
        return range(num_layers)[slice(*(int(part) if part else None for part in which.split(":")))]
    return range(num_layers)[which : which + 1 or None] if which >= -num_layers else range(0)
