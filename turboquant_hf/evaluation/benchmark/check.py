"""Checks the logits of a decode step, so that the speed of wrong steps is not reported."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.evaluation.benchmark.caches import Candidate
from turboquant_hf.evaluation.benchmark.rows import Recorder
from turboquant_hf.evaluation.benchmark.steps import Stepper
from turboquant_hf.evaluation.benchmark.timing import relative_error

ERROR_BOUNDS = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 1e-3}
"""The relative error of the logits that is always accepted: the rounding errors of the dtype over eight layers."""
NOISE_FACTOR = 2
"""A larger error is accepted up to this factor times the noise of the cell, since random weights amplify roundings."""


@dataclass(frozen=True)
class Reference:
    """The logits against which caches are checked.

    Attributes:
        logits: logits of one step, [B, vocabulary] float32.
        noise: relative error between two correct computations of that step in the same dtype, see `rounding_noise`.
    """

    logits: torch.Tensor
    noise: float


def check(
    model: PreTrainedModel, stepper: Stepper, cache, candidate: Candidate, batch: int, baseline: dict[str, Reference]
) -> dict[str, Any]:
    """Check one cache: its error, what it was compared with, and a reason if the error is too large.

    - A packed cache is compared with itself, read densely through SDPA.
    - Another 16-bit cache is compared with DynamicCache.
    - A cache that quantizes in its own way is compared with DynamicCache, and no bound applies.

    The check takes one step of the cache.
    """
    ids, found = stepper.first_ids(batch), {}
    if candidate.reads_packed and not candidate.compiled:
        settle(stepper, cache, ids)
    logits = stepper.step(cache, ids).float().clone()
    if not logits.isfinite().all():
        return {"error": None, "reason": "the logits are not finite"}
    key = "dynamic" if candidate.preset is None else f"preset {candidate.preset}"
    if candidate.reads_packed and not candidate.compiled:
        cache.crop(-1)
        model.set_attn_implementation("sdpa")
        exact = stepper.step(cache, ids).float().clone()
        baseline[key] = Reference(exact, rounding_noise(stepper, cache, ids, exact))
        model.set_attn_implementation(candidate.attention)
        found["check"] = "the same cache read densely"
    elif candidate.name == "DynamicCache":
        baseline[key] = Reference(logits, rounding_noise(stepper, cache, ids, logits))
        found["check"] = "the baseline itself"
    else:
        found["check"] = "DynamicCache" if candidate.preset is None else "the packed cache read densely"
    if "dynamic" in baseline and candidate.preset is not None:
        found["distance_from_fp16"] = relative_error(logits, baseline["dynamic"].logits)
    if key not in baseline:
        return {**found, "error": None, "reason": f"nothing to check against: {found['check']} was not measured"}
    found |= {"error": relative_error(logits, baseline[key].logits), "noise": baseline[key].noise}
    return found if candidate.approximate else found | judge(found["error"], found["noise"], model.dtype)


def judge(error: float, noise: float, dtype: torch.dtype) -> dict[str, Any]:
    """The bound of an error, and a reason if the error is larger: `ERROR_BOUNDS`, or `NOISE_FACTOR` times the noise.

    Noise above the fixed bound is not counted, because it is more than rounding.
    """
    fixed = ERROR_BOUNDS[dtype]
    bound = max(fixed, NOISE_FACTOR * min(noise, fixed))
    if error <= bound:
        return {"bound": bound}
    return {"bound": bound, "reason": f"relative error {error:.1e} above {bound:.1e} (noise {noise:.1e})"}


def rounding_noise(stepper: Stepper, cache, ids: torch.Tensor, logits: torch.Tensor) -> float:
    """Relative difference between `logits`, a cache's newest step by SDPA, and the same step by another SDPA backend.

    Both are correct and differ by roundings of the dtype. The other backend is the math backend, which computes in
    float32, or the memory-efficient backend if there is not enough memory. The result is 0 if neither runs, or if the
    logits are not finite. The cache holds the same tokens afterwards.
    """
    lengths = [layer.get_seq_length() for layer in cache.layers]
    cache.crop(-1)
    for backend in (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION):
        with suppress(RuntimeError), sdpa_kernel(backend):  # out of memory, or no such kernel
            noise = relative_error(logits, stepper.step(cache, ids).float())
            return noise if math.isfinite(noise) else 0.0
        for layer, length in zip(cache.layers, lengths, strict=True):
            if layer.get_seq_length() == length:  # the step failed in this layer or in a later one
                layer.crop(-1)
        Recorder.release()
    stepper.step(cache, ids)
    return 0.0


def settle(stepper: Stepper, cache: TurboQuantCache, ids: torch.Tensor) -> None:
    """Take steps until the next step encodes no tile, so that dense and packed reads see the same bytes."""
    layer = cache.packed_layers[0]
    while layer.tail.count + 1 - layer.preset.recent_window >= layer.preset.tile:
        stepper.step(cache, ids)
