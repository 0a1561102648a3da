"""Capacity level: the bytes of a cache with a million tokens and more, and the time of a decode step over it."""

from __future__ import annotations

from typing import Any

import torch

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.evaluation.benchmark.caches import candidates, fill, held_nbytes
from turboquant_hf.evaluation.benchmark.calls import all_nbytes, now
from turboquant_hf.evaluation.benchmark.check import Reference, check, judge
from turboquant_hf.evaluation.benchmark.model import build_model, read_nbytes
from turboquant_hf.evaluation.benchmark.rows import Recorder
from turboquant_hf.evaluation.benchmark.settings import Group
from turboquant_hf.evaluation.benchmark.steps import Stepper, without_cudnn
from turboquant_hf.evaluation.benchmark.timing import relative_error
from turboquant_hf.generation.recorders import RECORDERS
from turboquant_hf.generation.steps import DecodeSteps

FIRST = 3
"""The number of the first step that is replayed: the steps before run as they are, and are recorded."""


class GraphStepper(Stepper):
    """Takes steps by recorded graphs, as in a loop of generate."""

    def __init__(self, model: Any, cache: Any, expected: int) -> None:
        super().__init__(model, False)
        self.steps = DecodeSteps(model, cache, expected)
        self._forward = self._call

    def _call(self, **arguments: Any) -> Any:
        cache, ids = arguments[self._cache_name], arguments["input_ids"]
        position = torch.full_like(ids, cache.tokens)
        return self.steps(**arguments, position_ids=position)

    def close(self) -> None:
        self.steps.close()


def run_group(group: Group, device: torch.device, bandwidth: float, steps: int, recorder: Recorder) -> None:
    """Measure every cell and preset, with graphs and without."""
    model = None
    for batch, tokens in group.cells:
        common = {
            "level": "capacity", "shape": group.shape.name, "dtype": group.dtype, "layers": group.layers,
            "batch": batch, "tokens": tokens, "steps": steps, "presets": list(group.presets),
        }  # fmt: skip
        with recorder.cell(common) as wanted:
            if wanted:
                with without_cudnn():
                    model = model or build_model(group, device)
                    for candidate in candidates(group, (batch, tokens)):
                        row = {**common, "cache": candidate.name, "preset": candidate.preset}
                        with recorder.guard(row):
                            run_cache(model, candidate, group, (batch, tokens), bandwidth, steps, row, recorder)


def run_cache(
    model: Any, candidate: Any, group: Group, cell: tuple[int, int], bandwidth: float, steps: int,
    row: dict[str, Any], recorder: Recorder,
) -> None:  # fmt: skip
    """Fill a cache, check and time its steps. A packed cache is also timed with graphs, if the device records them."""
    batch, tokens = cell
    device, baseline = model.device, {}
    plain = Stepper(model, False)
    try:
        model.set_attn_implementation(candidate.attention)
        cache = candidate.make(model.config, tokens)
        begin = now(device)
        fill(cache, group, batch, tokens, device, candidate.attention)
        row["fill_s"] = now(device) - begin
        if candidate.reads_packed:
            row["cache"] += " graph=False"
        row |= check(model, plain, cache, candidate, batch, baseline)
        recorder.add(_timed({**row, "held_bytes": all_nbytes(cache)}, plain, cache, model, bandwidth, batch, steps))
        if not candidate.reads_packed or device.type not in RECORDERS:
            return
        row = {**row, "cache": candidate.name}
        for key in ("reason", "error", "noise", "bound"):
            row.pop(key, None)
        row |= check_graph(model, plain, cache, batch, baseline)
        graphs = GraphStepper(model, cache, plain.warmup + steps)
        row = _timed(row, graphs, cache, model, bandwidth, batch, steps)
        row["held_bytes"] = all_nbytes(cache)
        if graphs.steps.refused:
            row |= {"ms": None, "reason": "its steps were not recorded"}
        graphs.close()
        recorder.add(row)
    finally:
        model.set_attn_implementation("sdpa")


def check_graph(model: Any, plain: Stepper, cache: Any, batch: int, baseline: dict[str, Reference]) -> dict[str, Any]:
    """Check a replayed step against the same cache read densely. The noise is that of the eager step's check."""
    ids, layer = plain.first_ids(batch), cache.packed_layers[0]
    graphs = GraphStepper(model, cache, FIRST + 1)
    for turn in range(FIRST + layer.preset.tile):
        logits = graphs.step(cache, ids).float()
        # A step that fills a tile encodes it afterwards. A dense read would then see other bytes.
        if turn >= FIRST - 1 and (cache.tokens - layer.preset.recent_window) % layer.preset.tile:
            break
    graphs.close()
    cache.crop(-1)
    model.set_attn_implementation("sdpa")
    error = relative_error(logits, plain.step(cache, ids).float())
    model.set_attn_implementation(ATTENTION_NAME)
    noise = next(iter(baseline.values())).noise if baseline else 0.0
    return {"error": error, "noise": noise, "check": "the same cache read densely", **judge(error, noise, model.dtype)}


def _timed(
    row: dict[str, Any], stepper: Stepper, cache: Any, model: Any, bandwidth: float, batch: int, steps: int
) -> dict[str, Any]:
    """The row, with the time of a step by the host's clock if the check has passed."""
    read = held_nbytes(cache) + read_nbytes(model)
    row = {**row, "bytes": read, "floor_ms": 1e3 * read / bandwidth, "ms": None}
    if row.get("reason"):
        return row
    row["ms"] = stepper.time(cache, batch, steps)["host_ms"]
    return {**row, "ratio_to_floor": row["ms"] / row["floor_ms"]}
