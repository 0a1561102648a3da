"""The command: its rows, table, pictures and folder."""

import json

import pytest
import torch
import yaml

from tests.support.toys import PRESET, TOY
from turboquant_hf import cli
from turboquant_hf.evaluation.benchmark import settings, table
from turboquant_hf.evaluation.benchmark.plot import plot_level
from turboquant_hf.evaluation.benchmark.rows import PARTIAL, Recorder
from turboquant_hf.evaluation.labels import LEVELS


def test_guard_keeps_the_run_going(tmp_path):
    recorder = Recorder(tmp_path)
    with recorder.guard({"level": "kernel", "backend": "x"}):
        raise torch.OutOfMemoryError("too large\nand more")
    recorder.add({"level": "kernel", "backend": "y", "us": 1.0})
    rows = json.loads((tmp_path / PARTIAL).read_text())
    assert [row.get("reason") for row in rows] == ["OutOfMemoryError: too large", None]
    recorder.finish()
    assert not (tmp_path / PARTIAL).exists()


ROWS = [
    {"level": "kernel", "shape": "toy", "dtype": "float16", "batch": 1, "tokens": tokens, **row}
    for tokens in (4096, 8192)
    for row in (
        {"backend": "sdpa flash", "us": tokens / 100, "floor_us": tokens / 200, "way": "grouped", "error": 1e-3},
        {"backend": "cuda", "preset": "k4v4", "us": tokens / 300, "floor_us": tokens / 800, "speedup": 3.0},
        {"backend": "triton", "preset": "k4v4", "us": None, "reason": "relative | error"},
    )
]


def test_markdown():
    text = table.to_markdown(ROWS, "a card")
    lines = text.splitlines()
    assert lines[0] == "a card" and len([line for line in lines if line.startswith("| toy")]) == 6
    assert "| toy, float16 | 1 x 4,096 | cuda k4v4 | 13.7 | 3.00 |" in text
    assert "triton k4v4 (relative / error) |  |  |" in text
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_plot(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def noted(axis, x, y, *args, **options):
        drawn[options["label"]] = y
        return plot(axis, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    assert plot_level(ROWS, "kernel", tmp_path / "kernel.png")
    assert (tmp_path / "kernel.png").stat().st_size > 5000
    assert drawn.keys() == {"sdpa flash", "k4v4 cuda", "floor, uncompressed (float16)", "floor, k4v4"}
    assert drawn["floor, k4v4"] == (4096 / 800, 8192 / 800)
    assert not plot_level(ROWS, "model", tmp_path / "model.png")


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    group = {"shape": "toy", "dtype": "float32", "layers": 1, "cells": [[1, 384]]}
    data = {
        "shapes": {"toy": {name: getattr(TOY, name) for name in list(settings.Shape.__annotations__)[1:]}},
        "cpu": dict.fromkeys(LEVELS, [group]),
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(data))
    output = tmp_path / "run"
    command = ["benchmark", "--settings", str(path), "--preset", PRESET, "--device", "cpu", "--output", str(output)]
    assert cli.main([*command, "--steps", "2"]) == 0
    printed = capsys.readouterr()
    assert "**One decode step" in printed.out and "model toy float32 1 384 DynamicCache" in printed.err
    metrics = json.loads((output / "metrics.json").read_text())
    assert {row["level"] for row in metrics["results"]} == set(LEVELS)
    assert not any(row.get("reason") for row in metrics["results"])
    assert metrics["versions"]["torch"] and metrics["copy_gbps"] > 0 and len(metrics["seconds"]) == len(LEVELS)
    assert {path.name for path in output.iterdir()} == {
        "metrics.json", "config.yaml", "environment.yaml", *(f"{level}.png" for level in LEVELS)
    }  # fmt: skip
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["section"] == "cpu" and config["tool"] == metrics["tool"] == "benchmark"
    assert metrics["recent_windows"] == {PRESET: 0}
    assert cli.main(command) == 2
    assert "finished run" in capsys.readouterr().err


@pytest.mark.gpu
def test_quick_cells_on_a_gpu(tmp_path):
    """Small cells of every level: graphs are captured, SDPA's backends take part, and every check passes."""
    output = tmp_path / "run"
    command = ["benchmark", "--quick", "--shapes", "llama-3.2-1b", "--batch", "1", "--tokens", "4096", "--steps", "4"]
    assert cli.main([*command, "--output", str(output)]) == 0
    rows = json.loads((output / "metrics.json").read_text())["results"]
    packed = [row for row in rows if row.get("preset")]
    assert packed and not [row for row in packed if row.get("reason")]
    assert {row["timing"] for row in rows if row["level"] == "kernel" and row.get("us")} == {"graph"}
    assert any(row.get("backend") == "sdpa flash" and row["us"] for row in rows)
