"""LongBench-E's tasks (arXiv 2308.14508): prompts, samples and scoring.

Prompts have the structure of LongBench's own prompts (instruction, context, the instruction again, question, beginning
of the answer), in our words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DATA = "https://huggingface.co/datasets/THUDM/LongBench/resolve/main/data.zip"
CATEGORIES = ("SingleQA", "MultiQA", "Summarization", "Few-shot", "Synthetic", "Code")


@dataclass(frozen=True)
class Task:
    """How one task is asked and scored.

    Attributes:
        prompt: a template of {context} and {input}.
        new_tokens: most tokens of an answer.
        few_shot: the context ends in the middle of a pattern that the model continues. There is no chat template, and
            one line is the answer.
        code: like few_shot, but the metric finds the line itself.
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


def read_prompts(path: str | None) -> dict[str, str]:
    """{task: template}: the file's templates, and ours for the tasks that it lacks."""
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
        except Exception as error:  # any error of the hub's client without a network
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
    """`text` without its middle if it has more than `length` tokens, because instructions stand at both ends."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(tokens) <= length:
        return text
    first, last = tokens[: length // 2], tokens[len(tokens) - length // 2 :]
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (first, last))


def encode_prompt(tokenizer, template: str, row: dict[str, Any], max_length: int, chat: bool) -> list[int]:
    """Token ids of a row's prompt, cut in the middle and then wrapped in the chat template."""
    # Not by str.format, because the texts hold braces.
    parts = template.replace("{input}", "\0").split("{context}")
    text = row["context"].join(part.replace("\0", row["input"]) for part in parts)
    text = truncate_middle(tokenizer, text, max_length)
    if chat and tokenizer.chat_template:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokenizer(text, verbose=False).input_ids
