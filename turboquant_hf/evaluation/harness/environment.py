"""The environment of a run: versions, hardware, day. It is kept beside the metrics."""

from __future__ import annotations

import platform
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from turboquant_hf.version import __version__

ENVIRONMENT = "environment.yaml"


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the kind of processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str | None]:
    """{package: version}; None for a package that is not installed."""
    found = {"turboquant_hf": __version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_environment(output: Path, device: str) -> None:
    """Write environment.yaml. It is separate from the metrics, whose bytes are the same on every day."""
    try:
        hardware = device_name(torch.device(device))
    except (RuntimeError, AssertionError):  # a name that torch does not know, or no such device
        hardware = str(device)
    found: dict[str, Any] = {"date": date.today().isoformat(), "hardware": hardware, **versions()}
    (output / ENVIRONMENT).write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    """Date, hardware, versions, dtype and recent window of a run, as far as its folder records them."""
    found: dict[str, Any] = {}
    for name, keys in ((ENVIRONMENT, None), ("config.yaml", ("dtype", "recent_window"))):
        path = folder / name
        data = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        if isinstance(data, dict):
            found |= {key: value for key, value in data.items() if keys is None or key in keys}
    return found
