"""The folder of a run: the names of its files, and functions that write them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from turboquant_hf.evaluation.harness.environment import write_environment
from turboquant_hf.evaluation.harness.run import Run

CONFIG, METRICS, PREDICTIONS = "config.yaml", "metrics.json", "predictions.jsonl"


def check_output(run: Run) -> None:
    """Raise ValueError if the folder holds a finished run, which is never repeated silently."""
    if run.output is not None and is_finished(run.output):
        raise ValueError(f"output={str(run.output)!r} holds a finished run; name another or remove the folder")


def is_finished(output: Path) -> bool:
    """Whether a folder holds the metrics of a run, which are written last."""
    return (output / METRICS).is_file()


def write_run(run: Run, metrics: Mapping[str, Any], indent: int = 2) -> None:
    """Write config.yaml, environment.yaml and metrics.json of one run; nothing without an output folder."""
    if run.output is None:
        return
    run.output.mkdir(parents=True, exist_ok=True)
    write_environment(run.output, run.values.get("device", "cpu"))
    write_whole(run.output / CONFIG, yaml.safe_dump(run.config(), sort_keys=False))
    write_whole(run.output / METRICS, json.dumps(with_tool(run, metrics), indent=indent) + "\n")


def with_tool(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with the name of the command."""
    return {"tool": run.tool, **metrics}


def write_whole(path: Path, text: str) -> None:
    """Write a file, all or nothing: other processes and later runs never see half a file."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
