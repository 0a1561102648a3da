"""Synthetic long-context tasks in the manner of RULER (arXiv 2404.06654), of any length, scored as it does.

Every task fills a prompt with text, noise or list items up to a number of tokens, and asks for something that is spread
over the prompt. The texts are made here from a seed; no data set is needed.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from turboquant_hf.evaluation.tasks.haystack import Haystack

ADJECTIVES = (
    "ancient bitter brave bright calm clever cold crimson curious dusty eager early faint fancy gentle golden grand "
    "hollow humble icy jolly keen late lively lonely lucky mellow mighty misty narrow noble pale plain proud quiet "
    "rapid rare royal rusty sharp shiny silent silver simple sleepy smooth solid stormy sturdy subtle sunny swift "
    "tender tidy tiny vivid warm wild wise young"
).split()
NOUNS = (
    "anchor apple arrow badge barrel basket beacon bell blanket bottle bridge bucket button cabin candle canyon carpet "
    "castle chain circle clock cloud coin compass copper corner cotton crown desert dragon drum engine falcon feather "
    "fence ferry field flame forest fountain garden glacier hammer harbor helmet island jacket jungle kettle ladder "
    "lantern lemon letter lion marble meadow mirror mountain needle ocean orchard paddle palace pebble pencil pepper "
    "pillow planet pocket rabbit ribbon river rocket saddle sailor shadow shelter signal spider statue stone summer "
    "sword table temple thunder ticket tiger tower trumpet tunnel turtle valley velvet village violin wagon walnut "
    "whistle window winter wolf"
).split()
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True)
class Example:
    """A prompt as token ids, and what an answer must contain."""

    prompt: list[int]
    answers: list[str]


@dataclass(frozen=True)
class Task:
    """A task: make(haystack, length, rng) -> Example, the tokens to decode, and how answers are scored."""

    make: Callable[[Haystack, int, random.Random], Example]
    new_tokens: int
    match: str = "all"


def match_all(prediction: str, answers: list[str]) -> float:
    """Share of the answers that occur in the prediction, ignoring case (RULER's string_match_all)."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def match_part(prediction: str, answers: list[str]) -> float:
    """1 if any of the answers occurs in the prediction, else 0 (RULER's string_match_part)."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


MATCHES = {"all": match_all, "part": match_part}


def _names(count: int, rng: random.Random) -> list[str]:
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]


def _numbers(count: int, rng: random.Random) -> list[str]:
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def _magic(keys: int, values: int, queries: int) -> Callable[[Haystack, int, random.Random], Example]:
    """`keys` names with `values` numbers each, hidden in a text. The question asks for those of `queries` names."""

    def make(haystack: Haystack, length: int, rng: random.Random) -> Example:
        names, numbers = _names(keys, rng), _numbers(keys * values, rng)
        owned = {name: numbers[i * values : (i + 1) * values] for i, name in enumerate(names)}
        hidden = [
            (rng.random(), f"\nOne of the special magic numbers for {name} is: {number}.\n")
            for name in names
            for number in owned[name]
        ]
        asked = names[:queries]
        many = queries * values > 1
        kind, verb = ("numbers", "are") if many else ("number", "is")
        listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
        ending = (
            f"\n\nQuestion: {'What are all' if many else 'What is'} the special magic {kind} for {listed} mentioned in "
            f"the text above?\nAnswer: The special magic {kind} for {listed} mentioned in the text above {verb}"
        )
        opening = (
            "Some special magic numbers are hidden in the following text. You will be asked for them afterwards.\n"
        )
        prompt = haystack.prompt(length, hidden, ending, rng, opening)
        return Example(prompt, [number for name in asked for number in owned[name]])

    return make


def _variable_tracking(haystack: Haystack, length: int, rng: random.Random, hops: int = 4) -> Example:
    """A chain of assignments spread over noise, in order. The question asks for all variables with the first value."""
    names: set[str] = set()
    while len(names) < hops + 1:
        names.add("".join(rng.choices(string.ascii_uppercase, k=5)))
    chain, value = sorted(names, key=lambda _: rng.random()), str(rng.randrange(10_000, 100_000))
    steps = [f"VAR {chain[0]} = {value}.\n"]
    steps += [f"VAR {later} = VAR {earlier}.\n" for earlier, later in pairwise(chain)]
    places = sorted(rng.random() for _ in steps)

    def build(lines: int) -> str:
        text = [NOISE] * lines
        for shift, (place, step) in enumerate(zip(places, steps, strict=True)):
            text.insert(int(place * lines) + shift, step)
        return (
            f"Track the chain of variable assignments hidden in the following text.\n\n{''.join(text)}\n"
            f"Question: Find all variables that are assigned the value {value} in the text above.\nAnswer: In the text "
            f"above, {len(chain)} variables are assigned the value {value}, they are:"
        )

    return Example(_fill(haystack, length, build), chain)


def _common_words(haystack: Haystack, length: int, rng: random.Random, common_count: int = 10) -> Example:
    """A numbered list with ten common words (30 times, less in a short prompt) and others (3 times at most)."""
    words = _names(len(ADJECTIVES) * len(NOUNS), rng)
    frequent, rare = words[:common_count], words[common_count:]
    question = (
        "\nQuestion: What are the 10 most common words in the above list?\n"
        "Answer: The 10 words that appear most often in the list are:"
    )
    # In a short list everything is repeated less often, so that there is room for the rare words.
    item = len(haystack.encode(f" 100. {words[0]}"))
    often = min(30, max(4, length // item // (2 * common_count)))
    seldom = 1 if often < 12 else 3
    seed = rng.random()

    def build(count: int) -> str:
        items = frequent * often + rare[:count] * seldom
        random.Random(seed).shuffle(items)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(items, 1))
        return f"Below is a numbered list of words. Some of them appear more often than others.\n{listed}{question}"

    return Example(_fill(haystack, length, build, most=len(rare)), frequent)


def _key_value(haystack: Haystack, length: int, rng: random.Random) -> Example:
    """Pairs of random identifiers, one per line. The question asks for the value of one key."""
    seed, place = rng.random(), rng.random()

    def identifier(own: random.Random) -> str:
        return "".join(own.choices(string.hexdigits[:16], k=8))

    def pairs(count: int) -> list[tuple[str, str]]:
        own = random.Random(seed)
        return [(identifier(own), identifier(own)) for _ in range(count)]

    def build(count: int) -> str:
        rows = pairs(count)
        key = rows[int(place * count)][0]
        listed = "\n".join(f"{name}: {value}" for name, value in rows)
        question = f"Question: What is the value of {key}?\nAnswer: {key}:"
        return f"Below is a list of keys and their values.\n{listed}\n\n{question}"

    prompt, count = _fill_count(haystack, length, build)
    return Example(prompt, [pairs(count)[int(place * count)][1]])


def _fill(haystack: Haystack, length: int, build: Callable[[int], str], most: int | None = None) -> list[int]:
    return _fill_count(haystack, length, build, most)[0]


def _fill_count(
    haystack: Haystack, length: int, build: Callable[[int], str], most: int | None = None
) -> tuple[list[int], int]:
    """(tokens of build(n), n) for the largest n >= 1 that fits into `length` tokens.

    Raises:
        ValueError: even build(1) does not fit.
    """

    def tokens(count: int) -> list[int]:
        return haystack.tokenizer(build(count), verbose=False).input_ids

    if len(tokens(1)) > length:
        raise ValueError(f"length={length} is not supported; allowed: at least {len(tokens(1))} tokens for this task")
    low, high = 1, 2
    while len(tokens(high)) <= length and (most is None or high < most):
        low, high = high, 2 * high
    high = min(high, most or high)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(tokens(middle)) <= length else (low, middle - 1)
    return tokens(low), low


TASKS = {
    "single-key": Task(_magic(keys=1, values=1, queries=1), 16),
    "multi-key": Task(_magic(keys=4, values=1, queries=1), 16),
    "multi-value": Task(_magic(keys=1, values=4, queries=1), 64),
    "multi-query": Task(_magic(keys=4, values=1, queries=4), 96),
    "variable-tracking": Task(_variable_tracking, 40),
    "common-words": Task(_common_words, 120),
    "key-value": Task(_key_value, 20, match="part"),
}


def make_example(haystack: Haystack, task: str, length: int, seed: str) -> Example:
    """The prompt of a task, at most `length` tokens. The same seed gives the same prompt."""
    return TASKS[task].make(haystack, length, random.Random(f"{seed}/{task}/{length}"))
