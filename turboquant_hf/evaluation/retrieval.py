"""`turboquant-hf retrieval`: RULER-style tasks, read through each cache."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from turboquant_hf.evaluation import common, decoding, runs
from turboquant_hf.evaluation.haystack import Haystack
from turboquant_hf.evaluation.retrieval_tasks import MATCHES, TASKS, make_example
from turboquant_hf.evaluation.settings import add_settings, settings, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser, output="results/retrieval")
    common.add_text_arguments(parser)
    common.add_preset_argument(parser, ["k4v4", "k3v3"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument(
        "--lengths",
        type=whole(1),
        nargs="+",
        default=[1024],
        metavar="TOKENS",
        help="of a prompt, at most (default: 1024)",
    )
    parser.add_argument("--samples", type=int, default=2, help="prompts a task and length (%(default)s)")
    common.add_reading_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print a table; 0 when done."""
    options = settings(args)
    for name in options.tasks:
        if name not in TASKS:
            raise ValueError(f"tasks: {name!r} is not supported; allowed: {', '.join(TASKS)}")
    if options.samples < 1:
        raise ValueError(f"samples={options.samples} is not supported; allowed: at least 1")

    def make_units(names: list[str]) -> list[dict[str, Any]]:
        return [
            {"preset": preset, "task": task, "length": length, "sample": sample}
            for length in options.lengths
            for task in options.tasks
            for preset in names
            for sample in range(options.samples)
        ]

    runs.run_prompts(options, make_units, predict, summarize, lambda metrics, _: print(table(metrics)))
    return 0


def predict(model, haystack: Haystack, preset, unit: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One prompt's greedy answer through one cache, and its score."""
    task = TASKS[unit["task"]]
    example = make_example(haystack, unit["task"], unit["length"], f"{options.seed}/{unit['sample']}")
    cache = decoding.new_cache(model, preset)
    logits = decoding.prefill(model, torch.tensor([example.prompt], device=model.device), cache, options.chunk)
    stop = decoding.stop_tokens(model, haystack.tokenizer)
    tokens = decoding.decode_greedy(model, logits, cache, task.new_tokens, stop)[0]
    prediction = haystack.tokenizer.decode(tokens)
    return {
        "prompt_tokens": len(example.prompt),
        "answers": example.answers,
        "prediction": prediction,
        "score": MATCHES[task.match](prediction, example.answers),
    }


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean score in percent by cache, task and length."""
    cells: dict[tuple, list[float]] = {}
    for record in records:
        cells.setdefault((record["preset"], record["task"], record["length"]), []).append(record["score"])
    return {
        "results": [
            {
                "preset": preset,
                "task": task,
                "length": length,
                "score": 100 * sum(scores) / len(scores),
                "samples": len(scores),
            }
            for (preset, task, length), scores in cells.items()
        ]
    }


def table(metrics: dict[str, Any]) -> str:
    """One line a (length, cache): percent by task, and their mean."""
    results = metrics["results"]
    tasks = list(dict.fromkeys(row["task"] for row in results))
    rows = []
    for length, preset in dict.fromkeys((row["length"], row["preset"]) for row in results):
        scores = {r["task"]: r["score"] for r in results if (r["length"], r["preset"]) == (length, preset)}
        rows.append([preset, length, *(scores[task] for task in tasks), sum(scores.values()) / len(scores)])
    return common.format_table(rows, ["cache", "tokens", *tasks, "mean"])
