"""What every evaluation shares: options, texts, output folders, tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import CachePreset, load_preset
from turboquant_hf.evaluation.environment import write_environment
from turboquant_hf.evaluation.models import load_text, packaged_text
from turboquant_hf.evaluation.settings import whole as whole

DTYPES = ("float32", "bfloat16", "float16")
UNCOMPRESSED = "uncompressed"
"""What the model with transformers' own cache is called in every table, picture and file."""
MEASURED_ALONE = {"recent_window": 0, "encode_first": True, "min_statistics": 256}
"""Nothing but the sinks is read raw once 256 tokens were seen, whatever a preset waits for."""


def add_model_arguments(parser: argparse.ArgumentParser, output: str | None = None) -> None:
    """--model, --device, --dtype, --output."""
    parser.add_argument(
        "--model", default="packaged", help="hub id, folder, GGUF file, or 'packaged' (SmolLM2-135M, the default)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: float32 on a CPU, else bfloat16")
    parser.add_argument(
        "--output",
        type=Path,
        default=None if output is None else Path(output),
        help=f"folder for config.yaml, metrics.json and pictures (default: {output or 'nothing is written'})",
    )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """--text and --dataset."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", metavar="FILE", help="text files; default: CPython's pydoc topics")
    source.add_argument("--dataset", metavar="NAME", help="a `datasets` name, or NAME:CONFIG:SPLIT[:COLUMN]")


def add_preset_argument(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """--preset, one or several names, repeatable."""
    parser.add_argument(
        "--preset",
        action="extend",
        nargs="+",
        metavar="NAME",
        default=list(default),
        help=f"preset names or YAML paths (default: {' '.join(default)})",
    )


def add_reading_arguments(parser: argparse.ArgumentParser, chunk: int = 512) -> None:
    """--chunk, --recent-window, --attention: how a prompt is read before an answer is decoded."""
    parser.add_argument(
        "--chunk",
        type=whole(0),
        default=chunk,
        help="prompt tokens fed at a time; 0: all at once (%(default)s)",
    )
    parser.add_argument(
        "--recent-window",
        type=whole(0),
        default=None,
        metavar="TOKENS",
        help="override the presets'; 0 leaves nothing raw but the sinks, the question and the answer included",
    )
    parser.add_argument("--attention", default=ATTENTION_NAME, help="attention implementation of the model")


def resolve_dtype(args: argparse.Namespace) -> str:
    """The dtype asked for, or the device's usual one.

    Raises:
        ValueError: a device that is not there.
    """
    if str(args.device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={args.device!r} is not supported on this machine; allowed: cpu")
    return args.dtype or ("float32" if args.device == "cpu" else "bfloat16")


def read_text(args: argparse.Namespace) -> tuple[str, str]:
    """(name, text) of what --text or --dataset asks for."""
    if args.text:
        return " ".join(Path(path).name for path in args.text), load_text(args.text)
    if args.dataset:
        return args.dataset, _dataset_text(args.dataset)
    return "pydoc_data.topics", packaged_text()


def _dataset_text(name: str) -> str:
    from datasets import load_dataset

    path, config, split, column = (*name.split(":"), None, None, None)[:4]
    rows = load_dataset(path, config or None, split=split or "test")
    if column is None:
        column = next((c for c, feature in rows.features.items() if getattr(feature, "dtype", "") == "string"), None)
    if column not in rows.column_names:
        raise ValueError(f"dataset={name!r}: no text column; allowed: NAME:CONFIG:SPLIT:COLUMN of {rows.column_names}")
    return "\n".join(rows[column])


def resolve_presets(names: Sequence[str], **overrides: Any) -> list[CachePreset]:
    """Presets by name or YAML path, with the overrides that are not None."""
    given = {key: value for key, value in overrides.items() if value is not None}
    return [load_preset(name, **given) for name in names]


def average_bits(cache) -> tuple[float, float]:
    """Bits per channel of keys and of values in packed tiles, averaged over the layers of a filled cache."""
    layers = cache.packed_layers
    bits = [
        [
            quantizer.bits_per_channel(dim, layer.preset.tile, layer.dtype)
            for quantizer, dim in zip(layer.quantizers, layer.head_dims, strict=True)
        ]
        for layer in layers
    ]
    keys, values = (sum(side) / len(layers) for side in zip(*bits, strict=True))
    return keys, values


def check_output(output: Path | None) -> None:
    """Raise ValueError where a finished run lies: it is never repeated silently."""
    if output is not None and (output / "metrics.json").is_file():
        raise ValueError(f"output={str(output)!r} holds a finished run; name another or remove the folder")


def write_run(output: Path | None, config: dict[str, Any], metrics: dict[str, Any]) -> None:
    """config.yaml, environment.yaml and metrics.json of one run."""
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    if "dtype" in config and config["dtype"] is None and config.get("model"):
        config = {**config, "dtype": resolve_dtype(argparse.Namespace(**config))}
    write_environment(output, config.get("device", "cpu"))
    (output / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def format_table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Plain text columns, numbers to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        columns = zip(row, widths, strict=True)
        lines.append("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(columns)))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
