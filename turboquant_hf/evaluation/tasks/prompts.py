"""Runs over prompts, each read through one of the caches of --preset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turboquant_hf.evaluation.harness.models import load_model
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.units import Unit, fingerprint, run_units
from turboquant_hf.evaluation.presets.named import check_packed, recent_windows, resolve_caches
from turboquant_hf.evaluation.tasks.haystack import Haystack, read_haystack


def run_prompts(
    run: Run,
    make_units: Callable[[list[str]], list[dict[str, Any]]],
    predict: Callable[..., dict[str, Any]],
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]],
    finish: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """`run_units` over prompts cut from a haystack, each read through one of the caches of `run.preset`.

    Args:
        make_units: names of the caches, "uncompressed" first -> units, each with its "preset".
        predict: (model, haystack, preset, unit, run) -> prediction.
    """
    caches = resolve_caches(run.preset, run.recent_window, run.values.get("profile"))
    units = make_units(list(caches))
    check_packed(caches, max(unit["length"] for unit in units))
    name, text = read_haystack(run)
    run = run.with_settings(haystack=name, contents=fingerprint(text, *caches.values()))

    def load(device: str) -> Callable[[Unit], dict[str, Any]]:
        model, tokenizer = load_model(run.model, dtype=run.dtype, device=device, attn_implementation=run.attention)
        haystack = Haystack(tokenizer, text)
        return lambda unit: predict(model, haystack, caches[unit["preset"]], unit, run)

    def metrics(records: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"model": run.model, "text": name, "recent_windows": recent_windows(caches.values())}
        return about | summarize(records)

    return run_units(run, units, load, metrics, finish)


def check_tasks(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError for an unknown task: the parser does not check a settings file."""
    for name in names:
        if name not in known:
            raise ValueError(f"tasks: {name!r} is not supported; allowed: {', '.join(known)}")
