"""`Run`: the description of a run. It names the command, the settings and the folder, and never changes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from turboquant_hf.resources import config_path

EXCLUSIVE = ("text", "dataset")
"""Flags that exclude each other: the later source wins."""
NOT_SETTINGS = {"command", "config", "defaults"}
"""Attributes of the parsed arguments that are not settings."""


@dataclass(frozen=True)
class Run:
    """The request of a command. A setting is read as an attribute: `run.context`, `run.output`.

    Attributes:
        tool: the command's name. metrics.json and config.yaml record it, so that a report need not guess.
        values: {flag: setting}, read-only. Lists become tuples.
    """

    tool: str
    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        values = {name: tuple(x) if isinstance(x, list) else x for name, x in self.values.items()}
        object.__setattr__(self, "values", MappingProxyType(values))

    @classmethod
    def of(cls, args: argparse.Namespace) -> Run:
        """The run of a command line: defaults, overridden by --config, overridden by the given flags.

        The dtype is chosen here if the command has a model.

        Raises:
            ValueError: the file has a field that is not a flag of this command; a device that is not there.
        """
        found = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
        if hasattr(args, "defaults"):  # the command has --config, see `flags.add_settings`
            found = _merged(args.defaults, _read_config(args.config, set(args.defaults)), found)
        if found.get("output") is not None:
            found["output"] = Path(found["output"])
        if "dtype" in found and found.get("model") is not None:
            found["dtype"] = resolve_dtype(found["device"], found["dtype"])
        return cls(args.command, found)

    def __reduce__(self) -> tuple[type[Run], tuple[str, dict[str, Any]]]:
        """For pickle and copy, which cannot take a read-only mapping."""
        return type(self), (self.tool, dict(self.values))

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(f"a run of {self.__dict__.get('tool')!r} has no setting {name!r}")
        return values[name]

    def with_settings(self, **settings: Any) -> Run:
        """The same run with these settings changed or added."""
        return replace(self, values={**self.values, **settings})

    def part(self, folder: str, tool: str) -> Run:
        """A separate run inside this run, in a folder of its output folder, under another name."""
        output = self.output and self.output / folder
        return replace(self, tool=tool, values={**self.values, "output": output})

    def config(self) -> dict[str, Any]:
        """Tool and settings as plain data, for config.yaml."""
        return json.loads(json.dumps({"tool": self.tool, **self.values}, default=str))


def resolve_dtype(device: str, dtype: str | None = None) -> str:
    """The requested dtype, or the usual dtype of the device.

    Raises:
        ValueError: a device that is not there.
    """
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} is not supported on this machine; allowed: cpu")
    return dtype or ("float32" if device == "cpu" else "bfloat16")


def _merged(defaults: Mapping[str, Any], file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    given = {key: value for key, value in flags.items() if key in defaults and value is not None}
    for layer in (file, given):
        if any(layer.get(name) is not None for name in EXCLUSIVE):
            merged.update({name: None for name in EXCLUSIVE if name in merged})
        merged.update(layer)
    return merged


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
