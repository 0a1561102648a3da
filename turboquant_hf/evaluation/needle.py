"""Needle in a haystack: a fact at a known depth of a prompt of known length, asked for at its end.

Each prompt is prefilled through the cache in chunks, its answer decoded greedily through the same cache. Accuracy says
whether the answer came out; the likelihood of the true answer says how close it was, also where accuracy saturates.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turboquant_hf.evaluation import common, decoding, runs
from turboquant_hf.evaluation.common import UNCOMPRESSED
from turboquant_hf.evaluation.haystack import Haystack
from turboquant_hf.evaluation.heatmap import plot_heatmap
from turboquant_hf.evaluation.settings import add_settings, settings, whole

PRESETS = ("k4v4", "k3v3", "k2v2", "paper-mse-3", "paper-mse-2")
EXTRA_TOKENS = 3
"""Tokens decoded beyond the answer's own number, where it has not come out yet."""


@dataclass(frozen=True)
class Style:
    """Wording of one kind of needle; {key} and {value} are filled in.

    The lead, the last words of the prompt, are the needle's own up to the value: what is measured is whether the
    cache finds the place again, not how a small model words an answer.
    """

    needle: str
    lead: str
    keys: tuple[str, ...] = ("",)
    values: tuple[str, ...] = ()
    digits: int = 7
    distractors: int = 0


CITIES = ("Amsterdam", "Chicago", "Colombo", "Lagos", "Lisbon", "Mumbai", "Nairobi", "Prague", "Seattle", "Sydney")
STYLES = {
    "number": Style(
        "\nThe special magic number for {key} is {value}.\n",
        "\n\nQuestion: What is the special magic number for {key}?\nAnswer: The special magic number for {key} is",
        keys=CITIES,
    ),
    "passkey": Style(
        "\nThe pass key is {value}. Remember it. {value} is the pass key.\n",
        "\n\nWhat is the pass key? The pass key is",
        digits=5,
    ),
    "natural": Style(
        "\nThe best thing to do in {key} is to {value} on a sunny day.\n",
        "\n\nQuestion: What is the best thing to do in {key}?\nAnswer: The best thing to do in {key} is to",
        keys=CITIES,
        values=(
            "eat a sandwich in the park",
            "feed the ducks by the old bridge",
            "paint the harbour from the roof",
            "race wooden boats on the canal",
            "listen to the brass band at noon",
            "pick lemons behind the museum",
        ),
    ),
    "ruler": Style(
        "\nOne of the special magic numbers for {key} is: {value}.\n",
        "\n\nQuestion: What is the special magic number for {key} mentioned in the text?\n"
        "Answer: One of the special magic numbers for {key} is:",
        keys=CITIES,
        distractors=3,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser, output="results/needle")
    common.add_text_arguments(parser)
    common.add_preset_argument(parser, PRESETS)
    parser.add_argument("--style", choices=sorted(STYLES), default="number", help="kind of needle (%(default)s)")
    parser.add_argument(
        "--lengths",
        type=whole(1),
        nargs="+",
        default=[512, 1024, 2048],
        metavar="TOKENS",
        help="of a prompt (default: 512 1024 2048)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="SHARE",
        help="where the needle begins, 0 to 1 (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--trials", type=int, default=1, help="prompts for every length and depth, run as one batch (%(default)s)"
    )
    common.add_reading_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of keys, numbers and places (%(default)s)")
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Measure what the output folder lacks, print a table, draw the heatmaps; 0 when done."""
    options = settings(args)
    check(options)
    runs.run_prompts(options, lambda names: make_units(options, names), predict, summarize, finish)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for settings that no prompt can be made of."""
    if options.style not in STYLES:
        raise ValueError(f"style={options.style!r} is not supported; allowed: {', '.join(STYLES)}")
    if options.trials < 1:
        raise ValueError(f"trials={options.trials} is not supported; allowed: at least 1")
    for depth in options.depths:
        if not 0.0 <= depth <= 1.0:
            raise ValueError(f"depths: {depth} is not supported; allowed: 0 (the beginning) to 1 (the end)")
    for name in ("lengths", "depths", "preset"):
        if len(set(getattr(options, name))) != len(getattr(options, name)):
            raise ValueError(f"{name}={getattr(options, name)} is not supported; allowed: each value once")


def make_units(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """One unit a (preset, length, depth); depth None is the control, a prompt of the baseline without its needle."""
    return [
        {"preset": name, "style": options.style, "length": length, "depth": depth}
        for length in options.lengths
        for name in names
        for depth in [*options.depths, *([None] if name == UNCOMPRESSED else [])]
    ]


def make_trial(haystack: Haystack, style: Style, length: int, depth: float | None, seed: str) -> tuple[list[int], str]:
    """(prompt of exactly `length` tokens, true answer); the same seed gives the same fact in the same text.

    Without a depth the needle and its distractors are left out and the text is that much longer.
    """
    rng = random.Random(seed)
    keys = rng.sample(style.keys, 1 + style.distractors)
    values = [_value(style, rng) for _ in keys]
    places = [depth, *(rng.random() for _ in keys[1:])]
    hidden = [
        (place, style.needle.format(key=key, value=value))
        for place, key, value in zip(places, keys, values, strict=True)
    ]
    lead = style.lead.format(key=keys[0])
    return haystack.prompt(length, [] if depth is None else hidden, lead, rng), values[0]


def _value(style: Style, rng: random.Random) -> str:
    return rng.choice(style.values) if style.values else str(rng.randrange(10 ** (style.digits - 1), 10**style.digits))


def predict(model, haystack: Haystack, preset, unit: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Answers of one unit's trials, decoded as one batch through one cache."""
    style, length = STYLES[unit["style"]], unit["length"]
    seeds = [f"{options.seed}/{unit['style']}/{length}/{trial}" for trial in range(options.trials)]
    prompts, answers = zip(*(make_trial(haystack, style, length, unit["depth"], seed) for seed in seeds), strict=True)
    targets = [haystack.encode(f" {answer}") for answer in answers]
    cache = decoding.new_cache(model, preset)
    logits = decoding.prefill(model, torch.tensor(prompts, device=model.device), cache, options.chunk)
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
    """Mean accuracy and answer NLL (nats a token) of every cell; the control is kept apart."""
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


def table(metrics: dict[str, Any]) -> str:
    """One line a (length, preset): accuracy at every depth, and the mean answer NLL."""
    results = metrics["results"]
    depths = sorted({row["depth"] for row in results})
    groups: dict[tuple[int, str], dict[float, dict]] = {}
    for row in results:
        groups.setdefault((row["length"], row["preset"]), {})[row["depth"]] = row
    rows = [
        [
            preset,
            length,
            *(cells[d]["accuracy"] for d in depths),
            _mean(cells.values(), "accuracy"),
            _mean(cells.values(), "nll"),
        ]
        for (length, preset), cells in groups.items()
    ]
    rows += [["(no needle)", r["length"], *([""] * len(depths)), r["accuracy"], r["nll"]] for r in metrics["control"]]
    return common.format_table(rows, ["cache", "tokens", *(f"at {d:g}" for d in depths), "found", "NLL"])


def _mean(rows, key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def finish(metrics: dict[str, Any], output: Path) -> None:
    """Print the table; draw accuracy by length and depth for each cache, and what it loses to the baseline."""
    print(table(metrics))
    results = metrics["results"]
    grids = {
        preset: {(r["length"], r["depth"]): r["accuracy"] for r in results if r["preset"] == preset}
        for preset in dict.fromkeys(r["preset"] for r in results)
    }
    for preset, grid in grids.items():
        plot_heatmap(output / f"heatmap-{preset}.png", grid, f"{preset}: share of needles found")
        if preset != UNCOMPRESSED:
            loss = {cell: found - grids[UNCOMPRESSED][cell] for cell, found in grid.items()}
            plot_heatmap(output / f"difference-{preset}.png", loss, f"{preset} minus {UNCOMPRESSED}", signed=True)
