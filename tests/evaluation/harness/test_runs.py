"""Resumable runs: killed, continued, repeated, with other settings, and shared by several processes."""

import argparse
import copy
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from turboquant_hf import cli
from turboquant_hf.evaluation.harness.flags import add_settings
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.harness.units import run_units

ROOT = Path(__file__).parents[3]
FILES = ["config.yaml", "environment.yaml", "metrics.json", "predictions.jsonl"]
UNITS = [{"preset": preset, "index": index} for preset in ("a", "b") for index in range(4)]


def options(output, **values):
    return Run("a-tool", {"output": output, "device": "cpu", "preset": ["a", "b"], **values})


def execute(output, predict, **values):
    shown = []
    metrics = run_units(
        options(output, **values),
        UNITS,
        lambda device: predict,
        lambda records: {"total": sum(r["value"] for r in records), "order": [r["index"] for r in records]},
        lambda metrics, folder: shown.append(metrics),
    )
    assert shown == [metrics] and metrics["tool"] == "a-tool"
    return metrics


def predict(unit):
    return {"value": unit["index"] / 3 + (unit["preset"] == "b")}


def test_run_units_writes_settings_predictions_and_metrics(tmp_path):
    metrics = execute(tmp_path, predict, trials=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "tool": "a-tool",
        "device": "cpu",
        "preset": ["a", "b"],
        "trials": 2,
    }
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines == [{**unit, **predict(unit)} for unit in UNITS]


def test_run_units_continues_after_an_interruption(tmp_path):
    execute(tmp_path / "whole", predict)
    calls = []

    def interrupted(unit):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(unit)
        return predict(unit)

    with pytest.raises(KeyboardInterrupt):
        execute(tmp_path / "killed", interrupted)
    # A process killed in the middle of a write leaves half a line.
    with (tmp_path / "killed" / "predictions.jsonl").open("a") as file:
        file.write('{"preset": "a", "ind')

    def rest(unit):
        calls.append(unit)
        return predict(unit)

    execute(tmp_path / "killed", rest)
    assert calls == UNITS
    for name in ("metrics.json", "predictions.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_run_units_does_not_repeat_a_finished_run(tmp_path, capsys):
    first = execute(tmp_path, predict)

    def never(unit):
        raise AssertionError("predicted again")

    assert execute(tmp_path, never) == first
    assert "finished before" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_goes_on_though_it_names_no_tool(tmp_path):
    whole = execute(tmp_path, predict)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del config["tool"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (tmp_path / "metrics.json").unlink()
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_text("".join(lines[:3]))
    calls = []
    assert execute(tmp_path, lambda unit: calls.append(unit) or predict(unit)) == whole
    assert calls == UNITS[3:]


def test_a_folder_of_another_tool_is_refused(tmp_path):
    execute(tmp_path, predict)
    with pytest.raises(ValueError, match="tool='another' does not continue"):
        run_units(Run("another", options(tmp_path).values), UNITS, None, None, None)


def test_a_run_never_changes():
    run = Run("a-tool", {"preset": ["a"], "output": Path("out"), "trials": 2})
    for change in (
        lambda: setattr(run, "trials", 3),
        lambda: run.values.update(trials=3),
        lambda: run.preset.append("b"),
    ):
        with pytest.raises((AttributeError, TypeError)):
            change()
    part = run.with_settings(trials=3).part("inner", tool="part")
    assert (part.tool, part.trials, part.output, run.trials) == ("part", 3, Path("out/inner"), 2)
    assert part.config() == {"tool": "part", "preset": ["a"], "output": "out/inner", "trials": 3}
    with pytest.raises(AttributeError, match="a run of 'a-tool' has no setting 'colour'"):
        _ = run.colour


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_run_can_be_copied_and_pickled(copied):
    run = Run("a-tool", {"preset": ["a"], "output": Path("out")})
    other = copied(run)
    assert other == run and other.preset == ("a",) and other.config() == run.config()
    with pytest.raises(TypeError):
        other.values["preset"] = ()


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_run_units_refuses_a_folder_of_other_settings(tmp_path, finished):
    execute(tmp_path, predict, trials=2)
    if not finished:
        (tmp_path / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"trials=3 does not continue .* has 2"):
        execute(tmp_path, predict, trials=3)


def test_run_units_names_a_broken_line(tmp_path):
    execute(tmp_path, predict)
    (tmp_path / "metrics.json").unlink()
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "predictions.jsonl").write_text("\n".join([lines[0], "nonsense", *lines[2:], ""]))
    with pytest.raises(ValueError, match="line 2 is not a prediction"):
        execute(tmp_path, predict)


def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--dataset")
    parser.add_argument("--preset", action="extend", nargs="+", default=["k4v4"])
    parser.add_argument("--recent-window", type=int)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, default=Path("results/x"))
    add_settings(parser)
    return Run.of(argparse.Namespace(**vars(parser.parse_args(argv)), command="a-tool"))


def test_settings_are_defaults_then_yaml_then_flags(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("recent-window: 0\ntrials: 5\npreset: [k3v3]\nchat: false\noutput: there\n")
    assert parse([]).values == {
        "text": None, "dataset": None, "preset": ("k4v4",), "recent_window": None, "trials": 2, "chat": True,
        "output": Path("results/x"),
    }  # fmt: skip
    # A flag has priority over the file even if it equals the default.
    mixed = parse(["--trials", "2", "--config", str(file)])
    assert (mixed.trials, mixed.recent_window, mixed.preset, mixed.chat) == (2, 0, ("k3v3",), False)
    assert mixed.output == Path("there")
    assert parse(["--config", str(file), "--chat", "--preset", "a", "--preset", "b"]).preset == ("a", "b")


def test_settings_take_the_later_of_two_exclusive_sources(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("text: [book.txt]\n")
    assert parse(["--config", str(file)]).text == ("book.txt",)
    mixed = parse(["--config", str(file), "--dataset", "pg19"])
    assert (mixed.text, mixed.dataset) == (None, "pg19")


def test_settings_name_an_unknown_field(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("trails: 5\n")
    with pytest.raises(ValueError, match="unknown field 'trails'; allowed: .*trials"):
        parse(["--config", str(file)])


@pytest.mark.parametrize("command", ["needle", "retrieval", "longbench"])
def test_shipped_settings_fit_their_command(command, capsys, tmp_path):
    argv = [command, "--config", command, "--preset", "no-such-preset", "--output", str(tmp_path)]
    assert cli.main(argv) == 2
    assert "preset='no-such-preset' is not supported" in capsys.readouterr().err


def needle_command(tiny_folder, text, output):
    return [
        "needle", "--model", str(tiny_folder), "--text", str(text), "--preset", "k4v4", "paper-mse-2",
        "--lengths", "384", "512", "--recent-window", "0", "--device", "cpu", "--trials", "2", "--output", str(output),
    ]  # fmt: skip


def start(argv, **options):
    """A process of the command line, with the environment and the number of threads of this one."""
    values = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, **values, **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-m", "turboquant_hf.cli", *argv], env=environment, text=True, **options)


@pytest.mark.slow
def test_killed_process_ends_with_the_bytes_of_an_unbroken_run(tmp_path, tiny_folder):
    text = tmp_path / "text.txt"
    text.write_text("Some plain text to look through, line by line.\n" * 60)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.main(needle_command(tiny_folder, text, whole)) == 0

    process = start(needle_command(tiny_folder, text, killed), stderr=subprocess.DEVNULL)
    predictions = killed / "predictions.jsonl"
    deadline = time.monotonic() + 60
    while not (predictions.is_file() and predictions.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert predictions.read_bytes().count(b"\n") >= 2
    assert not (killed / "metrics.json").exists(), "the process was killed too late"

    # Continued by two processes, as `accelerate launch` starts them.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    launched = [
        start(
            needle_command(tiny_folder, text, killed),
            env={
                **meeting,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2",
                "ACCELERATE_USE_CPU": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in launched]
    assert [process.returncode for process in launched] == [0, 0], outputs
    assert "units were done before" in outputs[0][0] and outputs[1][0] == ""
    for name in ("metrics.json", "predictions.jsonl", "config.yaml"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_accelerate_launch_shares_the_units_out(tmp_path, tiny_folder):
    """`accelerate launch` with two processes: the metrics of one process, byte for byte."""
    text = tmp_path / "text.txt"
    text.write_text("Some plain text to look through, line by line.\n" * 60)
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(needle_command(tiny_folder, text, one)) == 0
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += [f"--main_process_port={free.getsockname()[1]}", "-m", "turboquant_hf.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command += needle_command(tiny_folder, text, two)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("metrics.json", "predictions.jsonl", "config.yaml"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
