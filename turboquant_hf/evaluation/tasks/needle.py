"""Needles: a fact hidden in a text, and the question that asks for it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from turboquant_hf.evaluation.tasks.haystack import Haystack


@dataclass(frozen=True)
class Style:
    """The wording of one kind of needle. {key} and {value} are filled in.

    The prompt ends in the needle's own words up to the value. This measures whether the cache finds the place again,
    and not how a small model words an answer.
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


def make_trial(haystack: Haystack, style: Style, length: int, depth: float | None, seed: str) -> tuple[list[int], str]:
    """(prompt of exactly `length` tokens, true answer); the same seed gives the same fact in the same text.

    Without a depth, there are no needle and no distractors, and the text is longer by their tokens.
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
