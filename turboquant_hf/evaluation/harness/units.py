"""Resumable runs: one results folder per run, one line per finished unit.

| file | content |
|---|---|
| `config.yaml` | command and settings |
| `predictions.jsonl` | one JSON line per unit, appended and flushed when the unit finishes |
| `metrics.json` | the metrics, once all units are finished |
| `environment.yaml` | versions, hardware and day, once all units are finished |

- Metrics are computed from the lines in the order of the units. A run that was killed and started again therefore ends
  with the same metrics and predictions, byte by byte, as an unbroken run.
- Under `accelerate launch`, the processes share the units. Each appends to its own file, and the main process merges
  the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from turboquant_hf.evaluation.harness.environment import write_environment
from turboquant_hf.evaluation.harness.folder import CONFIG, METRICS, PREDICTIONS, is_finished, with_tool, write_whole
from turboquant_hf.evaluation.harness.run import Run

HASHES = ("contents",)
"""Settings to name last when several differ: they tell a reader little."""
PATIENCE = timedelta(days=7)
"""How long a process waits for the other processes."""

Unit = Mapping[str, Any]


def run_units(
    run: Run,
    units: Sequence[Unit],
    load: Callable[[str], Callable[[Unit], dict[str, Any]]],
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]],
    finish: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """Predict every unit that the folder of `run` does not hold yet, and return the metrics of all.

    Args:
        run: all settings except the output folder are recorded, and must agree with those of the folder. Without an
            output folder, the run writes no files.
        units: what to predict. Each is a small mapping of plain values, and no two are equal.
        load: device -> a function from a unit to its prediction (plain data). Called only if work is left.
        summarize: predictions, each merged with its unit, in the order of `units` -> metrics (plain data).
        finish: shows the metrics and writes further files into the folder. Only the main process calls it.

    Raises:
        ValueError: the folder belongs to other settings (the message names the field), or a line cannot be read.
    """
    from accelerate import PartialState

    state = PartialState(cpu=run.device == "cpu", timeout=PATIENCE)
    output = run.output
    if output is None:
        if state.num_processes > 1:
            raise ValueError(
                "output=None is not supported by several processes; allowed: a folder that all of them can read"
            )
        with tempfile.TemporaryDirectory() as scratch:
            return run_units(run.with_settings(output=Path(scratch)), units, load, summarize, finish)
    if is_finished(output):
        _check_config(output, run)
        metrics = json.loads((output / METRICS).read_text())
        if state.is_main_process:
            print(f"{output}: finished before, nothing to do (remove the folder or name another --output to repeat it)")
            finish(metrics, output)
        return metrics

    output.mkdir(parents=True, exist_ok=True)
    _check_config(output, run)
    shard = output / (PREDICTIONS if state.is_main_process else f"predictions-{state.process_index}.jsonl")
    _drop_half_line(shard)
    state.wait_for_everyone()
    done = _read_predictions(output, units)
    if done and state.is_main_process:
        print(f"{output}: {len(done)} of {len(units)} units were done before, going on")
    left = [unit for unit in units if _key(unit) not in done]
    state.wait_for_everyone()

    own = left[state.process_index :: state.num_processes]
    if own:
        device = run.device if state.num_processes == 1 else str(state.device)
        predict = load(device)
        with shard.open("a", encoding="utf-8") as file:
            for unit in tqdm(own, unit="unit", desc=output.name, disable=not state.is_main_process):
                file.write(json.dumps({**unit, **predict(unit)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
    state.wait_for_everyone()

    done = _read_predictions(output, units)
    state.wait_for_everyone()  # the others' files are removed below
    metrics = with_tool(run, summarize([done[_key(unit)] for unit in units]))
    if state.is_main_process:
        write_whole(output / PREDICTIONS, "".join(json.dumps(done[_key(unit)]) + "\n" for unit in units))
        for other in output.glob("predictions-*.jsonl"):
            other.unlink()
        write_environment(output, run.device)
        write_whole(output / METRICS, json.dumps(metrics, indent=2) + "\n")
        finish(metrics, output)
    state.wait_for_everyone()
    return metrics


def fingerprint(*contents: Any) -> str:
    """Hashes of content that a setting only names, such as a text file: other content needs another folder."""
    return hashlib.sha256("\0".join(map(repr, contents)).encode()).hexdigest()[:16]


def _check_config(output: Path, run: Run) -> None:
    """Record the settings in a new folder; compare them with those of an old one."""
    config = run.config()
    del config["output"]
    path = output / CONFIG
    if not path.is_file():
        write_whole(path, yaml.safe_dump(config, sort_keys=False))
        return
    known = {"tool": run.tool, **yaml.safe_load(path.read_text())}  # earlier versions do not record it
    for key in sorted(known.keys() | config.keys(), key=lambda key: (key in HASHES, key)):
        if known.get(key) != config.get(key):
            raise ValueError(
                f"{key}={config.get(key)!r} does not continue the run in {output}, which has {known.get(key)!r}; "
                "name another --output or remove the folder"
            )


def _key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)


def _drop_half_line(path: Path) -> None:
    """Cut off an incomplete last line, which a killed process has left."""
    if path.is_file():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


def _read_predictions(output: Path, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    """Finished units of all processes, by key."""
    fields = units[0].keys() if units else ()
    found = {}
    for path in sorted(output.glob("predictions*.jsonl")):
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
            try:
                record = json.loads(line)
                found[_key({field: record[field] for field in fields})] = record
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}: line {number} is not a prediction of this run; remove the line") from error
    return found
