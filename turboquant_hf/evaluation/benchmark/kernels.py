"""Kernel level: decode attention of one layer, every backend beside every SDPA backend of PyTorch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.benchmark.data import Source, packed_layer, tile_nbytes
from turboquant_hf.evaluation.benchmark.rows import Recorder
from turboquant_hf.evaluation.benchmark.settings import Group
from turboquant_hf.evaluation.benchmark.timing import measure, relative_error, rotation_count
from turboquant_hf.kernels import dispatch
from turboquant_hf.kernels.decode import History, PackedSide, RawTokens, Scoring
from turboquant_hf.kernels.decode import reference as decode_reference

ERROR_BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-3}
"""The largest accepted relative error: a few roundings of the dtype, or of tf32 products for float32."""
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
REPEATED_LIMIT = 2**30
"""SDPA over repeated KV heads is tried if the repeated keys and values have at most this many bytes."""


def backends(device: torch.device, asked: list[str] | None = None) -> list[str]:
    """The values of TURBOQUANT_BACKEND to measure: all fast backends on a CUDA device, plain torch elsewhere.

    Raises: ValueError for an unknown name.
    """
    for name in asked or ():
        if name not in dispatch.BACKENDS:
            raise ValueError(f"backend={name!r} is not supported; allowed: {', '.join(dispatch.BACKENDS)}")
    if asked:
        return list(asked)
    return [name for name in dispatch.BACKENDS if name not in ("auto", "torch")] if device.type == "cuda" else ["torch"]


@contextmanager
def using_backend(name: str) -> Iterator[None]:
    """Set TURBOQUANT_BACKEND to `name` within the block."""
    before = os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[dispatch.VARIABLE]
        else:
            os.environ[dispatch.VARIABLE] = before


@dataclass(frozen=True)
class Inputs:
    """The arguments of one `decode_attention` call."""

    query: torch.Tensor
    history: History
    workspace: torch.Tensor | None = None
    sparse_v_threshold: float = 0.0

    @classmethod
    def of_layer(cls, layer: TurboQuantLayer, query: torch.Tensor, workspace: torch.Tensor | None = None) -> Inputs:
        raws = RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.view())
        return cls(query, History(*layer.packed_sides(), *raws, layer.sinks.starts), workspace)

    @classmethod
    def rotated(
        cls, layer: TurboQuantLayer, query: torch.Tensor, workspace: torch.Tensor | None = None
    ) -> list[Inputs]:
        """`of_layer` for several copies of the layer, so many that calls in turn find no data in the L2 cache."""
        count = rotation_count(tile_nbytes(layer), query.device)
        layers = [layer, *(copy.deepcopy(layer) for _ in range(1, count))]
        return [cls.of_layer(one, query, workspace) for one in layers]

    def attend(self) -> torch.Tensor:
        """Attend by the backend that TURBOQUANT_BACKEND names."""
        scoring = Scoring(self.scaling, sparse_v_threshold=self.sparse_v_threshold)
        return dispatch.decode_attention(self.query, self.history, scoring, workspace=self.workspace)

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    def exact(self) -> torch.Tensor:
        """The reference in float32, one sequence at a time: [B, Hq, 1, D]."""
        return torch.cat([self._exact_sequence(b) for b in range(self.query.shape[0])])

    def _exact_sequence(self, index: int) -> torch.Tensor:
        one = slice(index, index + 1)

        def side(x: PackedSide) -> PackedSide:
            names = ("codes", "scale", "order", "balance", "mean", "gain")
            return replace(x, **{n: getattr(x, n)[one] for n in names if getattr(x, n) is not None})

        held = self.history
        raws = [RawTokens(x.keys[one].float(), x.values[one].float()) for x in (held.sinks, held.tail)]
        history = History(side(held.keys), side(held.values), *raws, held.starts[one])
        return decode_reference.decode_attention(self.query[one].float(), history, Scoring(self.scaling))


def run_group(group: Group, names: list[str], device: torch.device, bandwidth: float, recorder: Recorder) -> None:
    """Measure every cell: SDPA over the dense tensors first, then each preset by each backend."""
    for batch, tokens in group.cells:
        common = {
            "level": "kernel", "shape": group.shape.name, "dtype": group.dtype, "batch": batch, "tokens": tokens,
            "kv_heads": group.shape.kv_heads, "group": group.shape.group, "head_dim": group.shape.head_dim,
        }  # fmt: skip
        shape, best = group.shape, None
        with recorder.guard({**common, "backend": "sdpa"}):
            source = Source(batch, shape.kv_heads, shape.group, shape.head_dim, group.torch_dtype, device)
            best = run_dense(source, tokens, common, bandwidth, recorder)
        for preset in group.presets:
            row = {**common, "preset": preset}
            with recorder.guard(row):
                source = Source(batch, shape.kv_heads, shape.group, shape.head_dim, group.torch_dtype, device)
                layer = packed_layer(load_preset(preset), source, tokens)
                run_packed(layer, source.queries(1), names, row, bandwidth, best, recorder)
            recorder.release()


def run_dense(
    source: Source, tokens: int, common: dict[str, Any], bandwidth: float, recorder: Recorder
) -> float | None:
    """One row per SDPA backend, each with its fastest way to group heads; returns the best time in microseconds."""
    keys, values = source.keys_and_values(tokens)
    query, device = source.queries(1), keys.device
    nbytes = 2 * keys.numel() * keys.itemsize
    exact = torch.cat([_exact_dense(query[b], keys[b], values[b]) for b in range(len(query))])
    copies = [(keys, values), *((keys.clone(), values.clone()) for _ in range(1, rotation_count(nbytes, device)))]
    found = []
    for name, backend in SDPA.items() if device.type == "cuda" else (("default", None),):
        row = {**common, "backend": f"sdpa {name}", "bytes": nbytes, "floor_us": 1e6 * nbytes / bandwidth}
        ways, reasons = {}, []
        for way, attend in _ways(query, source.group, nbytes).items():
            if name == "math" and way != "grouped":
                continue  # this backend repeats heads itself and is never the fastest
            with catch_warnings(record=True) as told:  # SDPA warns why a backend does not serve
                simplefilter("always")
                try:
                    with sdpa_kernel(backend) if backend is not None else nullcontext():
                        error = relative_error(attend(*copies[0]), exact)
                        if error <= ERROR_BOUNDS[keys.dtype]:
                            ways[way] = measure([partial(attend, *pair) for pair in copies], device), error
                        else:
                            reasons.append(f"{way}: relative error {error:.1e}")
                except (RuntimeError, torch.OutOfMemoryError) as failure:
                    said = [str(warning.message).splitlines()[0] for warning in told]
                    reasons.append(f"{way}: {' '.join([str(failure).splitlines()[0], *said])}")
        if ways:
            way, (timing, error) = min(ways.items(), key=lambda item: item[1][0].seconds)
            found.append(recorder.add(timed_row({**row, "way": way, "error": error}, timing, bandwidth)))
        else:
            recorder.add({**row, "us": None, "reason": "; ".join(reasons)})
    best = min((row["us"] for row in found), default=None)
    for row in found:
        row["ratio_to_fp16"], row["speedup"] = row["us"] / best, best / row["us"]
    return best


def _ways(query: torch.Tensor, group: int, nbytes: int) -> dict[str, Callable[..., torch.Tensor]]:
    """The ways to tell SDPA that query heads share a KV head. All give [B, Hq, 1, D]."""

    def grouped(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=group > 1)

    def folded(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        rows = query.unflatten(1, (-1, group)).squeeze(3)
        return scaled_dot_product_attention(rows, keys, values).flatten(1, 2).unsqueeze(2)

    def repeated(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        return scaled_dot_product_attention(query, keys, values)

    ways = {"grouped": grouped}
    if group > 1:
        ways["query heads as rows"] = folded
        if group * nbytes <= REPEATED_LIMIT:
            ways["repeated"] = repeated
    return ways


def _exact_dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """One sequence in float32: query [Hq, 1, D], keys and values [H, T, D] -> [1, Hq, 1, D]."""
    rows = query.float().squeeze(1).unflatten(0, (keys.shape[0], -1))
    scores = rows @ keys.float().transpose(1, 2) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ values.float()).flatten(0, 1)[None, :, None]


def run_packed(
    layer: TurboQuantLayer,
    query: torch.Tensor,
    names: list[str],
    row: dict[str, Any],
    bandwidth: float,
    best: float | None,
    recorder: Recorder,
) -> None:
    """One row per backend over a filled layer."""
    device, (batch, heads, _, dim), kv_heads = query.device, query.shape, layer.num_heads
    # Made once, as in a model's steps. Otherwise every recorded call would first clear a workspace of its own.
    workspace = dispatch.decode_workspace(batch * kv_heads, heads // kv_heads, dim, device)
    copies = Inputs.rotated(layer, query, workspace)
    nbytes = tile_nbytes(layer)
    row = {**row, "bytes": nbytes, "floor_us": 1e6 * nbytes / bandwidth}
    exact = copies[0].exact()
    for name in names:
        with recorder.guard({**row, "backend": name}), using_backend(name):
            dispatch.backend(device)  # raises the reason if the backend is not available
            error = relative_error(copies[0].attend(), exact)
            checked = {**row, "backend": name, "error": error}
            if error > ERROR_BOUNDS[query.dtype]:
                reason = f"relative error {error:.1e} above {ERROR_BOUNDS[query.dtype]:.0e}"
                recorder.add({**checked, "us": None, "reason": reason})
                continue
            made = timed_row(checked, measure([x.attend for x in copies], device), bandwidth)
            if best is not None:
                made["ratio_to_fp16"], made["speedup"] = made["us"] / best, best / made["us"]
            recorder.add(made)


def timed_row(row: dict[str, Any], timing, bandwidth: float) -> dict[str, Any]:
    rate = row["bytes"] / timing.seconds
    return {
        **row, "us": timing.us, "spread": timing.spread, "timing": timing.method, "gbps": rate / 1e9,
        "copy_share": rate / bandwidth,
    }  # fmt: skip
