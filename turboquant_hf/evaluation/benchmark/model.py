"""Whole-model level: decode steps of a randomly initialised model, one cache after another."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.evaluation.benchmark.caches import (
    Candidate,
    candidates,
    fill,
    held_nbytes,
    resident_nbytes,
)
from turboquant_hf.evaluation.benchmark.rows import Recorder
from turboquant_hf.evaluation.benchmark.settings import Group, Shape
from turboquant_hf.evaluation.benchmark.steps import SPARE, Stepper, without_cudnn
from turboquant_hf.evaluation.benchmark.timing import relative_error
from turboquant_hf.evaluation.benchmark.turns import time_in_turns

ERROR_BOUNDS = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float32: 1e-3}
"""Relative error of the logits up to which a speed always counts: what roundings of the dtype make of eight layers."""
NOISE_FACTOR = 2
"""A larger error counts up to so many times the noise of the cell: random weights alone may round to the bound."""
SIXTEEN_BIT = ("DynamicCache", "StaticCache")
CLOSE = 1.5
"""A cache this many times slower than another, each timed alone, is not worth timing in turns."""


@dataclass(frozen=True)
class Reference:
    """What caches are checked against.

    Attributes:
        logits: of one step, [B, vocabulary] float32.
        noise: relative error between that step and another correct one in the same dtype, see `rounding_noise`.
    """

    logits: torch.Tensor
    noise: float


def model_config(shape: Shape, layers: int, tokens: int) -> LlamaConfig:
    """A Llama configuration of these sizes for `tokens` positions and some more, read by SDPA."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=tokens + 4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = "sdpa"
    return config


def build_model(group: Group, device: torch.device) -> LlamaForCausalLM:
    """Random weights of the group's shape."""
    torch.manual_seed(0)
    config = model_config(group.shape, group.layers, max(tokens for _, tokens in group.cells))
    before = torch.get_default_dtype()
    torch.set_default_dtype(group.torch_dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def run_group(group: Group, device: torch.device, bandwidth: float, steps: int, recorder: Recorder) -> None:
    """Rows of every cell, one a cache; ratios are to the fastest 16-bit cache of the cell."""
    with torch.no_grad(), without_cudnn():
        model = build_model(group, device)
        read = sum(p.numel() * p.itemsize for p in model.parameters())
        read -= model.get_input_embeddings().weight.numel() * group.torch_dtype.itemsize
        for batch, tokens in group.cells:
            common = {
                "level": "model", "shape": group.shape.name, "dtype": group.dtype, "layers": group.layers,
                "batch": batch, "tokens": tokens, "weight_bytes": read,
            }  # fmt: skip
            baseline: dict[str, Reference] = {}
            measured: list[tuple[dict[str, Any], Candidate]] = []
            for candidate in candidates(group, (batch, tokens)):
                row = {**common, "cache": candidate.name, "preset": candidate.preset, "mode": candidate.mode}
                with recorder.guard(row):
                    row = run_cache(model, candidate, group, (batch, tokens), steps, row, bandwidth, baseline, recorder)
                    measured.append((row, candidate))
            compare([row for row, _ in measured])
            add_turns(model, group, (batch, tokens), measured, steps)


def add_turns(
    model: LlamaForCausalLM,
    group: Group,
    cell: tuple[int, int],
    measured: list[tuple[dict[str, Any], Candidate]],
    steps: int,
) -> None:
    """Ratios anew for eager packed caches, timed in turns with the 16-bit caches that may be the fastest."""
    eager = [(row, candidate) for row, candidate in measured if not candidate.compiled and row.get("ms") is not None]
    plain = {row["ms"]: candidate for row, candidate in eager if row["cache"] in SIXTEEN_BIT}
    others = [candidate for ms, candidate in plain.items() if ms <= CLOSE * min(plain)]
    for row, candidate in eager:
        if candidate.reads_packed and others:
            with suppress(torch.OutOfMemoryError):  # all of them at once may be too much
                ratio = time_in_turns(model, group, cell, candidate, others, steps)
                row |= {"ratio_to_fp16": ratio, "speedup": 1 / ratio, "in_turns": True}
            Recorder.release()


def run_cache(
    model: LlamaForCausalLM,
    candidate: Candidate,
    group: Group,
    cell: tuple[int, int],
    steps: int,
    row: dict[str, Any],
    bandwidth: float,
    baseline: dict[str, Reference],
    recorder: Recorder,
) -> dict[str, Any]:
    """Fill a cache, check it, time its steps; `baseline` keeps what the cell's next caches are checked against."""
    batch, tokens = cell
    device = model.device
    stepper = Stepper(model, candidate.compiled)
    try:
        model.set_attn_implementation(candidate.attention)
        before = resident_nbytes(device)
        cache = candidate.make(model.config, tokens + steps + stepper.warmup + SPARE)
        fill(cache, group, batch, tokens, device, candidate.attention)
        resident = resident_nbytes(device) - before if device.type == "cuda" else held_nbytes(cache)
        held = held_nbytes(cache)
        row = {
            **row, "resident_bytes": resident, "bytes": held, "floor_ms": 1e3 * (held + row["weight_bytes"]) / bandwidth
        }  # fmt: skip
        row |= check(model, stepper, cache, candidate, batch, baseline)
        if row.get("reason"):
            return recorder.add({**row, "ms": None})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        row |= stepper.time(cache, batch, steps)
        if device.type == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        moved = row["bytes"] + row["weight_bytes"]
        row |= {"gbps": moved / row["ms"] / 1e6, "copy_share": 1e3 * moved / row["ms"] / bandwidth}
        return recorder.add(row)
    finally:
        stepper.close()
        model.set_attn_implementation("sdpa")


def check(
    model: LlamaForCausalLM, stepper: Stepper, cache, candidate: Candidate, batch: int, baseline: dict[str, Reference]
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
    """The bound on an error, and a reason where it is above: `ERROR_BOUNDS`, or `NOISE_FACTOR` times larger noise."""
    bound = max(ERROR_BOUNDS[dtype], NOISE_FACTOR * noise)
    if error <= bound:
        return {"bound": bound}
    return {"bound": bound, "reason": f"relative error {error:.1e} above {bound:.1e} (noise {noise:.1e})"}


def rounding_noise(stepper: Stepper, cache, ids: torch.Tensor, logits: torch.Tensor) -> float:
    """Relative error of `logits`, those of a cache's newest step by SDPA, from the same step by SDPA's math backend.

    The math backend computes in float32: both are correct, and differ by roundings of the dtype. 0 where it has no
    memory or its logits are not finite. The cache ends with that step, as it came.
    """
    lengths = [layer.get_seq_length() for layer in cache.layers]
    cache.crop(-1)
    with suppress(torch.OutOfMemoryError), sdpa_kernel(SDPBackend.MATH):
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


def compare(rows: list[dict[str, Any]]) -> None:
    """Ratios of times (below 1: faster) to the best 16-bit cache, of the same mode and of any."""
    timed = [row for row in rows if row.get("ms") is not None]
    for row in timed:
        fp16 = [r for r in timed if r["cache"] in SIXTEEN_BIT]
        same = [r["ms"] for r in fp16 if r["mode"] == row["mode"]]
        if same:
            row["ratio_to_fp16"] = row["ms"] / min(same)
            row["speedup"] = min(same) / row["ms"]
        if fp16:
            row["ratio_to_best_fp16"] = row["ms"] / min(r["ms"] for r in fp16)
        dynamic = next((r for r in rows if r["cache"] == "DynamicCache" and r.get("resident_bytes")), None)
        if dynamic and row.get("resident_bytes"):
            row["memory_saved"] = dynamic["resident_bytes"] / row["resident_bytes"]
