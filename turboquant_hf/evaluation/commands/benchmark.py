"""`turboquant-hf benchmark`: the levels of `turboquant_hf.evaluation.benchmark`, one after another."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.harness.environment import device_name, versions
from turboquant_hf.evaluation.harness.flags import whole
from turboquant_hf.evaluation.harness.folder import check_output, write_run
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.labels import LEVELS
from turboquant_hf.evaluation.presets.named import recent_windows
from turboquant_hf.resources import config_path

if TYPE_CHECKING:
    from turboquant_hf.evaluation.benchmark.settings import Group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", type=Path, default=config_path("eval", "benchmark.yaml"), help="YAML of shapes and cells"
    )
    parser.add_argument("--only", nargs="+", choices=LEVELS, default=list(LEVELS), help="levels to measure")
    parser.add_argument("--quick", action="store_true", help="only the few cells of the section `quick`")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="shapes of the settings, instead of all used there")
    parser.add_argument("--batch", type=whole(1), nargs="+", metavar="N", help="sequences; combined with --tokens")
    parser.add_argument("--tokens", type=whole(1), nargs="+", metavar="N", help="tokens in the cache")
    parser.add_argument("--preset", nargs="+", metavar="NAME", help="preset names or YAML paths")
    parser.add_argument("--dtype", help="float16, bfloat16 or float32")
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="values of TURBOQUANT_BACKEND, for the kernel and encode levels"
    )
    parser.add_argument(
        "--steps", type=whole(1), default=None, help="timed decode steps of a model (32; generate: 55; on a CPU: 3)"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="generate level: leave out StaticCache, which is compiled"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="folder for metrics.json, config.yaml and plots")


def run(args: argparse.Namespace) -> int:
    """Measure, write the run's folder, print a table. Returns 0."""
    # Imported here, because the levels import transformers' models and --help does not need them.
    from turboquant_hf.evaluation.benchmark import capacity, encode, generate, kernels, model, settings, table
    from turboquant_hf.evaluation.benchmark.rows import Recorder
    from turboquant_hf.evaluation.benchmark.timing import copy_bandwidth

    asked = Run.of(args)
    check_output(asked)
    with asked.settings.open() as file:
        data = yaml.safe_load(file)
    device = torch.device(asked.device)
    section = "cpu" if device.type != "cuda" else "quick" if asked.quick else "full"
    groups = settings.read_groups(data, section, asked.only)
    flags = {"names": asked.shapes, "batch": asked.batch, "tokens": asked.tokens, "presets": asked.preset}
    shapes = settings.read_shapes(data)
    groups = {name: settings.narrow(own, shapes, dtype=asked.dtype, **flags) for name, own in groups.items()}
    steps = asked.steps or (32 if device.type == "cuda" else 3)
    generated = asked.steps or (55 if device.type == "cuda" else 3)
    names = kernels.backends(device, asked.backend)

    recorder = Recorder(asked.output)
    bandwidth = copy_bandwidth(device)
    seconds = {}
    for level, own in groups.items():
        begin = time.perf_counter()
        for group in own:
            row = {"level": level, "shape": group.shape.name, "dtype": group.dtype, "batch": 0, "tokens": 0}
            with recorder.guard(row), torch.no_grad():
                if level == "kernel":
                    kernels.run_group(group, names, device, bandwidth, recorder)
                elif level == "encode":
                    encode.run_group(group, asked.backend, device, bandwidth, recorder)
                elif level == "generate":
                    generate.run_group(group, device, bandwidth, generated, not asked.no_compile, recorder)
                elif level == "capacity":
                    capacity.run_group(group, device, bandwidth, steps, recorder)
                else:
                    model.run_group(group, device, bandwidth, steps, recorder)
        seconds[level] = round(time.perf_counter() - begin, 1)
    metrics = {
        "device": device_name(device), "versions": versions(), "copy_gbps": bandwidth / 1e9,
        "recent_windows": windows_of(groups), "seconds": seconds, "results": recorder.rows,
    }  # fmt: skip
    write(asked.with_settings(section=section), metrics)
    recorder.finish()
    about = f"{metrics['device']}, copy bandwidth {metrics['copy_gbps']:,.0f} GB/s"
    if device.type != "cuda":
        about += "; small shapes that show what is measured: their times say nothing about a GPU's"
    print(table.to_markdown(recorder.rows, about))
    return 0


def windows_of(groups: Mapping[str, Sequence[Group]]) -> dict[str, int]:
    """Recent windows of the presets. A preset that cannot be read is left out here; its row has a reason."""
    presets = []
    for name in dict.fromkeys(name for own in groups.values() for group in own for name in group.presets):
        with suppress(ValueError, OSError):
            presets.append(load_preset(name))
    return recent_windows(presets)


def write(asked: Run, metrics: dict[str, Any]) -> None:
    """Write metrics.json, config.yaml and one picture per level."""
    from turboquant_hf.evaluation.benchmark.plot import plot_level

    if asked.output is None:
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    for level in LEVELS:
        plot_level(metrics["results"], level, asked.output / f"{level}.png", metrics["device"])
    write_run(asked, metrics, indent=1)
