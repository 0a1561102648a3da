"""`turboquant-hf longbench`: the 13 English and code tasks of LongBench-E (arXiv 2308.14508), read through a cache.

The table is laid out like that of the TurboQuant paper. To compare with published numbers, give LongBench's
`dataset2prompt.json` to `--prompts`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.evaluation.harness import decoding, flags
from turboquant_hf.evaluation.harness.fidelity import uncompressed_size
from turboquant_hf.evaluation.harness.models import load_model
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.tables import format_table
from turboquant_hf.evaluation.harness.units import fingerprint, run_units
from turboquant_hf.evaluation.labels import UNCOMPRESSED, cache_label
from turboquant_hf.evaluation.presets.memory import average_bits
from turboquant_hf.evaluation.presets.named import recent_windows, resolve_caches
from turboquant_hf.evaluation.tasks.longbench import (
    CATEGORIES,
    DATA,
    TASKS,
    encode_prompt,
    load_data,
    read_prompts,
)
from turboquant_hf.evaluation.tasks.prompts import check_tasks

CHAT_ROOM = 100
"""Tokens reserved for a chat template around a prompt."""
BUCKETS = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, float("inf")))
"""LongBench-E's classes of length, in words of the context."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_model_arguments(parser, output="results/longbench")
    parser.add_argument(
        "--data", default=DATA, help="folder or zip file with <task>_e.jsonl files, or a `datasets` name"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSON of task -> template, such as LongBench's dataset2prompt.json"
    )
    flags.add_preset_argument(parser, ["k4v4", "k3v3"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all 13")
    parser.add_argument("--limit", type=flags.whole(1), default=None, help="samples per task; default: all")
    parser.add_argument(
        "--max-length",
        type=flags.whole(1),
        default=None,
        help="most prompt tokens; default: the longest context of the model",
    )
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, default=True, help="use the chat template, if any"
    )
    flags.add_reading_arguments(parser, chunk=0)
    flags.add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print a table. Returns 0."""
    asked = Run.of(args)
    check_tasks(asked.tasks, list(TASKS))
    caches = resolve_caches(asked.preset, asked.recent_window)
    templates = read_prompts(asked.prompts)
    data = {task: load_data(asked.data, task, asked.limit) for task in asked.tasks}
    contents = fingerprint(templates, *caches.values(), *(rows.to_list() for rows in data.values()))

    def load(device: str):
        model, tokenizer = load_model(
            asked.model, dtype=asked.dtype, device=device, attn_implementation=asked.attention
        )

        def predict_unit(unit: dict[str, Any]) -> dict[str, Any]:
            task, preset = unit["task"], caches[unit["preset"]]
            return predict(model, tokenizer, preset, task, templates[task], data[task][unit["sample"]], asked)

        return predict_unit

    units = [
        {"preset": preset, "task": task, "sample": sample}
        for task in asked.tasks
        for preset in caches
        for sample in range(len(data[task]))
    ]

    def metrics(records: list[dict[str, Any]]) -> dict[str, Any]:
        return {"model": asked.model, "recent_windows": recent_windows(caches.values()), **summarize(records)}

    described = asked.with_settings(contents=contents)
    run_units(described, units, load, metrics, lambda metrics, _: print(table(metrics, asked.dtype)))
    return 0


def predict(model, tokenizer, preset, name: str, template: str, row: dict[str, Any], asked: Run) -> dict[str, Any]:
    """The greedy answer to one sample through one cache, with the data that its metric needs."""
    task = TASKS[name]
    limit = model.config.get_text_config(decoder=True).max_position_embeddings - task.new_tokens - CHAT_ROOM
    prompt = encode_prompt(
        tokenizer,
        template,
        row,
        min(asked.max_length or limit, limit),
        asked.chat and not (task.few_shot or task.code),
    )
    kv = decoding.new_cache(model, preset)
    logits = decoding.prefill(model, torch.tensor([prompt], device=model.device), kv, asked.chunk)
    stop = decoding.stop_tokens(model, tokenizer)
    if task.stop_at_newline:
        stop |= {tokenizer("\n", add_special_tokens=False).input_ids[-1]}
        # The answer must not be empty.
        logits = logits.index_fill(1, torch.tensor(sorted(stop), device=logits.device), -torch.inf)
    tokens = decoding.decode_greedy(model, logits, kv, task.new_tokens, stop)[0]
    packed = isinstance(kv, TurboQuantCache) and any(layer.tiles[0].count for layer in kv.packed_layers)
    return {
        "prompt_tokens": len(prompt),
        "prediction": tokenizer.decode(tokens, skip_special_tokens=True),
        "answers": row["answers"],
        "classes": row.get("all_classes") or [],
        "length": row["length"],
        "bits": sum(average_bits(kv)) / 2 if packed else 16.0,
        "smaller": kv.compression_ratio_in_use if packed else 1.0,
    }


def score(task: str, records: list[dict[str, Any]]) -> float:
    """Mean of the task's metric over all predictions, in percent."""
    from turboquant_hf.evaluation.metrics import load_metric

    lines = [record["prediction"] for record in records]
    if TASKS[task].few_shot:
        lines = [line.lstrip("\n").split("\n")[0] for line in lines]
    options = {"classes": records[0]["classes"]} if TASKS[task].metric == "classification" else {}
    metric = load_metric(TASKS[task].metric)
    return 100 * metric.compute(predictions=lines, references=[r["answers"] for r in records], **options)["score"]


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by cache and task, over all samples and by class of length; and mean scores by cache."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        groups.setdefault((record["preset"], record["task"]), []).append(record)
    results = []
    for (preset, task), rows in groups.items():
        buckets = {name: [r for r in rows if low <= r["length"] < high] for name, low, high in BUCKETS}
        results.append(
            {
                "preset": preset,
                "task": task,
                "category": TASKS[task].category,
                "samples": len(rows),
                "score": score(task, rows),
                "by_length": {name: score(task, part) for name, part in buckets.items() if part},
            }
        )
    caches = {
        preset: {key: _mean([r[key] for r in records if r["preset"] == preset]) for key in ("bits", "smaller")}
        for preset in dict.fromkeys(r["preset"] for r in records)
    }
    return {"results": results, "caches": caches}


def table(metrics: dict[str, Any], dtype: str) -> str:
    """One line per cache: bits per channel, compression, mean score by category, and the mean over tasks."""
    results = metrics["results"]
    categories = [c for c in CATEGORIES if any(row["category"] == c for row in results)]
    rows = []
    for preset, size in metrics["caches"].items():
        own = [row for row in results if row["preset"] == preset]
        by_category = [_mean([r["score"] for r in own if r["category"] == c]) for c in categories]
        average = _mean([r["score"] for r in own])
        # Records give 16 bits for every dense cache, whatever its dtype.
        sizes = uncompressed_size(dtype) if preset == UNCOMPRESSED else (size["bits"], size["smaller"])
        rows.append([cache_label(preset, dtype), *sizes, *by_category, average])
    return format_table(rows, ["cache", "bits", "smaller", *categories, "average"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
