"""Whether the logits of a decode step are right, so that its speed counts."""

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
"""Relative error of the logits up to which a speed always counts: what roundings of the dtype make of eight layers."""
NOISE_FACTOR = 2
"""A larger error counts up to so many times the noise of the cell: random weights alone may round to the bound."""


@dataclass(frozen=True)
class Reference:
    """What caches are checked against.

    Attributes:
        logits: of one step, [B, vocabulary] float32.
        noise: relative error between that step and another correct one in the same dtype, see `rounding_noise`.
    """

    logits: torch.Tensor
    noise: float


def check(
    model: PreTrainedModel, stepper: Stepper, cache, candidate: Candidate, batch: int, baseline: dict[str, Reference]
) -> dict[str, Any]:
    """The numerical check of one cache: its error, what it is an error from, and a reason where it is too large.

    A packed cache is compared with itself read densely through SDPA, another 16-bit cache with DynamicCache; of a
    cache that quantizes in its own way only the distance from DynamicCache is known. The cache is one step further
    afterwards.
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
    """The bound on an error, and a reason where it is above: `ERROR_BOUNDS`, or `NOISE_FACTOR` times the noise.

    Noise counts up to the fixed bound: what is larger is no rounding.
    """
    fixed = ERROR_BOUNDS[dtype]
    bound = max(fixed, NOISE_FACTOR * min(noise, fixed))
    if error <= bound:
        return {"bound": bound}
    return {"bound": bound, "reason": f"relative error {error:.1e} above {bound:.1e} (noise {noise:.1e})"}


def rounding_noise(stepper: Stepper, cache, ids: torch.Tensor, logits: torch.Tensor) -> float:
    """Relative error of `logits`, those of a cache's newest step by SDPA, from the same step by another SDPA backend.

    The math backend computes in float32: both are correct, and differ by roundings of the dtype. Where it has no
    memory the memory-efficient one takes its place. 0 where neither can, or where the logits are not finite. The cache
    ends with that step, as it came.
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
    """Take steps until the next one encodes no tile: dense and packed reads then see the same bytes."""
    layer = cache.packed_layers[0]
    while layer.tail.count + 1 - layer.preset.recent_window >= layer.preset.tile:
        stepper.step(cache, ids)
