"""Lists the Triton kernels of this package."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from typing import Any

from turboquant_hf import kernels


def kernels_by_name() -> dict[str, Any]:
    """{name: kernel} of all launched kernels in the modules of `turboquant_hf.kernels`."""
    from triton.runtime.jit import KernelInterface

    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    members = [inspect.getmembers(import_module(module.name)) for module in found]
    members = [member for module in members for member in module]
    return {name: x for name, x in members if name.endswith("_kernel") and isinstance(x, KernelInterface)}
