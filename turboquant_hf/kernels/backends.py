"""Which backend serves tensors on a device: plain torch, Triton or CUDA C++.

TURBOQUANT_BACKEND = auto | torch | triton | cuda decides for the process; auto takes the fastest that supports the
call. Neither Triton nor a compiler is imported before the first call that needs it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = ("auto", "torch", "triton", "cuda")
VARIABLE = "TURBOQUANT_BACKEND"
MIN_TRITON = (3, 4)


def backend(device: torch.device | str | None = None) -> str:
    """The backend for tensors on `device` (default: a CUDA device where there is one): "torch", "triton" or "cuda".

    Raises: ValueError for an unknown name in TURBOQUANT_BACKEND; RuntimeError, with the reason, where the named
        backend is not available.
    """
    name = os.environ.get(VARIABLE, "auto").lower()
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE}={name!r} is not supported; allowed: {', '.join(BACKENDS)}")
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "torch" or (name == "auto" and kind != "cuda"):
        return "torch"
    if name == "auto":
        return "torch" if unavailable("triton", kind) else "triton"
    reason = unavailable(name, kind)
    if reason:
        raise RuntimeError(f"{VARIABLE}={name}: {reason}")
    return name


def unavailable(name: str, kind: str) -> str | None:
    """Why backend "triton" or "cuda" cannot serve tensors on a device of this kind, or None where it can."""
    if name == "triton":
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"tensors are on {kind!r}, and Triton kernels run on a CPU only with TRITON_INTERPRET=1"
        return _triton_missing()
    if kind != "cuda":
        return f"tensors are on {kind!r}; allowed: 'cuda'"
    return cuda_module()[1]


@lru_cache(maxsize=1)
def _triton_missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is too old; allowed: {'.'.join(map(str, MIN_TRITON))} and later"
    return None


@lru_cache(maxsize=1)
def cuda_module() -> tuple[ModuleType | None, str | None]:
    """The CUDA C++ decode kernels, or why there are none."""
    name = "turboquant_hf.kernels.decode.cuda"
    if find_spec(name) is None:
        return None, "this build has no CUDA C++ kernels"
    try:
        module = import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the CUDA C++ kernels cannot be loaded ({error})"
    reason = module.available()
    return (module, None) if reason is None else (None, reason)


def on_device(device: torch.device) -> AbstractContextManager:
    """Make a CUDA device the current one. Kernels are launched on the current device, wherever their tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def is_automatic() -> bool:
    """Whether TURBOQUANT_BACKEND leaves the choice to this package."""
    return os.environ.get(VARIABLE, "auto").lower() == "auto"
