"""Model level: decode steps of a randomly initialised model, one cache after another."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from turboquant_hf.evaluation.benchmark.caches import (
    Candidate,
    candidates,
    fill,
    held_nbytes,
    resident_nbytes,
)
from turboquant_hf.evaluation.benchmark.check import Reference, check
from turboquant_hf.evaluation.benchmark.rows import Recorder
from turboquant_hf.evaluation.benchmark.settings import Group, Shape
from turboquant_hf.evaluation.benchmark.steps import SPARE, Stepper, without_cudnn
from turboquant_hf.evaluation.benchmark.turns import time_in_turns

SIXTEEN_BIT = ("DynamicCache", "StaticCache")
CLOSE = 1.5
"""A cache that is this many times slower than another, each timed alone, is not timed in turns."""


def model_config(shape: Shape, layers: int, tokens: int) -> PreTrainedConfig:
    """A configuration of these sizes for `tokens` positions and some more; Llama's is read by SDPA."""
    config = AutoConfig.for_model(
        shape.family,
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
        **shape.options,
    )
    if shape.family == "llama":  # other families may need an attention that SDPA lacks, so their models choose
        config._attn_implementation = "sdpa"
    return config


ROUTER = 16.0
"""Factor of random router weights. If rounding exchanges an expert for another, the expert then has little weight."""


def build_model(group: Group, device: torch.device) -> PreTrainedModel:
    """A model of the group's shape with random weights."""
    torch.manual_seed(0)
    config = model_config(group.shape, group.layers, max(tokens for _, tokens in group.cells))
    before = torch.get_default_dtype()
    torch.set_default_dtype(group.torch_dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    for name, weight in model.named_parameters():
        if name.endswith((".router.weight", ".gate.weight")):
            weight.data *= ROUTER
    return model


def read_nbytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step of one sequence reads: only the chosen experts, and no embedding table."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is table
    picked = getattr(model.config, "num_experts_per_tok", None), getattr(model.config, "num_local_experts", None)
    total = 0.0 if tied else -float(table.numel() * table.itemsize)
    for name, weight in model.named_parameters():
        share = picked[0] / picked[1] if ".experts." in name and all(picked) else 1
        total += weight.numel() * weight.itemsize * share
    return round(total)


def run_group(group: Group, device: torch.device, bandwidth: float, steps: int, recorder: Recorder) -> None:
    """Measure every cell, one row per cache. Ratios are to the fastest 16-bit cache of the cell."""
    with torch.no_grad(), without_cudnn():
        model = build_model(group, device)
        read = read_nbytes(model)
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
    model: PreTrainedModel,
    group: Group,
    cell: tuple[int, int],
    measured: list[tuple[dict[str, Any], Candidate]],
    steps: int,
) -> None:
    """Replace the ratios of eager packed caches by those of turns with the fastest 16-bit caches."""
    eager = [(row, candidate) for row, candidate in measured if not candidate.compiled and row.get("ms") is not None]
    plain = {row["ms"]: candidate for row, candidate in eager if row["cache"] in SIXTEEN_BIT}
    others = [candidate for ms, candidate in plain.items() if ms <= CLOSE * min(plain)]
    for row, candidate in eager:
        if candidate.reads_packed and others:
            with suppress(torch.OutOfMemoryError):  # all caches at once may not fit
                ratio = time_in_turns(model, group, cell, candidate, others, steps)
                row |= {"ratio_to_fp16": ratio, "speedup": 1 / ratio, "in_turns": True}
            Recorder.release()


def run_cache(
    model: PreTrainedModel,
    candidate: Candidate,
    group: Group,
    cell: tuple[int, int],
    steps: int,
    row: dict[str, Any],
    bandwidth: float,
    baseline: dict[str, Reference],
    recorder: Recorder,
) -> dict[str, Any]:
    """Fill a cache, check it, and time its steps. `baseline` keeps the logits for the checks of the next caches."""
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


def compare(rows: list[dict[str, Any]]) -> None:
    """Add the ratios of times (below 1: faster) to the best 16-bit cache, of the same mode and of any mode."""
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
