"""Quantizers as plain data, as in YAML and JSON, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from turboquant_hf.checks import check_keys, guess, shown
from turboquant_hf.quantizers import QUANTIZERS, Quantizer


def quantizer_from(data: str | Mapping[str, Any] | Quantizer, role: str) -> Quantizer:
    """A quantizer from its name, or from {"quantizer": name, option: value, ...}; `role` is "keys" or "values"."""
    if isinstance(data, Quantizer):
        return data
    if isinstance(data, str):
        data = {"quantizer": data}
    if not isinstance(data, Mapping) or "quantizer" not in data:
        raise ValueError(f"{role}={shown(data)} is not supported; allowed: a mapping with 'quantizer' and its options")
    options = {key: _frozen(value) for key, value in data.items() if key != "quantizer"}
    if not isinstance(data["quantizer"], str) or data["quantizer"] not in QUANTIZERS:
        raise ValueError(
            f"{role}: quantizer={shown(data['quantizer'])} is not supported"
            f"{guess(str(data['quantizer']), QUANTIZERS)}; allowed: {', '.join(sorted(QUANTIZERS))}"
        )
    kind = QUANTIZERS[data["quantizer"]]
    allowed = {f.name for f in fields(kind)}
    check_keys(f"{role} ({kind.name})", options, allowed)
    kind.check_options(f"{role} ({kind.name})", options)
    return kind(**{**kind.options_for(role), **options})


def quantizer_data(quantizer: Quantizer) -> dict[str, Any]:
    """The inverse of `quantizer_from`."""
    return {"quantizer": quantizer.name, **{f.name: getattr(quantizer, f.name) for f in fields(quantizer)}}


def quantizer_label(quantizer: Quantizer) -> str:
    """A quantizer's name, and the options that differ from the defaults."""
    implied = {name for role in ("keys", "values") for name in type(quantizer).options_for(role)}
    changed = (f for f in fields(quantizer) if getattr(quantizer, f.name) != f.default and f.name not in implied)
    options = ", ".join(f"{f.name}={getattr(quantizer, f.name)}" for f in changed)
    return f"{quantizer.name}({options})" if options else quantizer.name


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
