"""LongBench-E (arXiv 2308.14508): its 13 English and code tasks, read through a cache, in a table like TurboQuant's.

Prompts have the structure of LongBench's own (instruction, context, the instruction again, question, answer lead) in
our words; `--prompts` takes LongBench's `dataset2prompt.json` for numbers that are to be compared with published ones.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.evaluation import common, decoding, runs
from turboquant_hf.evaluation.models import load_model
from turboquant_hf.evaluation.settings import add_settings, settings, whole

DATA = "https://huggingface.co/datasets/THUDM/LongBench/resolve/main/data.zip"
CHAT_ROOM = 100
"""Tokens left for a chat template around a prompt."""
BUCKETS = (("0-4k", 0, 4000), ("4-8k", 4000, 8000), ("8k+", 8000, float("inf")))
"""LongBench-E's classes of length, in words of context."""
CATEGORIES = ("SingleQA", "MultiQA", "Summarization", "Few-shot", "Synthetic", "Code")


@dataclass(frozen=True)
class Task:
    """How one task is asked and scored.

    Attributes:
        prompt: a template of {context} and {input}.
        new_tokens: how many tokens an answer may have.
        few_shot: the context ends in the middle of a pattern to go on with: no chat template, one line is the answer.
        code: like few_shot, but the metric finds the line.
        stop_at_newline: decoding ends with the first line.
    """

    category: str
    metric: str
    new_tokens: int
    prompt: str
    few_shot: bool = False
    code: bool = False
    stop_at_newline: bool = False


_ARTICLE = (
    "Answer the question about the article in one phrase or sentence, as briefly as possible, without explanation. "
    'If it is a yes/no question, answer "yes", "no" or "unanswerable"; if the article does not hold the answer, write '
    '"unanswerable".'
)
_PASSAGES = "Answer the question from the passages. Give only the answer, no other words."
_MULTI_QA = f"{_PASSAGES}\n\nThe passages:\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"
_CODE = "Complete the code below.\n{context}%sNext line of code:\n"

TASKS = {
    "qasper": Task(
        "SingleQA", "qa_f1", 128, f"{_ARTICLE}\n\nArticle: {{context}}\n\n{_ARTICLE}\n\nQuestion: {{input}}\n\nAnswer:"
    ),
    "multifieldqa_en": Task(
        "SingleQA",
        "qa_f1",
        64,
        "Read the text and answer briefly.\n\n{context}\n\nNow answer the question from the text above. Give only the "
        "answer, no other words.\n\nQuestion: {input}\nAnswer:",
    ),
    "hotpotqa": Task("MultiQA", "qa_f1", 32, _MULTI_QA),
    "2wikimqa": Task("MultiQA", "qa_f1", 32, _MULTI_QA),
    "gov_report": Task(
        "Summarization",
        "rouge_l",
        512,
        "Write a one-page summary of this report by a government agency.\n\nReport:\n{context}\n\nNow write a one-page "
        "summary of the report.\n\nSummary:",
    ),
    "multi_news": Task(
        "Summarization",
        "rouge_l",
        512,
        "Write a one-page summary of all these news passages.\n\nNews:\n{context}\n\nNow write a one-page summary of "
        "all the news.\n\nSummary:",
    ),
    "trec": Task(
        "Few-shot",
        "classification",
        64,
        "Name the type of the last question. Examples of questions and types:\n\n{context}\n{input}",
        few_shot=True,
    ),
    "triviaqa": Task(
        "Few-shot",
        "qa_f1",
        32,
        "Answer the question from the passage. Give only the answer, no other words. Examples:\n\n{context}\n\n{input}",
        few_shot=True,
    ),
    "samsum": Task(
        "Few-shot",
        "rouge_l",
        128,
        "Summarize the dialogue in a few short sentences. Examples:\n\n{context}\n\n{input}",
        few_shot=True,
        stop_at_newline=True,
    ),
    "passage_count": Task(
        "Synthetic",
        "number_match",
        32,
        "Below are paragraphs from Wikipedia, some of them more than once. Read them and find out how many different "
        "paragraphs there are when duplicates are removed.\n\n{context}\n\nGive the number of different paragraphs, as "
        "a number only, such as 1, 2, 3.\n\nThe final answer is: ",
    ),
    "passage_retrieval_en": Task(
        "Synthetic",
        "number_match",
        32,
        "Below are 30 paragraphs from Wikipedia and an abstract. Find out which paragraph the abstract is of.\n\n"
        "{context}\n\nThe abstract:\n\n{input}\n\nGive the number of its paragraph in the form "
        '"Paragraph 1", "Paragraph 2".\n\nThe answer is: ',
    ),
    "lcc": Task("Code", "edit_similarity", 64, _CODE % "", code=True),
    "repobench-p": Task("Code", "edit_similarity", 64, _CODE % "{input}", code=True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser, output="results/longbench")
    parser.add_argument(
        "--data", default=DATA, help="folder or zip file with <task>_e.jsonl files, or a `datasets` name"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSON of task -> template, such as LongBench's dataset2prompt.json"
    )
    common.add_preset_argument(parser, ["k4v4", "k3v3"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all 13")
    parser.add_argument("--limit", type=whole(1), default=None, help="samples a task; default: all")
    parser.add_argument(
        "--max-length", type=whole(1), default=None, help="prompt tokens; default: what the model takes"
    )
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, default=True, help="use the chat template, if any"
    )
    common.add_reading_arguments(parser, chunk=0)
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks and print a table; 0 when done."""
    options = settings(args)
    for name in options.tasks:
        if name not in TASKS:
            raise ValueError(f"tasks: {name!r} is not supported; allowed: {', '.join(TASKS)}")
    options.dtype = common.resolve_dtype(options)
    caches = decoding.resolve_caches(options.preset, options.recent_window)
    templates = read_prompts(options.prompts)
    data = {task: load_data(options.data, task, options.limit) for task in options.tasks}
    options.contents = runs.fingerprint(templates, *caches.values(), *(rows.to_list() for rows in data.values()))

    def load(device: str):
        model, tokenizer = load_model(
            options.model, dtype=options.dtype, device=device, attn_implementation=options.attention
        )

        def predict_unit(unit: dict[str, Any]) -> dict[str, Any]:
            task, preset = unit["task"], caches[unit["preset"]]
            return predict(model, tokenizer, preset, task, templates[task], data[task][unit["sample"]], options)

        return predict_unit

    units = [
        {"preset": preset, "task": task, "sample": sample}
        for task in options.tasks
        for preset in caches
        for sample in range(len(data[task]))
    ]
    runs.run_units(options, units, load, summarize, lambda metrics, output: print(table(metrics)))
    return 0


def read_prompts(path: str | None) -> dict[str, str]:
    """Task -> template: ours, or the file's where it has the task."""
    templates = {name: task.prompt for name, task in TASKS.items()}
    return templates if path is None else templates | json.loads(Path(path).read_text(encoding="utf-8"))


def load_data(source: str, task: str, limit: int | None = None):
    """The samples of LongBench-E's `task`: a `datasets.Dataset` with input, context, answers, length, all_classes.

    Args:
        source: a folder with `<task>_e.jsonl` (or `data/<task>_e.jsonl`), a zip file of such (a path or a URL), or the
            name of a data set with a configuration `<task>_e`.

    Raises:
        FileNotFoundError: the folder has no such file.
    """
    from datasets import load_dataset

    name = f"{task}_e"
    if source.endswith(".zip"):
        source = _unzipped(source)
    if Path(source).is_dir():
        paths = [
            path for path in (Path(source, f"{name}.jsonl"), Path(source, "data", f"{name}.jsonl")) if path.is_file()
        ]
        if not paths:
            raise FileNotFoundError(f"data={source!r} has no {name}.jsonl (--tasks names those that are there)")
        rows = load_dataset("json", data_files=str(paths[0]), split="train")
    else:
        try:
            rows = load_dataset(source, name, split="test")
        except Exception as error:  # whatever the hub's client raises without a network
            raise OSError(
                f"data={source!r}: {name} cannot be loaded ({type(error).__name__}: {error}); it needs the hub, or "
                "--data with a folder of LongBench-E's jsonl files"
            ) from error
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


@cache
def _unzipped(source: str) -> str:
    """Folder with the contents of a zip file, kept in the cache of `datasets`."""
    from datasets import DownloadManager

    return DownloadManager().download_and_extract(source)


def truncate_middle(tokenizer, text: str, length: int) -> str:
    """`text`, its middle left out where it has more than `length` tokens: instructions stand at both ends."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(tokens) <= length:
        return text
    first, last = tokens[: length // 2], tokens[len(tokens) - length // 2 :]
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (first, last))


def encode_prompt(tokenizer, template: str, row: dict[str, Any], max_length: int, chat: bool) -> list[int]:
    """Token ids of a row's prompt: cut in the middle, then wrapped in the chat template."""
    # Not str.format: the texts hold braces.
    parts = template.replace("{input}", "\0").split("{context}")
    text = row["context"].join(part.replace("\0", row["input"]) for part in parts)
    text = truncate_middle(tokenizer, text, max_length)
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokenizer(text, verbose=False).input_ids


def predict(model, tokenizer, preset, name: str, template: str, row: dict[str, Any], options) -> dict[str, Any]:
    """One sample's greedy answer through one cache, with what its metric needs."""
    task = TASKS[name]
    limit = model.config.get_text_config(decoder=True).max_position_embeddings - task.new_tokens - CHAT_ROOM
    prompt = encode_prompt(
        tokenizer,
        template,
        row,
        min(options.max_length or limit, limit),
        options.chat and not (task.few_shot or task.code),
    )
    kv = decoding.new_cache(model, preset)
    logits = decoding.prefill(model, torch.tensor([prompt], device=model.device), kv, options.chunk)
    stop = decoding.stop_tokens(model, tokenizer)
    if task.stop_at_newline:
        stop |= {tokenizer("\n", add_special_tokens=False).input_ids[-1]}
        # The answer may not be empty.
        logits = logits.index_fill(1, torch.tensor(sorted(stop), device=logits.device), -torch.inf)
    tokens = decoding.decode_greedy(model, logits, kv, task.new_tokens, stop)[0]
    packed = isinstance(kv, TurboQuantCache) and any(layer.tiles[0].count for layer in kv.packed_layers)
    return {
        "prompt_tokens": len(prompt),
        "prediction": tokenizer.decode(tokens, skip_special_tokens=True),
        "answers": row["answers"],
        "classes": row.get("all_classes") or [],
        "length": row["length"],
        "bits": sum(common.average_bits(kv)) / 2 if packed else 16.0,
        "smaller": kv.compression_ratio_in_use if packed else 1.0,
    }


def score(task: str, records: list[dict[str, Any]]) -> float:
    """Mean of the task's metric over predictions, in percent."""
    from turboquant_hf.evaluation.metrics import load_metric

    lines = [record["prediction"] for record in records]
    if TASKS[task].few_shot:
        lines = [line.lstrip("\n").split("\n")[0] for line in lines]
    options = {"classes": records[0]["classes"]} if TASKS[task].metric == "classification" else {}
    metric = load_metric(TASKS[task].metric)
    return 100 * metric.compute(predictions=lines, references=[r["answers"] for r in records], **options)["score"]


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores by cache and task, over all samples and by LongBench-E's classes of length; and by cache."""
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


def table(metrics: dict[str, Any]) -> str:
    """One line a cache: bits a channel, how much smaller, mean score by category, and the mean over tasks."""
    results = metrics["results"]
    categories = [c for c in CATEGORIES if any(row["category"] == c for row in results)]
    rows = []
    for preset, size in metrics["caches"].items():
        own = [row for row in results if row["preset"] == preset]
        by_category = [_mean([r["score"] for r in own if r["category"] == c]) for c in categories]
        rows.append([preset, size["bits"], size["smaller"], *by_category, _mean([r["score"] for r in own])])
    return common.format_table(rows, ["cache", "bits", "smaller", *categories, "average"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
