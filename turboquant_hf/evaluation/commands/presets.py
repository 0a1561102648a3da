"""`turboquant-hf presets`: bits per channel and expected compression of the shipped presets, from the byte layout."""

from __future__ import annotations

import argparse
import re
import textwrap
from itertools import takewhile
from pathlib import Path

from turboquant_hf.config import DEFAULT_PRESET, load_preset, preset_names
from turboquant_hf.evaluation.harness.flags import whole
from turboquant_hf.evaluation.harness.tables import format_table, size
from turboquant_hf.evaluation.presets.memory import MEMORY_NOTE, bits_per_channel, memory_cell
from turboquant_hf.resources import config_path

SIZES = (512, 2048, 32768)
NOTES = (
    "Bits per channel of 16-bit input, averaged over the layers; scales, zero points, means and signs are counted.",
    f"{MEMORY_NOTE} Raw tokens and statistics are counted in both.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", action="extend", nargs="+", metavar="NAME", help="preset names or YAML paths; default: all shipped"
    )
    sizes = {"type": whole(1), "metavar": "N"}
    parser.add_argument("--head-dim", nargs="+", default=[128], help="channels per head (128)", **sizes)
    parser.add_argument(
        "--tokens",
        nargs="+",
        default=list(SIZES),
        help="lengths of the prompts whose memory is shown (512 2048 32768)",
        **sizes,
    )
    parser.add_argument("--layers", default=32, help="KV layers (%(default)s)", **sizes)
    parser.add_argument("--kv-heads", default=8, help="KV heads per layer (%(default)s)", **sizes)


def run(args: argparse.Namespace) -> int:
    """Print the table. Returns 0."""
    header = ["preset"]
    for dim in args.head_dim:
        header += [f"K bits d={dim}", "V bits", *(f"at {size(tokens)}" for tokens in args.tokens)]
    rows = []
    for name in args.preset or own_first():
        preset, row = load_preset(name), []
        for dim in args.head_dim:
            try:
                preset.validate(dim)
            except ValueError:
                row += ["-"] * (2 + len(args.tokens))
                continue
            shape = (args.layers, args.kv_heads)
            row += [*bits_per_channel(preset, dim, args.layers)]
            row += [memory_cell(preset, dim, tokens, *shape) for tokens in args.tokens]
        default = " (default)" if name == DEFAULT_PRESET else ""
        rows.append([f"{preset.name}{default}", *row, description(name)])
    lines = format_table([row[:-1] for row in rows], header).splitlines()
    texts = ["", "", *(row[-1] for row in rows)]
    print("\n".join(f"{line}  {text}".rstrip() for line, text in zip(lines, texts, strict=True)))
    print("", *(textwrap.fill(note, 120) for note in NOTES), sep="\n")
    return 0


OWN = re.compile(r"k\d+v\d+")
"""The pattern of the names of this project's own presets."""


def own_first() -> list[str]:
    """The shipped presets, this project's own first."""
    return sorted(preset_names(), key=lambda name: (not OWN.fullmatch(name), name))


def description(preset: str) -> str:
    """The first comment of a preset's file, found by name or path."""
    path = Path(preset) if Path(preset).suffix in (".yaml", ".yml") else config_path("cache", f"{preset}.yaml")
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
