"""Retrieval tasks: what a prompt holds, how an answer is scored."""

import json

import pytest

from turboquant_hf import cli
from turboquant_hf.evaluation.commands import retrieval
from turboquant_hf.evaluation.tasks import retrieval as retrieval_tasks
from turboquant_hf.evaluation.tasks.haystack import Haystack

TEXT = "".join(f"Line {i} of a long and quiet text. " for i in range(400))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(tokenizer, TEXT)


@pytest.mark.parametrize("task", list(retrieval_tasks.TASKS))
@pytest.mark.parametrize("length", [1600, 4000])
def test_make_example_holds_its_answers_within_the_length(haystack, tokenizer, task, length):
    example = retrieval_tasks.make_example(haystack, task, length, "0")
    text = tokenizer.decode(example.prompt)
    assert 0.85 * length < len(example.prompt) <= length
    assert example.answers and all(answer in text for answer in example.answers)
    assert retrieval_tasks.make_example(haystack, task, length, "0") == example
    assert retrieval_tasks.make_example(haystack, task, length, "1").answers != example.answers


@pytest.mark.parametrize(
    ("task", "answers", "needles"),
    [("single-key", 1, 1), ("multi-key", 1, 4), ("multi-value", 4, 4), ("multi-query", 4, 4)],
)
def test_magic_numbers_are_hidden_and_asked_for(haystack, tokenizer, task, answers, needles):
    example = retrieval_tasks.make_example(haystack, task, 2000, "0")
    text, question = tokenizer.decode(example.prompt).split("Question:")
    assert len(set(example.answers)) == answers
    assert text.count("One of the special magic numbers for") == needles
    for answer in example.answers:
        line = next(line for line in text.splitlines() if answer in line)
        assert line.split(" for ")[1].split(" is:")[0] in question


def test_variable_tracking_follows_its_chain(haystack, tokenizer):
    example = retrieval_tasks.make_example(haystack, "variable-tracking", 2000, "0")
    text, question = tokenizer.decode(example.prompt).split("Question:")
    values = {}
    for line in (line for line in text.splitlines() if line.startswith("VAR ")):
        name, source = line.removeprefix("VAR ").removesuffix(".").split(" = ")
        values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR ") else source
    assert list(values) == example.answers and len(values) == 5
    assert len(set(values.values())) == 1 and f"the value {values[example.answers[0]]} " in question


def test_common_words_are_the_most_common(haystack, tokenizer):
    example = retrieval_tasks.make_example(haystack, "common-words", 4000, "0")
    text = tokenizer.decode(example.prompt).split("\n")[1]
    words = text.split()[1::2]
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert set(ranked[:10]) == set(example.answers)
    assert words.count(ranked[9]) > 2 * words.count(ranked[10])


def test_key_value_asks_for_a_pair_of_the_list(haystack, tokenizer):
    example = retrieval_tasks.make_example(haystack, "key-value", 2000, "0")
    text, question = tokenizer.decode(example.prompt).split("\n\nQuestion:")
    pairs = dict(line.split(": ") for line in text.splitlines()[1:])
    assert len(pairs) > 80
    assert [pairs[question.rsplit(": ", 1)[1].removesuffix(":")]] == example.answers


def test_make_example_refuses_a_length_too_short(haystack):
    with pytest.raises(ValueError, match="length=100 is not supported; allowed: at least"):
        retrieval_tasks.make_example(haystack, "variable-tracking", 100, "0")


def test_matches_against_hand_computed_values():
    assert retrieval_tasks.match_all("The answers: 12, ABC and 7", ["12", "abc", "99", "100"]) == 0.5
    assert retrieval_tasks.match_part("the answer is abc", ["x", "ABC"]) == 1.0
    assert retrieval_tasks.match_part("nothing", ["x", "ABC"]) == 0.0


def test_summarize_and_table():
    record = {"preset": "uncompressed", "task": "single-key", "length": 512}
    metrics = retrieval.summarize(
        [{**record, "score": 1.0}, {**record, "score": 0.0}, {**record, "task": "key-value", "score": 1.0}]
    )
    assert metrics["results"][0] == {**record, "score": 50.0, "samples": 2}
    assert retrieval.table(metrics, "float32").splitlines()[-1].split() == [
        "uncompressed",
        "(float32)",
        "512",
        "50",
        "100",
        "75",
    ]


def test_retrieval_command_writes_a_run(tiny_folder, tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    argv = ["retrieval", "--model", str(tiny_folder), "--text", str(text), "--preset", "k4v4", "--lengths", "900"]
    argv += ["--tasks", "single-key", "key-value", "--samples", "1", "--device", "cpu", "--output", str(output)]
    assert cli.main(argv) == 0
    results = json.loads((output / "metrics.json").read_text())["results"]
    assert [(row["preset"], row["task"]) for row in results] == [
        (preset, task) for task in ("single-key", "key-value") for preset in ("uncompressed", "k4v4")
    ]
    assert all(row["score"] == 0.0 for row in results), "a random model cannot know"
    assert "single-key" in capsys.readouterr().out
