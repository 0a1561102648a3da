"""Needle in a haystack: where the needle lies, what is scored, what is written."""

import json

import pytest

from turboquant_hf import cli
from turboquant_hf.evaluation.commands import needle

TEXT = "".join(f"Line {i} of a long and quiet text. " for i in range(200))


def test_summarize_takes_means_and_keeps_the_control_apart():
    cell = {"preset": "k4v4", "style": "number", "length": 512}
    metrics = needle.summarize(
        [
            {**cell, "depth": 0.5, "found": [True, False], "nll": [0.5, 1.0]},
            {**cell, "depth": None, "found": [False, False], "nll": [3.0, 4.0]},
        ]
    )
    assert metrics == {
        "results": [{**cell, "depth": 0.5, "accuracy": 0.5, "nll": 0.75}],
        "control": [{**cell, "accuracy": 0.0, "nll": 3.5}],
    }
    assert needle.table(metrics, "float32").splitlines()[-1].split() == ["(no", "needle)", "512", "0", "3.5"]


def test_needle_command_writes_a_run(tiny_folder, tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    argv = ["needle", "--model", str(tiny_folder), "--text", str(text), "--preset", "k4v4", "--lengths", "320"]
    argv += ["--depths", "0", "1", "--trials", "2", "--device", "cpu", "--output", str(output)]
    assert cli.main(argv) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert [(r["preset"], r["style"], r["length"], r["depth"]) for r in metrics["results"]] == [
        (preset, "number", 320, depth) for preset in ("uncompressed", "k4v4") for depth in (0.0, 1.0)
    ]
    assert all(r["nll"] > 0 for r in metrics["results"])
    assert [row["accuracy"] for row in metrics["control"]] == [0.0]
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"heatmap-uncompressed.png", "heatmap-k4v4.png", "difference-k4v4.png"}
    assert "(no needle)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "1.5"], "depths: 1.5 is not supported"),
        (["--lengths", "300", "300"], "lengths="),
        (["--trials", "0"], "trials=0 is not supported"),
    ],
)
def test_needle_command_refuses_bad_settings(flags, message, capsys, tmp_path):
    assert cli.main(["needle", "--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
