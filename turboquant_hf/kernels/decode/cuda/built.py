"""CUDA C++ kernels, built once per machine: a binary on disk is named by a hash of everything it was built from."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from turboquant_hf.kernels.progress import announced

VARIABLE = "TURBOQUANT_KERNEL_CACHE"


def folder() -> Path:
    """The folder of the binaries: TURBOQUANT_KERNEL_CACHE, or turboquant_hf/kernels in the user's cache folder."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turboquant_hf" / "kernels"


def load_kernel(source: str, name: str, options: list[str], label: str) -> Any:
    """The kernel `name` of a CUDA C++ source for the current device, from disk or from the compiler.

    Args:
        options: of the compiler (NVRTC).
        label: what the log calls a build that takes long.

    Raises:
        RuntimeError: the source does not compile, or the device does not take the binary.
    """
    major, minor = torch.cuda.get_device_capability()
    built_from = "\0".join([source, name, *options, f"{major}.{minor}", torch.__version__, str(torch.version.cuda)])
    path = folder() / f"{hashlib.sha256(built_from.encode()).hexdigest()}.cubin"
    kept = _read(path)
    if kept is not None:
        try:
            return _load(*kept)
        except RuntimeError:
            pass  # a damaged file: build it again
    with announced(label, "once per machine"):
        binary, symbol = torch.cuda._utils._nvrtc_compile(source, name, f"{major}{minor}", None, options)
    kernel = _load(binary, symbol)
    _write(path, binary, symbol)
    return kernel


def _load(binary: bytes, symbol: str) -> Any:
    return torch.cuda._utils._cuda_load_module(binary, [symbol])[symbol]


def _read(path: Path) -> tuple[bytes, str] | None:
    """(binary, symbol) of a file: the symbol's name is its first line."""
    try:
        symbol, _, binary = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return (binary, symbol.decode(errors="replace")) if binary else None


def _write(path: Path, binary: bytes, symbol: str) -> None:
    """Write the whole file or none. If the folder cannot be written to, the next process builds again."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(symbol.encode() + b"\n" + binary)
        os.replace(scratch, path)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
