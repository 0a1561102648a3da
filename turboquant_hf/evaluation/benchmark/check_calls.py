"""Checks the logits of a call of generate, so that the times of wrong calls are not reported."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from turboquant_hf import restore_attention
from turboquant_hf.evaluation.benchmark.calls import Call, Variant
from turboquant_hf.evaluation.benchmark.check import ERROR_BOUNDS, Reference, judge, rounding_noise
from turboquant_hf.evaluation.benchmark.steps import Stepper
from turboquant_hf.evaluation.benchmark.timing import relative_error

QUANTIZED = 0.3
"""The relative distance from DynamicCache's logits that quantizing may cause. Unrelated logits have 1.4."""


def check_call(
    model: Any, made: Call, newest: int, variant: Variant, preset: str | None, baseline: dict[str, Reference]
) -> dict[str, Any]:
    """Check a call: its error, what it was compared with, and a reason if the error is too large.

    - The first call with a preset is compared with its own cache, read densely through SDPA. If the newest token cannot
      be taken back, it is compared with DynamicCache, within `QUANTIZED`.
    - Further calls with the preset (graphs on and off, fixed size) are compared with the first call.
    - 16-bit caches are compared with DynamicCache.

    The cache keeps its length.

    Args:
        newest: the token of the last step.
        baseline: the logits with which later calls of the cell are compared. Filled here.
    """
    logits = torch.stack(made.logits)
    if not logits.isfinite().all():
        return {"error": None, "reason": "the logits are not finite"}
    found: dict[str, Any] = {}
    key = "dynamic" if preset is None else f"preset {preset}"
    if preset is not None and "dynamic" in baseline:
        found["distance_from_fp16"] = _error(logits, baseline["dynamic"].logits)
    if variant.name == "DynamicCache":
        baseline[key] = Reference(logits, _noise(model, made, newest, logits[-1]))
        found["check"] = "the baseline itself"
    elif key not in baseline and variant.packed and variant.continues and _can_repeat(model, made):
        exact = _dense(model, made, newest)
        baseline[key] = Reference(exact[None], _noise(model, made, newest, exact))
        found["check"] = "the same cache read densely"
    elif key not in baseline and "distance_from_fp16" in found:
        baseline[key] = Reference(logits, ERROR_BOUNDS[model.dtype])
        found |= {"check": "DynamicCache, within what quantizing may cause", "error": found["distance_from_fp16"]}
        return found | _judge_quantized(found["error"])
    else:
        found["check"] = "DynamicCache" if preset is None else "the first cache of the preset"
    if key not in baseline:
        return {**found, "error": None, "reason": f"nothing to check against: {found['check']} was not measured"}
    found |= {"error": _error(logits, baseline[key].logits), "noise": baseline[key].noise}
    return found | judge(found["error"], found["noise"], model.dtype)


def check_first(
    model: Any, first: torch.Tensor, exact: torch.Tensor | None, lossless: torch.Tensor | None = None
) -> dict[str, Any]:
    """Check a prompt's logits [B, vocabulary] against those of DynamicCache, which reads the prompt in one piece.

    lossless: logits of the same pieces with the preset "lossless", if later pieces have read packed tokens. These are
        checked instead, because quantizing moves the logits of random weights even if the code is right.
    """
    if exact is None:
        return {"error": None, "reason": "nothing to check against: DynamicCache was not measured"}
    found: dict[str, Any] = {"check": "DynamicCache, the prompt in one piece"}
    if lossless is not None:
        found = {"check": f"preset lossless in the same pieces, by {found['check']}"}
        found["distance_from_fp16"] = relative_error(first, exact)
        first = lossless
    error, bound = relative_error(first, exact), ERROR_BOUNDS[model.dtype]
    return {**found, "error": error, **judge(error, bound, model.dtype)}


def _judge_quantized(error: float) -> dict[str, Any]:
    if error <= QUANTIZED:
        return {"bound": QUANTIZED}
    return {"bound": QUANTIZED, "reason": f"relative error {error:.1e} above {QUANTIZED}"}


def _error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Median over the last steps of the relative error between two [steps, B, vocabulary]."""
    count = min(len(logits), len(exact))
    return statistics.median(relative_error(a, b) for a, b in zip(logits[-count:], exact[-count:], strict=True))


def _can_repeat(model: Any, made: Call) -> bool:
    """Whether the last step can be taken back and computed by SDPA."""
    slides = any(getattr(layer, "is_sliding", False) for layer in made.cache.layers)
    return not slides and model.get_correct_attn_implementation(None) == "sdpa"


def _dense(model: Any, made: Call, newest: int) -> torch.Tensor:
    """Logits [B, vocabulary] of the last step over the same cache, read as dense tensors through SDPA."""
    made.cache.crop(-1)
    restore_attention(model)
    return Stepper(model, False).step(made.cache, _ids(made, newest)).float().clone()


def _ids(made: Call, newest: int) -> torch.Tensor:
    return torch.full_like(made.sequences[:, :1], newest)


def _noise(model: Any, made: Call, newest: int, logits: torch.Tensor) -> float:
    """Relative error between two correct computations of the last step; the dtype's bound if there is only one."""
    if not _can_repeat(model, made):
        return ERROR_BOUNDS[model.dtype]
    restore_attention(model)
    return rounding_noise(Stepper(model, False), made.cache, _ids(made, newest), logits)
