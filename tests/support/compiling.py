"""Compiles Triton kernels for any GPU, without one: `python -m tests.support.compiling CAPABILITY`.

Layers of several presets run on CPU tensors. Every launch is replaced by a compilation, so the results are nonsense,
and only the compiler's errors count. Prints each kernel's name and how often it was compiled, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.support.profiles import random_maps
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import load_preset
from turboquant_hf.kernels import dispatch
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.quantizers.profiled import profiled

LAYERS = (("k4v4-scalar", 128, torch.bfloat16), ("k2v2-scalar", 64, torch.float16), ("k3v3", 64, torch.float16))


class CompilerOnly:
    """A Triton driver without a device."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


PROFILED = (("k4v4", 128, torch.bfloat16), ("k3v3", 256, torch.bfloat16))
"""Layers with the maps of a profile: matrices that are no rotations."""


def growing(preset: str, dim: int, dtype: torch.dtype, maps: tuple | None = None) -> None:
    """Run a growing cache: prefill, statistics, encoding, decoding, attention, and a recorded step."""
    preset = load_preset(preset, min_statistics=128, recent_window=0)
    sides = preset.layer_quantizers(0, 1)
    layer = TurboQuantLayer(preset, *(profiled(*sides, maps) if maps else sides), returns_handles=lambda: True)
    x = torch.randn(2, 2, 300, dim, dtype=dtype)
    layer.update(x, x)
    layer.observe(torch.randn(2, 4, 300, dim, dtype=dtype))
    layer.commit()
    layer.dense("keys"), layer.dense("values")
    raw = [RawTokens(*arrays) for arrays in (layer.sinks.arrays, layer.tail.view())]
    for queries in (1, 5):
        query = torch.randn(2, 4, queries, dim, dtype=dtype)
        history = History(*layer.packed_sides(), *raw, layer.sinks.starts)
        dispatch.decode_attention(query, history, Scoring(0.125))
    young = TurboQuantLayer(preset, *preset.layer_quantizers(0, 1), returns_handles=lambda: True)
    young.update(x[:, :, :40], x[:, :, :40])
    young.fix(1, 1, {})
    young.fixed.append(x[:, :, :1], x[:, :, :1])
    young.fixed.observe(query[:, :, :1])


def main(capability: int) -> None:
    compiled: Counter[str] = Counter()
    run, known = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup=False, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in known:
            known.add(kernel.hash)
            compiled[self.__name__] += bool(kernel.asm["cubin"])
        return kernel

    driver.set_active(CompilerOnly(capability))
    JITFunction.run = compile_only
    dispatch.backend = lambda device=None: "triton"
    torch.empty, torch.empty_like = (
        torch.zeros,
        torch.zeros_like,
    )  # an array that no kernel writes may be used as an index
    for layer in LAYERS:
        growing(*layer)
    for preset, dim, dtype in PROFILED:
        growing(preset, dim, dtype, (random_maps(2, dim), random_maps(2, dim)))
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(int(sys.argv[1]))
