"""Presets of given widths, built from the quantizers of the shipped ones."""

from __future__ import annotations

from turboquant_hf.config import BOUNDARY_VALUES, CachePreset, load_preset
from turboquant_hf.quantizers import Quantizer

KEY_WIDTHS = {2: "k2v2", 3: "k3v3", 4: "k4v4", 8: "k8v4"}
"""{width of conditioned keys: the shipped preset that defines them}."""
VALUE_WIDTHS = {2: "k2v2", 3: "k3v3", 4: "k4v4", 8: None}
"""The same for values. 8-bit values are those of boundary layers."""


def key_quantizer(bits: int) -> Quantizer:
    """The shipped conditioned keys of this width."""
    return load_preset(KEY_WIDTHS[_width("keys", bits, KEY_WIDTHS)]).keys


def value_quantizer(bits: int) -> Quantizer:
    """The shipped values of this width."""
    name = VALUE_WIDTHS[_width("values", bits, VALUE_WIDTHS)]
    return load_preset(name).values if name else BOUNDARY_VALUES


def flat_preset(key_bits: int, value_bits: int, **options) -> CachePreset:
    """The shipped preset of these keys with values of this width in every layer; `options` are fields of a preset."""
    base = load_preset(KEY_WIDTHS[_width("keys", key_bits, KEY_WIDTHS)], boundary_layers=0)
    return base.with_overrides(name=f"k{key_bits}v{value_bits}", values=value_quantizer(value_bits), **options)


def _width(role: str, bits: int, table: dict) -> int:
    if bits not in table:
        raise ValueError(f"{role}: width={bits!r} is not supported; allowed: {', '.join(map(str, table))}")
    return bits
