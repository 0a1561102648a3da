"""The shipped presets side by side: real bits per channel and expected compression, computed from the byte layout."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from itertools import takewhile
from pathlib import Path

import torch

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import BOUNDARY_VALUES, DEFAULT_PRESET, CachePreset, load_preset, preset_names
from turboquant_hf.evaluation import common
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.resources import config_path

KEY_WIDTHS = {2: "k2v2", 3: "k3v3", 4: "k4v4", 8: "k8v4"}
"""Width of conditioned keys -> the shipped preset that defines them."""
VALUE_WIDTHS = {2: "k2v2", 3: "k3v3", 4: "k4v4", 8: None}
"""The same for values; 8-bit values are those of boundary layers."""


SIZES = (512, 2048, 32768)
NOTES = """
Bits per channel of 16-bit input, averaged over the layers; scales, zero points, means and signs are counted.
at {sizes}: how many times less memory the cache takes than a 16-bit one behind a prompt of so many tokens;
below 1 it takes more. Raw tokens, statistics and the room allocated ahead are counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", action="extend", nargs="+", metavar="NAME", help="preset names or YAML paths; default: all shipped"
    )
    sizes = {"type": common.whole(1), "metavar": "N"}
    parser.add_argument("--head-dim", nargs="+", default=[128], help="channels of a head (128)", **sizes)
    parser.add_argument(
        "--tokens", nargs="+", default=list(SIZES), help="prompts whose memory is shown (512 2048 32768)", **sizes
    )
    parser.add_argument("--layers", default=32, help="KV layers (%(default)s)", **sizes)
    parser.add_argument("--kv-heads", default=8, help="KV heads per layer (%(default)s)", **sizes)


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 when done."""
    header = ["preset"]
    for dim in args.head_dim:
        header += [f"K bits d={dim}", "V bits", *(f"at {size(tokens)}" for tokens in args.tokens)]
    rows = []
    for name in args.preset or sorted(preset_names(), key=lambda name: (not OWN.fullmatch(name), name)):
        preset, row = load_preset(name), []
        for dim in args.head_dim:
            try:
                preset.validate(dim)
            except ValueError:
                row += ["-"] * (2 + len(args.tokens))
                continue
            keys, values = bits_per_channel(preset, dim, args.layers)
            shape = (args.layers, args.kv_heads)
            row += [keys, values, *(f"{resident_compression(preset, dim, n, *shape):.2f}x" for n in args.tokens)]
        default = " (default)" if name == DEFAULT_PRESET else ""
        rows.append([f"{preset.name}{default}", *row, description(name)])
    lines = common.format_table([row[:-1] for row in rows], header).splitlines()
    texts = ["", "", *(row[-1] for row in rows)]
    print("\n".join(f"{line}  {text}".rstrip() for line, text in zip(lines, texts, strict=True)))
    print(NOTES.format(sizes=" / ".join(size(tokens) for tokens in args.tokens)))
    return 0


OWN = re.compile(r"k\d+v\d+")
"""Names of this project's own presets, which are listed first."""


def description(preset: str) -> str:
    """What the first lines of a preset's file say about it, by name or path."""
    path = Path(preset) if Path(preset).suffix in (".yaml", ".yml") else config_path("cache", f"{preset}.yaml")
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))


def size(tokens: int) -> str:
    """2048 as "2k"."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def bits_per_channel(preset: CachePreset, head_dim: int, layers: int) -> tuple[float, float]:
    """Bits per channel of packed keys and values, averaged over `layers` KV layers."""
    pairs = [preset.layer_quantizers(ordinal, layers) for ordinal in range(layers)]
    keys, values = (
        sum(q.bits_per_channel(head_dim, preset.tile) for q in side) / layers for side in zip(*pairs, strict=True)
    )
    return keys, values


def expected_compression(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> float:
    """Bytes of a 16-bit cache / bytes of this one, for one sequence: `TurboQuantCache.compression_ratio_in_use`.

    Counts sinks, the raw tail, statistics and the shared rotations beside the tiles.
    """
    tiles = packed_tiles(preset, tokens, layers)
    raw = 2 * head_dim * kv_heads * (tokens - tiles * preset.tile + min(preset.sinks, tokens))
    total = 0.0
    for quantizer in _quantizers(preset, layers):
        packed = quantizer.bits_per_channel(head_dim, preset.tile) / 8 * head_dim * preset.tile * tiles * kv_heads
        total += raw + packed + (_state_nbytes(quantizer, head_dim, preset.tile) * kv_heads if tiles else 0)
    return 4 * head_dim * kv_heads * tokens * layers / (total + _shared_nbytes(preset, head_dim, layers))


def resident_compression(preset: CachePreset, head_dim: int, tokens: int, layers: int, kv_heads: int) -> float:
    """The same with the room that is allocated ahead, as it is behind a prompt of so many bfloat16 tokens."""
    tiles = packed_tiles(preset, tokens, layers)
    rest = torch.empty(1, 1, tokens - tiles * preset.tile, head_dim, dtype=torch.bfloat16)
    total = 0
    for pair, count in Counter(preset.layer_quantizers(ordinal, layers) for ordinal in range(layers)).items():
        layer = TurboQuantLayer(preset, *pair)
        layer.lazy_initialization(rest[:, :, :0])
        for store in layer.tiles:
            store.extend(tiles)
        layer.tail.append(rest, rest)
        if not tiles:
            layer.tail.own()
        learned = sum(_state_nbytes(quantizer, head_dim, preset.tile) for quantizer in pair) if tiles else 0
        total += count * kv_heads * (layer.nbytes + layer.spare_nbytes + learned)
    return 4 * head_dim * kv_heads * tokens * layers / (total + _shared_nbytes(preset, head_dim, layers))


def packed_tiles(preset: CachePreset, tokens: int, layers: int) -> int:
    """How many tiles of a sequence are packed behind a prompt."""
    waits = any(q.needs_statistics for q in preset.layer_quantizers(0, layers))
    ready = tokens >= preset.min_statistics or not waits
    return max(tokens - preset.recent_window, 0) // preset.tile if ready else 0


def _quantizers(preset: CachePreset, layers: int) -> list[Quantizer]:
    return [quantizer for ordinal in range(layers) for quantizer in preset.layer_quantizers(ordinal, layers)]


def _shared_nbytes(preset: CachePreset, head_dim: int, layers: int) -> int:
    return sum(quantizer.shared_nbytes(head_dim) for quantizer in set(_quantizers(preset, layers)))


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
