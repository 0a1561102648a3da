"""`turboquant-hf retrieval`: RULER-style tasks, read through each cache."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from turboquant_hf.evaluation.harness import decoding, flags
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.labels import cache_label
from turboquant_hf.evaluation.tasks.haystack import Haystack
from turboquant_hf.evaluation.tasks.prompts import check_tasks, run_prompts
from turboquant_hf.evaluation.tasks.retrieval import MATCHES, TASKS, make_example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser, output="results/retrieval")
    flags.add_text_arguments(parser)
    flags.add_preset_argument(parser, ["k4v4", "k3v3"])
    flags.add_profile_argument(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    parser.add_argument(
        "--lengths",
        type=flags.whole(1),
        nargs="+",
        default=[1024],
        metavar="TOKENS",
        help="most tokens of a prompt (default: 1024)",
    )
    parser.add_argument("--samples", type=int, default=2, help="prompts per task and length (%(default)s)")
    flags.add_reading_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (%(default)s)")
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print a table. Returns 0."""
    asked = Run.of(args)
    check_tasks(asked.tasks, list(TASKS))
    if asked.samples < 1:
        raise ValueError(f"samples={asked.samples} is not supported; allowed: at least 1")

    def make_units(names: list[str]) -> list[dict[str, Any]]:
        return [
            {"preset": preset, "task": task, "length": length, "sample": sample}
            for length in asked.lengths
            for task in asked.tasks
            for preset in names
            for sample in range(asked.samples)
        ]

    run_prompts(asked, make_units, predict, summarize, lambda metrics, _: print(table(metrics, asked.dtype)))
    return 0


def predict(model, haystack: Haystack, preset, unit: dict[str, Any], asked: Run) -> dict[str, Any]:
    """The greedy answer to one prompt through one cache, and its score."""
    task = TASKS[unit["task"]]
    example = make_example(haystack, unit["task"], unit["length"], f"{asked.seed}/{unit['sample']}")
    cache = decoding.new_cache(model, preset)
    logits = decoding.prefill(model, torch.tensor([example.prompt], device=model.device), cache, asked.chunk)
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


def table(metrics: dict[str, Any], dtype: str) -> str:
    """One line per (length, cache): the score of every task in percent, and their mean."""
    results = metrics["results"]
    tasks = list(dict.fromkeys(row["task"] for row in results))
    rows = []
    for length, preset in dict.fromkeys((row["length"], row["preset"]) for row in results):
        scores = {r["task"]: r["score"] for r in results if (r["length"], r["preset"]) == (length, preset)}
        mean = sum(scores.values()) / len(scores)
        rows.append([cache_label(preset, dtype), length, *(scores[task] for task in tasks), mean])
    return format_table(rows, ["cache", "tokens", *tasks, "mean"])
