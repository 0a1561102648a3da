"""Resumable runs: one results folder a run, one line a finished unit.

A folder holds `config.yaml` (the settings), `predictions.jsonl` (one JSON line a unit, appended and flushed as each
finishes) and, once all units are there, `metrics.json` and `environment.yaml` (versions, hardware and day). Metrics are
computed from the lines in the order of the units, so a run that was killed and started again ends with the same
metrics and predictions, byte by byte, as an unbroken one. Under `accelerate launch` the units are shared out over the
processes; each appends to a file of its own, and the main process merges them.
"""

from __future__ import annotations

import argparse
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

from turboquant_hf.evaluation import common, decoding
from turboquant_hf.evaluation.environment import write_environment
from turboquant_hf.evaluation.haystack import Haystack, read_haystack
from turboquant_hf.evaluation.models import load_model

CONFIG, METRICS, PREDICTIONS = "config.yaml", "metrics.json", "predictions.jsonl"
HASHES = ("contents",)
"""Settings that say little to a reader: the last to be named where several differ."""
NOT_SETTINGS = {"command", "config", "output", "defaults"}
PATIENCE = timedelta(days=7)
"""How long a process waits for the others to finish their share."""

Unit = Mapping[str, Any]


def run_units(
    options: argparse.Namespace,
    units: Sequence[Unit],
    load: Callable[[str], Callable[[Unit], dict[str, Any]]],
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]],
    finish: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """Predict every unit that `options.output` does not hold yet, and return the metrics of all.

    Args:
        options: the settings; all but the output folder are recorded and must agree with the folder's. Without an
            output folder the run leaves nothing behind.
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
    if output is None:
        if state.num_processes > 1:
            raise ValueError("output=None is not supported by several processes; allowed: a folder that all can see")
        with tempfile.TemporaryDirectory() as scratch:
            nameless = argparse.Namespace(**{**vars(options), "output": Path(scratch)})
            return run_units(nameless, units, load, summarize, finish)
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
    state.wait_for_everyone()  # the others' files are removed below
    metrics = summarize([done[_key(unit)] for unit in units])
    if state.is_main_process:
        _write(output / PREDICTIONS, "".join(json.dumps(done[_key(unit)]) + "\n" for unit in units))
        for other in output.glob("predictions-*.jsonl"):
            other.unlink()
        write_environment(output, options.device)
        _write(output / METRICS, json.dumps(metrics, indent=2) + "\n")
        finish(metrics, output)
    state.wait_for_everyone()
    return metrics


def run_prompts(
    options: argparse.Namespace,
    make_units: Callable[[list[str]], list[dict[str, Any]]],
    predict: Callable[..., dict[str, Any]],
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]],
    finish: Callable[[dict[str, Any], Path], None],
) -> dict[str, Any]:
    """`run_units` over prompts cut from a haystack, each read through one of the caches of `options.preset`.

    Args:
        make_units: names of the caches, the uncompressed one first -> units, each with its "preset".
        predict: (model, haystack, preset, unit, options) -> prediction.
    """
    options.dtype = common.resolve_dtype(options)
    caches = decoding.resolve_caches(options.preset, options.recent_window)
    units = make_units(list(caches))
    decoding.check_packed(caches, max(unit["length"] for unit in units))
    options.haystack, text = read_haystack(options)
    options.contents = fingerprint(text, *caches.values())

    def load(device: str) -> Callable[[Unit], dict[str, Any]]:
        model, tokenizer = load_model(
            options.model, dtype=options.dtype, device=device, attn_implementation=options.attention
        )
        haystack = Haystack(tokenizer, text)
        return lambda unit: predict(model, haystack, caches[unit["preset"]], unit, options)

    def metrics(records: list[dict[str, Any]]) -> dict[str, Any]:
        windows = {name: preset.recent_window for name, preset in caches.items() if preset is not None}
        about = {"model": options.model, "text": options.haystack, "recent_windows": windows}
        return about | summarize(records)

    return run_units(options, units, load, metrics, finish)


def fingerprint(*contents: Any) -> str:
    """Of what a setting only names, such as the text in a file: a folder of other contents is not continued."""
    return hashlib.sha256("\0".join(map(repr, contents)).encode()).hexdigest()[:16]


def _check_config(output: Path, options: argparse.Namespace) -> None:
    """Record the settings in a new folder; compare them with those of an old one."""
    config = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    config = json.loads(json.dumps(config, default=str))
    path = output / CONFIG
    if not path.is_file():
        _write(path, yaml.safe_dump(config, sort_keys=False))
        return
    known = yaml.safe_load(path.read_text())
    for key in sorted(known.keys() | config.keys(), key=lambda key: (key in HASHES, key)):
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
