"""`turboquant-hf needle`: needle in a haystack. A fact lies at a known depth of a prompt, whose end asks for the fact.

Each prompt is prefilled through the cache in chunks, and the answer is decoded greedily through the same cache.
Accuracy says whether the answer is right. The likelihood of the true answer also tells caches apart if all answers are
right.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from turboquant_hf.evaluation.harness import decoding, flags
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.labels import UNCOMPRESSED, cache_label
from turboquant_hf.evaluation.report.heatmap import plot_heatmap
from turboquant_hf.evaluation.tasks.haystack import Haystack
from turboquant_hf.evaluation.tasks.needle import STYLES, make_trial
from turboquant_hf.evaluation.tasks.prompts import run_prompts

PRESETS = ("k4v4", "k3v3", "k2v2", "paper-mse-3", "paper-mse-2")
EXTRA_TOKENS = 3
"""Additional tokens that are decoded, beyond the number in the answer, if the answer has not appeared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser, output="results/needle")
    flags.add_text_arguments(parser)
    flags.add_preset_argument(parser, PRESETS)
    flags.add_profile_argument(parser)
    parser.add_argument("--style", choices=sorted(STYLES), default="number", help="wording of the needle (%(default)s)")
    parser.add_argument(
        "--lengths",
        type=flags.whole(1),
        nargs="+",
        default=[512, 1024, 2048],
        metavar="TOKENS",
        help="tokens of a prompt (default: 512 1024 2048)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="SHARE",
        help="depths at which the needle begins, 0 to 1 (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--trials", type=int, default=1, help="prompts for every length and depth, run as one batch (%(default)s)"
    )
    flags.add_reading_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of keys, numbers and places (%(default)s)")
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks, print a table, draw the heatmaps. Returns 0."""
    asked = Run.of(args)
    check(asked)

    def finish(metrics: dict[str, Any], output: Path) -> None:
        print(table(metrics, asked.dtype))
        draw(metrics, output, asked.dtype)

    run_prompts(asked, lambda names: make_units(asked, names), predict, summarize, finish)
    return 0


def check(asked: Run) -> None:
    """Raise ValueError if no prompt can be made from these settings."""
    if asked.style not in STYLES:
        raise ValueError(f"style={asked.style!r} is not supported; allowed: {', '.join(STYLES)}")
    if asked.trials < 1:
        raise ValueError(f"trials={asked.trials} is not supported; allowed: at least 1")
    for depth in asked.depths:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depths: {depth} is not supported; allowed: 0 (the beginning) to 1 (the end)")
    for name in ("lengths", "depths", "preset"):
        values = list(getattr(asked, name))
        if len(set(values)) != len(values):
            raise ValueError(f"{name}={values} is not supported; allowed: each value once")


def make_units(asked: Run, names: list[str]) -> list[dict[str, Any]]:
    """One unit per (preset, length, depth). Depth None is the control: a prompt without a needle, for the baseline."""
    return [
        {"preset": name, "style": asked.style, "length": length, "depth": depth}
        for length in asked.lengths
        for name in names
        for depth in [*asked.depths, *([None] if name == UNCOMPRESSED else [])]
    ]


def predict(model, haystack: Haystack, preset, unit: dict[str, Any], asked: Run) -> dict[str, Any]:
    """The answers of one unit's trials, decoded as one batch through one cache."""
    style, length = STYLES[unit["style"]], unit["length"]
    seeds = [f"{asked.seed}/{unit['style']}/{length}/{trial}" for trial in range(asked.trials)]
    prompts, answers = zip(*(make_trial(haystack, style, length, unit["depth"], seed) for seed in seeds), strict=True)
    targets = [haystack.encode(f" {answer}") for answer in answers]
    cache = decoding.new_cache(model, preset)
    logits = decoding.prefill(model, torch.tensor(prompts, device=model.device), cache, asked.chunk)
    nll = decoding.answer_nll(model, logits, cache, targets)
    steps = max(map(len, targets)) + EXTRA_TOKENS

    def found(tokens: list[list[int]]) -> list[bool]:
        texts = haystack.tokenizer.batch_decode(tokens)
        return [answer.lower() in text.lower() for answer, text in zip(answers, texts, strict=True)]

    stop = decoding.stop_tokens(model, haystack.tokenizer)
    decoded = decoding.decode_greedy(model, logits, cache, steps, stop, enough=lambda tokens: all(found(tokens)))
    texts = haystack.tokenizer.batch_decode(decoded)
    return {"answers": list(answers), "predictions": texts, "found": found(decoded), "nll": nll}


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accuracy and answer NLL (nats per token) of every cell. The control is separate."""
    rows = [
        {
            **{key: record[key] for key in ("preset", "style", "length", "depth")},
            "accuracy": sum(record["found"]) / len(record["found"]),
            "nll": sum(record["nll"]) / len(record["nll"]),
        }
        for record in records
    ]
    control = [{key: value for key, value in row.items() if key != "depth"} for row in rows if row["depth"] is None]
    return {"results": [row for row in rows if row["depth"] is not None], "control": control}


def table(metrics: dict[str, Any], dtype: str) -> str:
    """One line per (length, preset): accuracy at every depth, and the mean NLL of the answer."""
    results = metrics["results"]
    depths = sorted({row["depth"] for row in results})
    groups: dict[tuple[int, str], dict[float, dict]] = {}
    for row in results:
        groups.setdefault((row["length"], row["preset"]), {})[row["depth"]] = row
    rows = [
        [
            cache_label(preset, dtype),
            length,
            *(cells[d]["accuracy"] for d in depths),
            _mean(cells.values(), "accuracy"),
            _mean(cells.values(), "nll"),
        ]
        for (length, preset), cells in groups.items()
    ]
    rows += [["(no needle)", r["length"], *([""] * len(depths)), r["accuracy"], r["nll"]] for r in metrics["control"]]
    return format_table(rows, ["cache", "tokens", *(f"at {d:g}" for d in depths), "found", "NLL"])


def _mean(rows, key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def draw(metrics: dict[str, Any], output: Path, dtype: str) -> None:
    """Draw heatmaps of each cache: accuracy by length and depth, and its difference from the uncompressed cache."""
    results = metrics["results"]
    grids = {
        preset: {(r["length"], r["depth"]): r["accuracy"] for r in results if r["preset"] == preset}
        for preset in dict.fromkeys(r["preset"] for r in results)
    }
    whole = cache_label(UNCOMPRESSED, dtype)
    for preset, grid in grids.items():
        title = f"{cache_label(preset, dtype)}: share of needles found"
        plot_heatmap(output / f"heatmap-{preset}.png", grid, title)
        if preset != UNCOMPRESSED:
            loss = {cell: found - grids[UNCOMPRESSED][cell] for cell, found in grid.items()}
            plot_heatmap(output / f"difference-{preset}.png", loss, f"{preset} minus {whole}", signed=True)
