"""The shipped presets side by side: real bits per channel and expected compression, computed from the byte layout."""

from __future__ import annotations

import argparse

import torch

from turboquant_hf.config import BOUNDARY_VALUES, CachePreset, load_preset, preset_names
from turboquant_hf.evaluation import common
from turboquant_hf.quantizers import Quantizer

KEY_WIDTHS = {2: "k2v2", 3: "k3v3", 4: "k4v4", 8: "k8v4"}
"""Width of conditioned keys -> the shipped preset that defines them."""
VALUE_WIDTHS = {2: "k2v2", 3: "k3v3", 4: "k4v4", 8: None}
"""The same for values; 8-bit values are those of boundary layers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", action="extend", nargs="+", metavar="NAME", help="preset names or YAML paths; default: all shipped"
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], help="channels of a head (64 128)")
    parser.add_argument("--tokens", type=int, default=32768, help="context of the expected compression (%(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="KV layers (%(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads a layer (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 when done."""
    header = ["preset"]
    for dim in args.head_dim:
        header += [f"K bits d={dim}", "V bits", f"smaller at {args.tokens}"]
    rows = []
    for preset in common.resolve_presets(args.preset or preset_names()):
        row = [preset.name]
        for dim in args.head_dim:
            try:
                preset.validate(dim)
            except ValueError:
                row += ["-"] * 3
                continue
            keys, values = bits_per_channel(preset, dim, args.layers)
            row += [keys, values, expected_compression(preset, dim, args.tokens, args.layers, args.kv_heads)]
        rows.append(row)
    print(common.format_table(rows, header))
    print("Bits of 16 bit input, scales, zero points, means and signs included, averaged over the layers.")
    return 0


def bits_per_channel(preset: CachePreset, head_dim: int, layers: int) -> tuple[float, float]:
    """Bits per channel of packed keys and values, averaged over `layers` KV layers."""
    pairs = [preset.layer_quantizers(ordinal, layers) for ordinal in range(layers)]
    keys, values = (
        sum(q.bits_per_channel(head_dim, preset.tile) for q in side) / layers for side in zip(*pairs, strict=True)
    )
    return keys, values


def expected_compression(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> float:
    """Bytes of a 16-bit cache / bytes of this one, for one sequence: what `TurboQuantCache.compression_ratio` reports.

    Counts sinks, the raw tail, statistics and the shared rotations beside the tiles.
    """
    waits = any(q.needs_statistics for q in preset.layer_quantizers(0, layers))
    ready = tokens >= preset.min_statistics or not waits
    tiles = max(tokens - preset.recent_window, 0) // preset.tile if ready else 0
    raw = 2 * head_dim * kv_heads * (tokens - tiles * preset.tile + min(preset.sinks, tokens))
    total, shared = 0.0, {}
    for ordinal in range(layers):
        for quantizer in preset.layer_quantizers(ordinal, layers):
            packed = quantizer.bits_per_channel(head_dim, preset.tile) / 8 * head_dim * preset.tile * tiles * kv_heads
            total += raw + packed + (_state_nbytes(quantizer, head_dim, preset.tile) * kv_heads if tiles else 0)
            shared[quantizer] = quantizer.shared_nbytes(head_dim)
    return 4 * head_dim * kv_heads * tokens * layers / (total + sum(shared.values()))


def _state_nbytes(quantizer: Quantizer, head_dim: int, tile: int) -> int:
    state = quantizer.fit(torch.zeros(1, 1, 1, tile, head_dim), torch.ones(1, 1, tile), None)
    return sum(x.numel() * x.itemsize for x in state.values())


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
