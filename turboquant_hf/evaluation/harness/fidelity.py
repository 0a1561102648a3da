"""Measures how close the compressed model's answers stay: perplexity, KL divergence, top-1 agreement.

A window is fed in chunks to the uncompressed model and to every preset, through the real cache. Each scored token
therefore attends to packed history. (One pass over a whole window would never read what it has just stored.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from turboquant_hf.cache import ATTENTION_NAME, TurboQuantCache
from turboquant_hf.cache.measuring import MeasuringLayer
from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation.harness import decoding
from turboquant_hf.evaluation.harness.models import forward, load_model, load_tokenizer
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.harness.texts import read_text
from turboquant_hf.evaluation.harness.units import fingerprint, run_units
from turboquant_hf.evaluation.labels import UNCOMPRESSED, cache_label
from turboquant_hf.evaluation.presets.memory import average_bits
from turboquant_hf.evaluation.presets.named import recent_windows

GROUP = 8
"""Presets that a unit measures beside one uncompressed model. With more, this model runs less often. With fewer, a run
that is killed loses less."""
COLUMNS = {
    "preset": "preset",
    "perplexity": "perplexity",
    "kl": "KL",
    "top1": "top-1",
    "key_bits": "K bits",
    "value_bits": "V bits",
    "compression_ratio": "smaller",
}
"""Key of a result -> title of its column. `uncompressed_row` has the same columns in the same order."""
SUMS = ("nll", "kl", "top1")
"""What `measure_window` adds up over the scored tokens, and `combine` divides by their number."""

Windows = Sequence[torch.Tensor]
Record = dict[str, Any]
"""What `measure_window` returns: sums over the scored tokens, for the uncompressed model and for each preset."""


def cut_windows(tokens: torch.Tensor, context: int, windows: int) -> list[torch.Tensor]:
    """`windows` windows of `context` tokens [1, context], spread evenly, without overlap; fewer for a short text.

    Raises:
        ValueError: when the text is too short for one window.
    """
    if windows < 1:
        raise ValueError(f"windows={windows} is not supported; allowed: at least 1")
    possible = len(tokens) // context if context > 0 else 0
    if possible < 1:
        raise ValueError(f"context={context} is not supported; allowed: 1 to {len(tokens)}, the tokens of this text")
    windows = min(windows, possible)
    stride = (len(tokens) - context) // max(windows - 1, 1)
    return [tokens[i * stride : i * stride + context][None] for i in range(windows)]


def first_scored(presets: Sequence[CachePreset], chunk: int) -> int:
    """The first position from which every preset has packed history, a multiple of `chunk`.

    It is the same with and without a profile, so that the same tokens are scored.
    """
    packed = max([chunk, *(preset.with_overrides(profile=None).first_encode for preset in presets)])
    return -(-packed // chunk) * chunk


def measure(
    model,
    windows: Windows,
    presets: Sequence[CachePreset],
    *,
    start: int | None = None,
    chunk: int = 128,
    cache_class=TurboQuantCache,
) -> tuple[float, list[dict]]:
    """(baseline perplexity, one result per preset) over windows [1, T] of token ids; see `combine`.

    Args:
        model: its attention implementation is "turboquant".
        windows: read one after another, each with new caches.
        presets: measured side by side.
        start: the first scored position; None is the first from which every preset has packed history.
        chunk: tokens read at a time.
        cache_class: of the caches.

    Raises:
        ValueError: when no token of a window would be scored.
    """
    first = check_windows(windows, presets, chunk)
    start = first if start is None else start
    options = {"chunk": chunk, "cache_class": cache_class}
    return combine([measure_window(model, window, presets, start, **options) for window in windows])


def check_windows(windows: Windows, presets: Sequence[CachePreset], chunk: int) -> int:
    """The first scored position, the same for all presets; ValueError if it lies behind the windows' end."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is not supported; allowed: at least 1")
    start = first_scored(presets, chunk)
    if windows[0].shape[1] <= start + 1:
        raise ValueError(
            f"context={windows[0].shape[1]} is not supported with these presets and chunk={chunk}; "
            f"allowed: more than {start + 1}, so that scored tokens attend to packed history"
        )
    return start


@torch.inference_mode()
def measure_window(
    model,
    window: torch.Tensor,
    presets: Sequence[CachePreset],
    start: int,
    *,
    chunk: int = 128,
    cache_class=TurboQuantCache,
    gradual: Sequence[bool] = (),
    scored: int = 0,
) -> Record:
    """Sums over the tokens of window [1, T] from position `start` on, in nats, as plain data.

    Tokens before position `scored` are read like the others and do not count.

    For every preset, the tokens before `start` are read raw in one piece, and packed then. Otherwise a preset that
    waits for its statistics would seem better, because more of its history would be computed from raw tokens.

    gradual: for each preset, whether it gets these tokens chunk by chunk instead, and encodes them as in use.
    """
    tokens = window.to(model.device)
    dense = DynamicCache(config=model.config)
    caches = [cache_class(model.config, preset) for preset in presets]
    _prefill_raw(model, tokens[:, :start], dense)
    for cache, slowly in zip(caches, gradual or [False] * len(caches), strict=True):
        if slowly:
            decoding.prefill(model, tokens[:, :start], cache, chunk)
        else:
            _prefill_raw(model, tokens[:, :start], cache)
    base = {"tokens": 0, "nll": 0.0}
    sums = [{"preset": preset.name, "nll": 0.0, "kl": 0.0, "top1": 0} for preset in presets]
    for position in range(start, tokens.shape[1], chunk):
        piece = tokens[:, position : position + chunk]
        first = max(position, scored)
        targets = tokens[0, first + 1 : position + chunk + 1]
        scores = slice(first - position, first - position + len(targets))
        reference = _log_probabilities(model, piece, dense, scores)
        base["tokens"] += len(targets)
        base["nll"] += _nll(reference, targets)
        for cache, total in zip(caches, sums, strict=True):
            logits = _log_probabilities(model, piece, cache, scores)
            total["nll"] += _nll(logits, targets)
            total["kl"] += divergences(reference, logits).double().sum().item()
            total["top1"] += (logits.argmax(dim=1) == reference.argmax(dim=1)).sum().item()
    for cache, total in zip(caches, sums, strict=True):
        total["key_bits"], total["value_bits"] = average_bits(cache)
        total["compression_ratio"] = cache.compression_ratio_in_use
        total["resident_bytes"] = cache.nbytes + cache.spare_nbytes
    return {"baseline": base, "presets": sums}


def _prefill_raw(model, tokens: torch.Tensor, cache) -> None:
    """Read tokens [1, T] in one piece, which is packed after attention, whatever the cache's preset says."""
    measuring = [layer for layer in getattr(cache, "packed_layers", []) if isinstance(layer, MeasuringLayer)]
    for layer in measuring:
        layer.raw = True
    decoding.prefill(model, tokens, cache, chunk=0)
    for layer in measuring:
        layer.raw = False


def combine(records: Sequence[Record]) -> tuple[float, list[dict[str, Any]]]:
    """(baseline perplexity, one result per preset) from the records of the windows, each with the same presets.

    - `kl`: mean of KL(uncompressed || compressed) per scored token, in nats; `kl_by_window`: the mean of each window.
    - `top1`: share of tokens whose most likely successor is the same.
    - `resident_bytes`: what the cache holds at the end of the last window, with the room allocated ahead.
    """
    counts = [record["baseline"]["tokens"] for record in records]
    tokens = sum(counts)
    results = []
    for sums in zip(*(record["presets"] for record in records), strict=True):
        means = {key: sum(one[key] for one in sums) / tokens for key in SUMS}
        sizes = {k: v for k, v in sums[-1].items() if k not in ("preset", *SUMS)}
        by_window = [one["kl"] / count for one, count in zip(sums, counts, strict=True)]
        results.append(
            {"preset": sums[0]["preset"], "perplexity": math.exp(means.pop("nll")), **means, **sizes}
            | {"kl_by_window": by_window}
        )
    return math.exp(sum(record["baseline"]["nll"] for record in records) / tokens), results


def run_fidelity(
    run: Run,
    presets: Sequence[CachePreset],
    summarize: Callable[[float, list[dict[str, Any]]], dict[str, Any]],
    finish: Callable[[dict[str, Any], Path], None],
    *,
    cut: Callable[[torch.Tensor], Windows] | None = None,
    cache_class=TurboQuantCache,
    gradual: Sequence[bool] = (),
    scored: int = 0,
) -> dict[str, Any]:
    """`measure` as a resumable run of several processes (see `run_units`): one unit per window and group of presets.

    Args:
        run: has the flags of a model and a text, and `chunk`; also `context` and `windows` if `cut` is left out.
        summarize: (baseline perplexity, results) -> the content of metrics.json besides model, text and windows.
        finish: shows the metrics and writes further files into the folder.
        cut: tokens [T] of the text -> windows.
        gradual, scored: as for `measure_window`.
    """
    name, text = read_text(run)
    run = run.with_settings(contents=fingerprint(text, *presets))
    tokens = load_tokenizer(run.model)(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = cut(tokens) if cut else cut_windows(tokens, run.context, run.windows)
    start = check_windows(windows, presets, run.chunk)
    if scored + 1 >= windows[0].shape[1]:
        raise ValueError(f"context={run.context} is not supported; allowed: more than {scored + 1}, the first scored")
    groups = [(presets[i : i + GROUP], gradual[i : i + GROUP]) for i in range(0, len(presets), GROUP)]

    def load(device: str):
        attention = run.values.get("attention", ATTENTION_NAME)
        model, _ = load_model(run.model, dtype=run.dtype, device=device, attn_implementation=attention)
        how = {"chunk": run.chunk, "cache_class": cache_class, "scored": scored}

        def predict(unit: dict[str, Any]) -> Record:
            own, slowly = groups[unit["group"]]
            return measure_window(model, windows[unit["window"]], own, start, gradual=slowly, **how)

        return predict

    def metrics(records: list[Record]) -> dict[str, Any]:
        by_window: dict[int, Record] = {}
        for record in records:
            kept = by_window.setdefault(record["window"], {"baseline": record["baseline"], "presets": []})
            kept["presets"] += record["presets"]
        about = {"model": run.model, "text": name, "context": windows[0].shape[1], "windows": len(windows)}
        about |= {"dtype": run.dtype, "recent_windows": recent_windows(presets)}
        return about | summarize(*combine(list(by_window.values())))

    units = [{"window": window, "group": group} for window in range(len(windows)) for group in range(len(groups))]
    return run_units(run, units, load, metrics, finish)


def table(metrics: dict[str, Any]) -> str:
    """One line per preset of a run's metrics, below the line of the uncompressed model."""
    rows = [uncompressed_row(metrics["baseline"]["perplexity"], metrics["dtype"])]
    return format_table([*rows, *([row[c] for c in COLUMNS] for row in metrics["results"])], COLUMNS.values())


def uncompressed_row(perplexity: float, dtype: str) -> list[Any]:
    """The line of the uncompressed model: one entry per column of `COLUMNS`."""
    bits, smaller = uncompressed_size(dtype)
    return [cache_label(UNCOMPRESSED, dtype), perplexity, 0.0, 1.0, bits, bits, smaller]


def uncompressed_size(dtype: str) -> tuple[float, float]:
    """(bits per channel, times smaller than 16 bit) of the uncompressed cache. Its dtype gives the bits."""
    bits = 8.0 * getattr(torch, dtype).itemsize
    return bits, 16 / bits


def divergences(reference: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(reference || found) in nats of every token [T], from log-probabilities [T, V]."""
    return (reference.exp() * (reference - found)).sum(dim=-1)


def _log_probabilities(model, piece: torch.Tensor, cache, scores: slice) -> torch.Tensor:
    return forward(model, piece, cache).logits[0, scores].float().log_softmax(dim=-1)


def _nll(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    return -log_probabilities.gather(1, targets[:, None]).double().sum().item()
