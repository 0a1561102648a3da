"""Resumable runs: one results folder a run, one line a finished unit, settings from defaults, YAML and flags.

A folder holds `config.yaml` (the settings), `predictions.jsonl` (one JSON line a unit, appended and flushed as each
finishes) and, once all units are there, `metrics.json`. Metrics are computed from the lines in the order of the units,
so a run that was killed and started again ends with the same bytes as an unbroken one. Under `accelerate launch` the
units are shared out over the processes; each appends to a file of its own, and the main process merges them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from turboquant_hf.resources import config_path

CONFIG, METRICS, PREDICTIONS = "config.yaml", "metrics.json", "predictions.jsonl"
NOT_SETTINGS = {"command", "config", "output", "defaults"}
EXCLUSIVE = ("text", "dataset")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others to finish their share."""

Unit = Mapping[str, Any]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add --config, and let `settings` tell a flag that was given from one that was not. Call after all other flags."""
    defaults = vars(parser.parse_args([]))
    parser.set_defaults(**dict.fromkeys(defaults), defaults=defaults)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, or the name of one in configs/eval")


def settings(args: argparse.Namespace) -> argparse.Namespace:
    """Defaults, overridden by --config, overridden by the flags that were given.

    Raises:
        ValueError: the file has a field that is not a flag of this command.
    """
    given = {key: value for key, value in vars(args).items() if key in args.defaults and value is not None}
    merged = dict(args.defaults)
    for layer in (_read_config(args.config, set(args.defaults)), given):
        if any(layer.get(name) is not None for name in EXCLUSIVE):
            merged.update({name: None for name in EXCLUSIVE if name in merged})
        merged.update(layer)
    if merged.get("output") is not None:
        merged["output"] = Path(merged["output"])
    return argparse.Namespace(**merged)


def _read_config(name: str | None, allowed: set[str]) -> dict[str, Any]:
    if name is None:
        return {}
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = config_path("eval", f"{name}.yaml")
    data = yaml.safe_load(path.read_text()) or {}
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: a settings file holds a mapping of fields, got {type(data).__name__}")
    data = {key.replace("-", "_"): value for key, value in data.items()}
    for key in data:
        if key not in allowed:
            raise ValueError(f"{path}: unknown field {key!r}; allowed: {', '.join(sorted(allowed))}")
    return data


def run_units(
    options: argparse.Namespace,
    units: Sequence[Unit],
    load: Callable[[str], Callable[[Unit], dict[str, Any]]],
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]],
    finish: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """Predict every unit that `options.output` does not hold yet, and return the metrics of all.

    Args:
        options: the settings; all but the output folder are recorded and must agree with the folder's.
        units: what to predict, each a small mapping of plain values, all different.
        load: device -> a function from a unit to its prediction (plain data). Called only where work is left.
        summarize: predictions, each merged with its unit, in the order of `units` -> metrics (plain data).
        finish: shows the metrics and writes what else belongs into the folder; main process only.

    Raises:
        ValueError: the folder belongs to other settings (the message names the field), or a line cannot be read.
    """
    from accelerate import PartialState

    state = PartialState(cpu=options.device == "cpu", timeout=PATIENCE)
    output = options.output
    if (output / METRICS).is_file():
        _check_config(output, options)
        metrics = json.loads((output / METRICS).read_text())
        if state.is_main_process:
            print(f"{output}: finished before, nothing to do (remove the folder or name another --output to repeat it)")
            finish(metrics, output)
        return metrics

    output.mkdir(parents=True, exist_ok=True)
    _check_config(output, options)
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
        device = options.device if state.num_processes == 1 else str(state.device)
        predict = load(device)
        with shard.open("a", encoding="utf-8") as file:
            for unit in tqdm(own, unit="unit", desc=output.name, disable=not state.is_main_process):
                file.write(json.dumps({**unit, **predict(unit)}) + "\n")
                file.flush()
                os.fsync(file.fileno())
    state.wait_for_everyone()

    done = _read_predictions(output, units)
    metrics = summarize([done[_key(unit)] for unit in units])
    if state.is_main_process:
        _write(output / PREDICTIONS, "".join(json.dumps(done[_key(unit)]) + "\n" for unit in units))
        for other in output.glob("predictions-*.jsonl"):
            other.unlink()
        _write(output / METRICS, json.dumps(metrics, indent=2) + "\n")
        finish(metrics, output)
    state.wait_for_everyone()
    return metrics


def _check_config(output: Path, options: argparse.Namespace) -> None:
    """Record the settings in a new folder; compare them with those of an old one."""
    config = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    config = json.loads(json.dumps(config, default=str))
    path = output / CONFIG
    if not path.is_file():
        _write(path, yaml.safe_dump(config, sort_keys=False))
        return
    known = yaml.safe_load(path.read_text())
    for key in sorted(known.keys() | config.keys()):
        if known.get(key) != config.get(key):
            raise ValueError(
                f"{key}={config.get(key)!r} does not continue the run in {output}, which has {known.get(key)!r}; "
                "name another --output or remove the folder"
            )


def _key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)


def _drop_half_line(path: Path) -> None:
    """Cut off what a killed process left after its last whole line."""
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


def _write(path: Path, text: str) -> None:
    """All or nothing: other processes and later runs never see half a file."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
