"""Generate level: whole calls of `model.generate` with all layers of a model, one cache beside another."""

from __future__ import annotations

import statistics
from contextlib import suppress
from typing import Any

import torch

from turboquant_hf.evaluation.benchmark.caches import held_nbytes
from turboquant_hf.evaluation.benchmark.calls import (
    VARIANTS,
    Call,
    Variant,
    answer,
    attention,
    call,
    random_prompt,
    undo,
)
from turboquant_hf.evaluation.benchmark.check import Reference
from turboquant_hf.evaluation.benchmark.check_calls import check_call, check_first
from turboquant_hf.evaluation.benchmark.model import CLOSE, build_model, read_nbytes
from turboquant_hf.evaluation.benchmark.rows import Recorder
from turboquant_hf.evaluation.benchmark.settings import Group
from turboquant_hf.evaluation.benchmark.steps import without_cudnn
from turboquant_hf.generation.recorders import RECORDERS

WARMUP = {"cuda": 8, "cpu": 1}
"""Steps of a call before the timed steps."""
TURN, ROUNDS = 16, 5
"""Timed steps per turn, and turns per cache."""
CALLS = 10
"""The number of calls with prompts of different lengths, and of calls with equal lengths."""
SHORT = 16
"""Tokens that each of these calls generates."""
CHUNK_ROUNDS = 2


def variants(group: Group, cell: tuple[int, int], compiles: bool = True) -> list[tuple[Variant, str | None]]:
    """(variant, preset) of a cell, in the order of `VARIANTS`. Compiled caches only in cells that the group names.

    Raises: ValueError for an unknown variant.
    """
    for name in group.caches:
        if name not in VARIANTS:
            raise ValueError(f"caches={name!r} is not supported; allowed: {', '.join(VARIANTS)}")
    names = [*group.caches, *(["compiled"] if cell in group.static_cells else [])]
    chosen = [VARIANTS[name] for name in VARIANTS if name in names]
    found: list[tuple[Variant, str | None]] = []
    for variant in chosen:
        if compiles or not variant.compiled:
            found += [(variant, preset) for preset in (group.presets if variant.packed else (None,))]
    return found


def run_group(
    group: Group, device: torch.device, bandwidth: float, steps: int, compiles: bool, recorder: Recorder
) -> None:
    """Measure every cell of a group."""
    run = {"calls": run_calls, "lengths": run_lengths, "chunks": run_chunks}[group.what]
    model = None
    for batch, tokens in group.cells:
        common = {
            "level": "generate", "what": group.what, "shape": group.shape.name, "dtype": group.dtype,
            "layers": group.layers, "batch": batch, "tokens": tokens, "steps": steps,
        }  # fmt: skip
        with recorder.cell(common) as wanted:
            if wanted:
                with without_cudnn():
                    if model is None:
                        model = build_model(group, device)
                        warm_up(model, group)
                    run(model, group, (batch, tokens), bandwidth, steps, compiles, common, recorder)


def warm_up(model: Any, group: Group) -> None:
    """Load the libraries and kernels that the first calls of a process load."""
    ids = random_prompt(1, 1024, group.shape.vocab, model.device)
    for variant, preset in variants(group, (0, 0)):
        call(model, ids, ids[0, :SHORT], 1, **variant.arguments(preset))
        undo(model)


def run_calls(
    model: Any, group: Group, cell: tuple[int, int], bandwidth: float, steps: int, compiles: bool,
    common: dict[str, Any], recorder: Recorder,
) -> None:  # fmt: skip
    """Make a call with each cache, then further calls in turns, which give the ratios."""
    batch, tokens = cell
    warmup = WARMUP[model.device.type]
    ids = random_prompt(batch, tokens, group.shape.vocab, model.device)
    new = answer(tokens, 1 + warmup + steps, group.presets, group.shape.vocab, model.device)
    weights = read_nbytes(model)
    baseline: dict[str, Reference] = {}
    kept: list[tuple[dict[str, Any], Variant, Call]] = []
    rows = []
    for variant, preset in variants(group, cell, compiles):
        row = {**common, "cache": variant.name, "preset": preset, "mode": "compiled" if variant.compiled else "eager"}
        with recorder.guard(row):
            made = call(model, ids, new, warmup, **variant.arguments(preset))
            row |= {"first_token_s": made.first_s, "held_bytes": made.held_bytes, "peak_bytes": made.peak_bytes}
            read = held_nbytes(made.cache) + weights
            row |= {"bytes": read, "floor_ms": 1e3 * read / bandwidth}
            row |= check_call(model, made, int(new[-2]), variant, preset, baseline)
            if variant.records and model.device.type in RECORDERS and not made.recorded:
                row.setdefault("reason", "its steps were not recorded")
            row["ms"] = None if row.get("reason") else made.ms
            rows.append(row)
            if variant.continues and row["ms"] is not None:
                kept.append((row, variant, made))
            recorder.add(row)
            made = None
        undo(model)
    with suppress(torch.OutOfMemoryError):  # the times of the single calls are kept then
        take_turns(model, kept, new, min(steps, TURN))
    compare(rows)


def take_turns(model: Any, kept: list[tuple[dict, Variant, Call]], tokens: torch.Tensor, steps: int) -> None:
    """Make further calls in turns over the caches of finished calls: medians of the times and of each round's ratios.

    On a GPU, DynamicCache takes two turns, with cuDNN's attention and without. The faster one counts. The turn with
    cuDNN is dropped if its first round is far slower, because cuDNN may plan again at every length.
    """
    warmup = WARMUP[model.device.type]
    turns = [(row, variant, made, False) for row, variant, made in kept]
    if model.device.type == "cuda":
        turns += [(row, variant, made, True) for row, variant, made in kept if variant.name == "DynamicCache"]
    taken: list[list[float]] = [[] for _ in turns]
    for turn in range(ROUNDS):
        for times, (row, variant, made, cudnn) in zip(taken, turns, strict=True):
            if cudnn and turn and times[0] > CLOSE * row["first_round"]:
                continue
            with attention(model, variant):
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
                try:
                    further = call(model, made.sequences, tokens[: 1 + warmup + steps], warmup, made.cache)
                finally:
                    torch.backends.cuda.enable_cudnn_sdp(False)
            made.sequences = further.sequences
            times.append(further.ms)
            row.setdefault("first_round", further.ms)
    own: dict[int, list[list[float]]] = {}
    for times, (row, *_) in zip(taken, turns, strict=True):
        row.pop("first_round", None)
        if len(times) == ROUNDS:
            own.setdefault(id(row), []).append(times)
    best = {key: min(lists, key=statistics.median) for key, lists in own.items()}
    for row, _, _ in kept:
        times = best[id(row)]
        row["ms"] = statistics.median(times)
        for key, other in (("speedup", _rival(kept, "DynamicCache")), ("speedup_to_eager", _eager(kept, row))):
            if other is not None:
                pairs = zip(best[id(other)], times, strict=True)
                row |= {key: statistics.median(a / b for a, b in pairs), "in_turns": True}


def _rival(kept: list[tuple[dict, Variant, Call]], name: str) -> dict | None:
    return next((row for row, variant, _ in kept if variant.name == name), None)


def _eager(kept: list[tuple[dict, Variant, Call]], own: dict) -> dict | None:
    """The row of the same preset without graphs."""
    name = VARIANTS["eager"].name
    return next((row for row, _, _ in kept if row["cache"] == name and row["preset"] == own["preset"]), None)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add the ratios to the floor, and to DynamicCache's row where turns gave none."""
    dynamic = next((row for row in rows if row["cache"] == "DynamicCache"), {})
    for row in rows:
        if dynamic.get("held_bytes") and row.get("held_bytes"):
            row["memory_saved"] = dynamic["held_bytes"] / row["held_bytes"]
        if row.get("ms") is None:
            continue
        if "speedup" not in row and dynamic.get("ms") is not None:
            row["speedup"] = dynamic["ms"] / row["ms"]
        row["ratio_to_floor"] = row["ms"] / row["floor_ms"]


def run_lengths(
    model: Any, group: Group, cell: tuple[int, int], bandwidth: float, steps: int, compiles: bool,
    common: dict[str, Any], recorder: Recorder,
) -> None:  # fmt: skip
    """Ten calls with prompts of ten lengths, in turns with ten calls of the mean length: the cost of a new length."""
    batch, tokens = cell
    new = answer(tokens, SHORT, group.presets, group.shape.vocab, model.device)
    equal = random_prompt(batch, tokens, group.shape.vocab, model.device)
    lengths = [tokens + 26 * (i - CALLS // 2) + 13 for i in range(CALLS)]
    baseline: dict[str, Reference] = {}
    for variant, preset in variants(group, cell, compiles):
        row = {**common, "cache": variant.name, "preset": preset}
        with recorder.guard(row):
            arguments = variant.arguments(preset)
            made = call(model, equal, new, 1, **arguments)
            row |= check_call(model, made, int(new[-2]), variant, preset, baseline)
            made = None
            if not row.get("reason"):
                total = {"different": 0.0, "equal": 0.0}
                for length in lengths:
                    other = random_prompt(batch, length, group.shape.vocab, model.device)
                    for name, ids in (("different", other), ("equal", equal)):
                        undo(model)
                        total[name] += call(model, ids, new, 1, **arguments).total_s / CALLS
                row |= {"call_s": total["equal"], "overhead_s": total["different"] - total["equal"]}
            recorder.add(row)
        undo(model)


def run_chunks(
    model: Any, group: Group, cell: tuple[int, int], bandwidth: float, steps: int, compiles: bool,
    common: dict[str, Any], recorder: Recorder,
) -> None:  # fmt: skip
    """Seconds until the first token of a prompt, in pieces of `group.chunk` tokens and at once, in turns."""
    batch, tokens = cell
    ids = random_prompt(batch, tokens, group.shape.vocab, model.device)
    new = answer(tokens, 3, group.presets, group.shape.vocab, model.device)
    measured: list[tuple[dict[str, Any], dict[str, Any]]] = []
    exact: torch.Tensor | None = None
    for variant, preset in variants(group, cell, compiles):
        for chunk in (None, group.chunk):
            row = {**common, "cache": variant.name, "preset": preset, "chunk": chunk}
            arguments = variant.arguments(preset) | ({"prefill_chunk_size": chunk} if chunk else {})
            with recorder.guard(row):
                warm = ids[:, : min(tokens, 2 * group.chunk)]
                call(model, warm, new, 1, **arguments)
                undo(model)
                made = call(model, ids, new, 1, **arguments)
                exact = made.first if exact is None and not variant.packed else exact
                lossless = None
                if variant.packed and chunk:
                    undo(model)
                    lossless = call(model, ids, new, 1, **{**arguments, **variant.arguments("lossless")}).first
                row |= check_first(model, made.first, exact, lossless)
                row |= {"held_bytes": made.held_bytes, "peak_bytes": made.peak_bytes, "all_s": [made.first_s]}
                made = None
                measured.append((row, arguments))
                recorder.add(row)
            undo(model)
    for _ in range(CHUNK_ROUNDS - 1):
        for row, arguments in measured:
            row["all_s"].append(call(model, ids, new, 1, **arguments).first_s)
            undo(model)
    compare_chunks([row for row, _ in measured])


def compare_chunks(rows: list[dict[str, Any]]) -> None:
    """Add the ratios of rows that passed their check: to DynamicCache in the same pieces, and to one piece."""
    for row in rows:
        times = row.pop("all_s")
        if not row.get("reason"):
            row["first_token_s"] = statistics.median(times)
    for row in rows:
        dynamic = [r for r in rows if r["cache"] == "DynamicCache" and r["chunk"] == row["chunk"]]
        whole = [r for r in rows if all(r[key] == row[key] for key in ("cache", "preset")) and r["chunk"] is None]
        for key, others in (("prefill_speedup", dynamic), ("ratio_to_whole", whole if row["chunk"] else [])):
            if others and others[0].get("first_token_s") and row.get("first_token_s"):
                pair = others[0]["first_token_s"], row["first_token_s"]
                row[key] = pair[0] / pair[1] if key == "prefill_speedup" else pair[1] / pair[0]
