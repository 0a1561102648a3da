"""Settings of a run: a command's defaults, overridden by a YAML file, overridden by the flags that were given."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from turboquant_hf.resources import config_path

EXCLUSIVE = ("text", "dataset")
"""Flags of which a command takes one: the later source wins."""


def whole(low: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `low`."""

    def parse(text: str) -> int:
        number = int(text) if text.strip().lstrip("-").isdecimal() else None
        if number is None or number < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not supported; allowed: whole numbers from {low}")
        return number

    return parse


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add --config, and let `settings` tell a flag that was given from one that was not. Call after all other flags."""
    defaults = vars(parser.parse_args([]))
    for action in parser._actions:  # their defaults are about to go; help still has to show them
        if action.help and action.dest in defaults:
            action.help = action.help.replace("%(default)s", str(defaults[action.dest]))
    parser.set_defaults(**dict.fromkeys(defaults), defaults=defaults)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, or the name of one in configs/eval")


def settings(args: argparse.Namespace) -> argparse.Namespace:
    """Defaults, overridden by --config, overridden by the flags that were given.

    Raises:
        ValueError: the file has a field that is not a flag of this command.
    """
    given = {key: value for key, value in vars(args).items() if key in args.defaults and value is not None}
    merged = dict(args.defaults)
    for layer in (_read_config(args.config, set(args.defaults)), given):
        if any(layer.get(name) is not None for name in EXCLUSIVE):
            merged.update({name: None for name in EXCLUSIVE if name in merged})
        merged.update(layer)
    if merged.get("output") is not None:
        merged["output"] = Path(merged["output"])
    return argparse.Namespace(**merged)


def _read_config(name: str | None, allowed: set[str]) -> dict[str, Any]:
    if name is None:
        return {}
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = config_path("eval", f"{name}.yaml")
    if not path.is_file():
        raise ValueError(f"config={name!r} is not supported; allowed: a YAML file, or the name of one in configs/eval")
    data = yaml.safe_load(path.read_text()) or {}
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: a settings file holds a mapping of fields, got {type(data).__name__}")
    data = {key.replace("-", "_"): value for key, value in data.items()}
    for key in data:
        if key not in allowed:
            raise ValueError(f"{path}: unknown field {key!r}; allowed: {', '.join(sorted(allowed))}")
    return data
