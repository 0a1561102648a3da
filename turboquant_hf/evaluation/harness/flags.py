"""Flags that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.cache.profiles import FILE

DTYPES = ("float32", "bfloat16", "float16")


def whole(low: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `low`."""

    def parse(text: str) -> int:
        number = int(text) if text.strip().lstrip("-").isdecimal() else None
        if number is None or number < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not supported; allowed: whole numbers from {low}")
        return number

    return parse


def add_model_arguments(
    parser: argparse.ArgumentParser,
    output: str | None = None,
    what: str = "folder for config.yaml, metrics.json and pictures",
) -> None:
    """--model, --device, --dtype, --output."""
    parser.add_argument(
        "--model", default="packaged", help="hub id, folder, GGUF file, or 'packaged' (SmolLM2-135M, the default)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:N or cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights; default: float32 on a CPU, else bfloat16"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None if output is None else Path(output),
        help=f"{what} (default: {output or 'nothing is written'})",
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


def add_profile_argument(parser: argparse.ArgumentParser) -> None:
    """--profile."""
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help=f"profile of the model (turboquant-hf profile); 'none' for none (default: {FILE} in the model's folder)",
    )


def add_window_arguments(parser: argparse.ArgumentParser, context: int, windows: int) -> None:
    """--context, --windows, --chunk: which parts of a text are read, and how."""
    parser.add_argument("--context", type=int, default=context, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=windows, help="number of windows, spread over the text (default: %(default)s)"
    )
    parser.add_argument("--chunk", type=int, default=128, help="tokens fed at a time (default: %(default)s)")


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
        help="override the presets' recent window; with 0, all tokens but the sinks are packed, the question too",
    )
    parser.add_argument("--attention", default=ATTENTION_NAME, help="attention implementation of the model")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add --config, and let `Run.of` know which flags were given. Call this after all other flags."""
    defaults = vars(parser.parse_args([]))
    for action in parser._actions:  # the defaults are removed below, and help must still show them
        if action.help and action.dest in defaults:
            action.help = action.help.replace("%(default)s", str(defaults[action.dest]))
    parser.set_defaults(**dict.fromkeys(defaults), defaults=defaults)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, or the name of one in configs/eval")
