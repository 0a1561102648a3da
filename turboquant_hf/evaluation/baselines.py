"""Published methods and other libraries' caches in the harness of `perplexity`."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import transformers
import yaml

from turboquant_hf.cache import ATTENTION_NAME
from turboquant_hf.config import CachePreset
from turboquant_hf.evaluation import common, fidelity, runs
from turboquant_hf.evaluation.foreign import ForeignPreset, make_cache
from turboquant_hf.evaluation.models import load_config, load_model, load_tokenizer
from turboquant_hf.evaluation.non_uniform import non_uniform_preset
from turboquant_hf.evaluation.pruning import measure_pruned
from turboquant_hf.evaluation.settings import add_settings, settings
from turboquant_hf.resources import config_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_text_arguments(parser)
    parser.add_argument(
        "--methods", type=Path, default=config_path("eval", "baselines.yaml"), help="YAML of what is measured"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--windows", type=int, default=1, help="how many windows, spread over the text (default: %(default)s)"
    )
    parser.add_argument("--chunk", type=int, default=128, help="tokens fed at a time (default: %(default)s)")
    parser.add_argument(
        "--recent-window", type=int, default=0, help="raw recent tokens of every method beside the fed chunk"
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print the tables; 0 when done."""
    options = settings(args)
    methods = yaml.safe_load(Path(options.methods).read_text())
    presets, notes = read_methods(methods, load_config(options.model), options.recent_window)

    def summarize(baseline: float, results: list[dict[str, Any]]) -> dict[str, Any]:
        return {"tool": "baselines", "findings": notes, "baseline": {"perplexity": baseline}, "results": results}

    def finish(metrics: dict[str, Any], _) -> None:
        print(fidelity.table(metrics))
        for note in metrics["findings"]:
            print(note)

    fidelity.run_fidelity(copy.copy(options), presets, summarize, finish, cache_class=make_cache)
    if methods.get("pruned"):
        prune(options, methods["pruned"])
    return 0


def read_methods(methods: dict[str, Any], config, recent_window: int) -> tuple[list[CachePreset], list[str]]:
    """Presets of all kinds that can be measured here, and a sentence on each that cannot."""
    presets = common.resolve_presets(methods.get("presets", ()), recent_window=recent_window)
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


def prune(options: argparse.Namespace, setting: dict[str, Any]) -> None:
    """A run of its own, in the folder `pruned`: each press of kvpress, with each preset behind it."""
    options = copy.copy(options)
    options.output = options.output and options.output / "pruned"
    options.dtype = common.resolve_dtype(options)
    _, text = common.read_text(options)
    options.contents = runs.fingerprint(text, setting)
    tokens = load_tokenizer(options.model)(text, return_tensors="pt", verbose=False).input_ids[0]
    window = fidelity.cut_windows(tokens, options.context, 1)[0]
    measured = {"compression_ratio": setting["compression_ratio"], "presets": setting["presets"]}

    def load(device: str):
        model, _ = load_model(options.model, dtype=options.dtype, device=device, attn_implementation=ATTENTION_NAME)

        def predict(unit: dict[str, Any]) -> dict[str, Any]:
            press, kept_raw = unit["press"], {"chunk": options.chunk, "recent_window": options.recent_window}
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
        return {"tool": "prune, then quantize", "model": options.model, "findings": notes, "pruned": rows}

    def finish(metrics: dict[str, Any], _) -> None:
        if rows := metrics["pruned"]:
            print("\n" + common.format_table([list(row.values()) for row in rows], list(rows[0])))
        for note in metrics["findings"]:
            print(note)

    runs.run_units(options, [{"press": press} for press in setting["presses"]], load, summarize, finish)
