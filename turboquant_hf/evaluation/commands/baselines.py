"""`turboquant-hf baselines`: published methods and other libraries' caches in the harness of `perplexity`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import transformers
import yaml

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation.harness import fidelity, flags
from turboquant_hf.evaluation.harness.models import load_config, load_model, load_tokenizer
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.harness.texts import read_text
from turboquant_hf.evaluation.harness.units import fingerprint, run_units
from turboquant_hf.evaluation.presets.named import resolve_presets
from turboquant_hf.evaluation.rivals.foreign import ForeignPreset, make_cache
from turboquant_hf.evaluation.rivals.non_uniform import non_uniform_preset
from turboquant_hf.evaluation.rivals.pruning import measure_pruned
from turboquant_hf.resources import config_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    parser.add_argument(
        "--methods", type=Path, default=config_path("eval", "baselines.yaml"), help="YAML of what is measured"
    )
    flags.add_profile_argument(parser)
    flags.add_window_arguments(parser, context=1024, windows=1)
    parser.add_argument(
        "--recent-window", type=int, default=0, help="recent tokens that every method keeps raw, besides the fed chunk"
    )
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print the tables. Returns 0."""
    asked = Run.of(args)
    methods = yaml.safe_load(Path(asked.methods).read_text())
    presets, notes = read_methods(methods, load_config(asked.model), asked.recent_window, asked.profile)

    def summarize(baseline: float, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"findings": notes, "baseline": {"perplexity": baseline}, "results": results}

    def finish(metrics: dict[str, Any], _) -> None:
        print(fidelity.table(metrics))
        for note in metrics["findings"]:
            print(note)

    fidelity.run_fidelity(asked, presets, summarize, finish, cache_class=make_cache)
    if methods.get("pruned"):
        prune(asked, methods["pruned"])
    return 0


def read_methods(
    methods: dict[str, Any], config, recent_window: int, profile: str | None = None
) -> tuple[list[CachePreset], list[str]]:
    """(presets that can be measured here, a sentence on each that cannot)."""
    presets = resolve_presets(methods.get("presets", ()), profile, recent_window=recent_window)
    for name, data in methods.get("non_uniform", {}).items():
        presets.append(non_uniform_preset(name, **data, recent_window=recent_window))
    notes = []
    for name, data in methods.get("quantized_cache", {}).items():
        try:
            foreign = ForeignPreset(
                name=name, min_statistics=0, recent_window=recent_window, options=tuple(data.items())
            )
            make_cache(config, foreign)
            presets.append(foreign)
        except (ImportError, ValueError) as error:
            notes.append(f"{name} is left out: {str(error).splitlines()[0]}")
    return presets, notes


def prune(asked: Run, setting: dict[str, Any]) -> None:
    """A separate run in the folder `pruned`: each press of kvpress, followed by each preset."""
    _, text = read_text(asked)
    part = asked.part("pruned", tool="prune, then quantize").with_settings(contents=fingerprint(text, setting))
    tokens = load_tokenizer(asked.model)(text, return_tensors="pt", verbose=False).input_ids[0]
    window = fidelity.cut_windows(tokens, asked.context, 1)[0]
    measured = {"compression_ratio": setting["compression_ratio"], "presets": setting["presets"]}

    def load(device: str):
        model, _ = load_model(asked.model, dtype=asked.dtype, device=device, attn_implementation=ATTENTION_NAME)

        def predict(unit: dict[str, Any]) -> dict[str, Any]:
            press, kept_raw = unit["press"], {"chunk": asked.chunk, "recent_window": asked.recent_window}
            try:
                return {"rows": measure_pruned(model, window, press=press, **measured, **kept_raw), "notes": []}
            except ImportError as error:
                note = f"{press} is left out: {error}"
            except KeyError as error:  # its hooks read arguments under names that newer transformers do not use
                note = f"{press} does not run with transformers {transformers.__version__}: no argument {error}"
            except RuntimeError as error:  # layers of different lengths share one mask
                note = f"{press} does not compose with text that follows in chunks: {error}"
            return {"rows": [], "notes": [note]}

        return predict

    def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
        rows, notes = ([item for record in records for item in record[key]] for key in ("rows", "notes"))
        return {"model": asked.model, "findings": notes, "pruned": rows}

    def finish(metrics: dict[str, Any], _) -> None:
        if rows := metrics["pruned"]:
            print("\n" + format_table([list(row.values()) for row in rows], list(rows[0])))
        for note in metrics["findings"]:
            print(note)

    run_units(part, [{"press": press} for press in setting["presses"]], load, summarize, finish)
