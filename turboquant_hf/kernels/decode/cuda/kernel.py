"""The compiled kernel of a `Shape`, or the reason why there is none."""

from __future__ import annotations

import warnings

import torch

from turboquant_hf.kernels.decode.cuda import geometry
from turboquant_hf.kernels.decode.cuda.built import load_kernel
from turboquant_hf.kernels.decode.cuda.driver import Launcher
from turboquant_hf.kernels.decode.cuda.source import Shape, shared_bytes, source_text
from turboquant_hf.primitives.memo import once

COMPILER_OPTIONS = ["--std=c++20", "--use_fast_math", "-default-device"]


@once(maxsize=256)
def failure(shape: Shape, device: torch.device) -> str | None:
    """Why there is no kernel of this shape, or None. A compiler or driver that failed once is not asked again."""
    if not geometry.warps(shape, device):
        return "too little shared memory for two tiles"
    try:
        load(shape, device)
    except (AttributeError, OSError, RuntimeError) as error:
        warnings.warn(f"the CUDA C++ decode kernel cannot be compiled ({error}); Triton serves", stacklevel=2)
        return f"it cannot be compiled ({error})"
    return None


@once(maxsize=64)
def load(shape: Shape, device: torch.device) -> tuple[Launcher, int, int]:
    """(launcher, warps per block, teams per block)."""
    warps = geometry.warps(shape, device)
    text = source_text(shape, warps)
    with torch.cuda.device(device):
        kernel = load_kernel(text, "decode_attention", COMPILER_OPTIONS, "decode attention (CUDA C++)")
        shared = shared_bytes(shape, warps)
        if shared > 48 * 1024:
            kernel.set_shared_memory_config(shared)
        overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
    return Launcher(kernel, warps * 32, shared, overlaps), warps, warps // shape.team
