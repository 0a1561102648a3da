"""LongBench-E on made-up samples: metrics against values worked out by hand, prompts, data, the whole command."""

import json
import zipfile

import pytest

from turboquant_hf import cli
from turboquant_hf.evaluation.commands import longbench
from turboquant_hf.evaluation.tasks import longbench as tasks

SAMPLES = {
    "qasper": {
        "input": "What was tested?",
        "context": "We tested {braces} in the rain.",
        "answers": ["braces", "{braces}"],
    },
    "multifieldqa_en": {"input": "Who came?", "context": "Ann came late.", "answers": ["Ann"]},
    "hotpotqa": {"input": "Where is it?", "context": "Passage 1: It is in Oslo.", "answers": ["Oslo"]},
    "2wikimqa": {"input": "Who was first?", "context": "Passage 1: Bo was first.", "answers": ["Bo"]},
    "gov_report": {"input": "", "context": "Roads were mended. " * 30, "answers": ["Roads were mended."]},
    "multi_news": {"input": "", "context": "It rained on Monday.", "answers": ["Rain fell."]},
    "trec": {
        "input": "Question: How far is it?\nType:",
        "context": "Question: Who wrote it?\nType: Individual",
        "answers": ["Distance"],
        "all_classes": ["Individual", "Distance", "City"],
    },
    "triviaqa": {
        "input": "Question: Which sea?\nAnswer:",
        "context": "Passage: The North Sea.",
        "answers": ["North Sea"],
    },
    "samsum": {
        "input": "Dialogue: A: hi B: hi\nSummary: ",
        "context": "Dialogue: C: bye\nSummary: C leaves.",
        "answers": ["A greets B."],
    },
    "passage_count": {"input": "", "context": "Paragraph 1: x\n\nParagraph 2: x", "answers": ["1"]},
    "passage_retrieval_en": {
        "input": "About bees.",
        "context": "Paragraph 1: ants\n\nParagraph 2: bees",
        "answers": ["Paragraph 2"],
    },
    "lcc": {"input": "", "context": "def add(a, b):\n", "answers": ["    return a + b"]},
    "repobench-p": {"input": "x = add(1, 2)\n", "context": "def add(a, b): ...\n", "answers": ["print(x)"]},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longbench")
    for task, sample in SAMPLES.items():
        row = {"length": 3000, "all_classes": None, "language": "en", "dataset": task, "_id": "0", **sample}
        rows = [row, {**row, "length": 9000}]
        (folder / f"{task}_e.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps its files among the tests'; skips without it."""
    pytest.importorskip("datasets")
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.EXTRACTED_DATASETS_PATH", cache / "extracted")


@pytest.fixture
def load_metric(own_cache):
    """Skips without `evaluate`."""
    pytest.importorskip("evaluate")
    from turboquant_hf.evaluation import metrics

    return metrics.load_metric


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        # 2 shared words of 3 and 2: 2 * 2 / 5.
        ("qa_f1", "The big red house!", ["a red house"], 4 / 5),
        ("qa_f1", "blue", ["red", "Blue."], 1.0),
        ("qa_f1", "blue", ["red"], 0.0),
        # Words in common, in order: a c. 2 of 3 and 2 of 4 distinct words.
        ("rouge_l", "a b c", ["a x c y"], 4 / 7),
        # By sentence: the order of the sentences does not count.
        ("rouge_l", "c d. a b.", ["a b. c d"], 1.0),
        ("rouge_l", "", ["a"], 0.0),
        ("number_match", "Paragraph 3 or 12, then 3", ["Paragraph 3"], 2 / 3),
        ("number_match", "30", ["3"], 0.0),
        ("number_match", "none", ["3"], 0.0),
        # "abcd" and "bcde": 2 * 3 / 8.
        ("edit_similarity", "# a comment\n`\nabcd\nmore", ["bcde"], 0.75),
        ("edit_similarity", "\n\nx = 1", ["x = 1"], 1.0),
        # 2 * 2 / 3 = 0.6667, in whole percent.
        ("edit_similarity", "ab", ["a b"], 0.8),
        ("edit_similarity", "a", ["ab"], 0.67),
    ],
)
def test_metrics_against_hand_computed_values(load_metric, metric, prediction, references, expected):
    value = load_metric(metric).compute(predictions=[prediction], references=[references])["score"]
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("City", 0.0), ("Other number", 1.0), ("Other number in a City", 0.5), ("number", 0.0)],
)
def test_classification_counts_the_classes_named(load_metric, prediction, expected):
    metric = load_metric("classification")
    classes = ["number", "Other number", "City"]
    assert metric.compute(predictions=[prediction], references=[["Other number"]], classes=classes) == {
        "score": expected
    }


def test_metrics_are_means(load_metric):
    metric = load_metric("qa_f1")
    assert metric.compute(predictions=["a dog", "cat"], references=[["dog"], ["dog"]]) == {"score": 0.5}


@pytest.mark.usefixtures("load_metric")
def test_few_shot_answers_are_their_first_line():
    record = {"prediction": "\n\nNorth Sea\nQuestion: Which lake?", "answers": ["North Sea"], "classes": []}
    assert longbench.score("triviaqa", [record]) == 100.0
    assert longbench.score("hotpotqa", [record]) == pytest.approx(100 * 2 * 2 / 7)


def test_truncate_middle_keeps_both_ends(tokenizer):
    assert tasks.truncate_middle(tokenizer, "abcdefghij", 10) == "abcdefghij"
    assert tasks.truncate_middle(tokenizer, "abcdefghij", 4) == "abij"


def test_encode_prompt_fills_the_template_in(tokenizer):
    row = {"context": "A {input} {context} text.", "input": "Why {x}?"}
    prompt = tasks.encode_prompt(tokenizer, "Read:\n{context}\nQ: {input}\nA:", row, 1000, chat=True)
    assert tokenizer.decode(prompt) == "Read:\nA {input} {context} text.\nQ: Why {x}?\nA:"


def test_encode_prompt_uses_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}!", raising=False
    )
    row = {"context": "c", "input": "i"}
    texts = [
        tokenizer.decode(tasks.encode_prompt(tokenizer, "{context}{input}", row, 9, chat)) for chat in (True, False)
    ]
    assert texts == ["<ci>!", "ci"]


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_every_task_has_its_parts(task):
    prompt = tasks.TASKS[task].prompt
    assert prompt.count("{context}") == 1 and tasks.TASKS[task].category in tasks.CATEGORIES
    assert ("{input}" in prompt) == (task not in ("gov_report", "multi_news", "passage_count", "lcc"))


@pytest.mark.usefixtures("own_cache")
def test_load_data_from_a_folder_and_a_zip(data, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(data / "trec_e.jsonl", "data/trec_e.jsonl")
    for source in (str(data), str(tmp_path / "data.zip")):
        rows = tasks.load_data(source, "trec")
        assert rows["all_classes"] == [["Individual", "Distance", "City"]] * 2
    assert len(tasks.load_data(str(data), "trec", limit=1)) == 1
    with pytest.raises(FileNotFoundError, match="qasper_e.jsonl"):
        tasks.load_data(str(tmp_path), "qasper")


@pytest.mark.usefixtures("load_metric")
def test_table_averages_tasks_as_the_paper_does():
    record = {"preset": "uncompressed", "answers": ["x"], "classes": [], "bits": 16.0, "smaller": 1.0, "length": 5000}
    metrics = longbench.summarize(
        [
            {**record, "task": "qasper", "prediction": "x"},
            {**record, "task": "hotpotqa", "prediction": "y"},
            {**record, "task": "2wikimqa", "prediction": "y"},
        ]
    )
    assert metrics["results"][0]["by_length"] == {"4-8k": 100.0}
    lines = longbench.table(metrics, "float32").splitlines()
    assert lines[0].split() == ["cache", "bits", "smaller", "SingleQA", "MultiQA", "average"]
    assert lines[-1].split() == ["uncompressed", "(float32)", "32", "0.5", "100", "0", "33.33"]


@pytest.mark.slow
@pytest.mark.usefixtures("load_metric")
def test_longbench_command_runs_all_tasks(tiny_folder, data, tmp_path, capsys):
    output = tmp_path / "run"
    argv = ["longbench", "--model", str(tiny_folder), "--data", str(data), "--preset", "k4v4", "--limit", "1"]
    argv += ["--device", "cpu", "--max-length", "400", "--output", str(output)]
    assert cli.main(argv) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert {row["task"] for row in metrics["results"]} == set(tasks.TASKS)
    assert metrics["caches"]["k4v4"]["bits"] < 12 < metrics["caches"]["uncompressed"]["bits"]
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 13 and max(line["prompt_tokens"] for line in lines) == 400
    own = [line for line in lines if line["preset"] == "k4v4"]
    assert all(line["bits"] < 8 for line in own if line["prompt_tokens"] >= 256)
    assert any(line["bits"] == 16 for line in own), "nothing packed, nothing saved"
    assert all(line["prediction"] for line in lines if line["task"] == "samsum")
    assert metrics["tool"] == "longbench" and metrics["recent_windows"] == {"k4v4": 128}
    assert "uncompressed (float32)" in capsys.readouterr().out


def test_prompts_file_replaces_templates(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"lcc": "{context}", "vcsum": "{context}"}))
    templates = tasks.read_prompts(str(path))
    assert templates["lcc"] == "{context}" and templates["trec"] == tasks.TASKS["trec"].prompt


@pytest.mark.usefixtures("load_metric")
def test_other_samples_do_not_continue_a_run(tiny_folder, data, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    text = (data / "trec_e.jsonl").read_text()
    (folder / "trec_e.jsonl").write_text(text)
    argv = ["longbench", "--model", str(tiny_folder), "--data", str(folder), "--tasks", "trec", "--preset", "k4v4"]
    argv += ["--output", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    (folder / "trec_e.jsonl").write_text(text.replace('"length": 3000', '"length": 3001'))
    assert cli.main(argv) == 2
    assert "does not continue the run" in capsys.readouterr().err
