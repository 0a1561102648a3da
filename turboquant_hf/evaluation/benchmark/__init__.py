"""Speed and memory: kernels, encoding, decode steps and whole calls of generate beside the fairest 16-bit rivals.

A speed is reported only where the numerical check beside it passed; otherwise the row has a `reason`. Times are
medians, rates count the bytes that must be read, and the bandwidth that they are held against is that of a large copy
on the same device in the same run. `ratio_to_fp16` is a time over the best 16-bit time (below 1: faster), `speedup`
its inverse; for eager steps of a model, which the host bounds, of steps taken in turns (`turns.py`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from turboquant_hf.evaluation.environment import device_name, versions, write_environment
from turboquant_hf.evaluation.settings import whole
from turboquant_hf.resources import config_path

METRICS = "metrics.json"
LEVELS = ("kernel", "encode", "model", "generate", "capacity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", type=Path, default=config_path("eval", "benchmark.yaml"), help="YAML of shapes and cells"
    )
    parser.add_argument("--only", nargs="+", choices=LEVELS, default=list(LEVELS), help="levels to measure")
    parser.add_argument("--quick", action="store_true", help="the few cells of the section `quick`")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="shapes of the settings, instead of all used there")
    parser.add_argument("--batch", type=whole(1), nargs="+", metavar="N", help="sequences; combined with --tokens")
    parser.add_argument("--tokens", type=whole(1), nargs="+", metavar="N", help="tokens in the cache")
    parser.add_argument("--preset", nargs="+", metavar="NAME", help="names or YAML paths")
    parser.add_argument("--dtype", help="float16, bfloat16 or float32")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="of TURBOQUANT_BACKEND, for kernel and encode")
    parser.add_argument(
        "--steps", type=whole(1), default=None, help="timed decode steps of a model (32, of generate 55; 3 on a CPU)"
    )
    parser.add_argument("--no-compile", action="store_true", help="generate: leave out StaticCache, which compiles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="folder for metrics.json, config.yaml and plots")


def run(args: argparse.Namespace) -> int:
    """Measure, write the run's folder, print a table; 0 when done."""
    # Each level imports transformers' models, which --help can do without.
    from turboquant_hf.evaluation.benchmark import capacity, encode, generate, kernels, model, settings, table
    from turboquant_hf.evaluation.benchmark.rows import Recorder
    from turboquant_hf.evaluation.benchmark.timing import copy_bandwidth

    check_output(args.output)
    with args.settings.open() as file:
        data = yaml.safe_load(file)
    device = torch.device(args.device)
    section = "cpu" if device.type != "cuda" else "quick" if args.quick else "full"
    groups = settings.read_groups(data, section, args.only)
    flags = {"names": args.shapes, "batch": args.batch, "tokens": args.tokens, "presets": args.preset}
    shapes = settings.read_shapes(data)
    groups = {name: settings.narrow(own, shapes, dtype=args.dtype, **flags) for name, own in groups.items()}
    steps = args.steps or (32 if device.type == "cuda" else 3)
    generated = args.steps or (55 if device.type == "cuda" else 3)
    names = kernels.backends(device, args.backend)

    recorder = Recorder(args.output)
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
                    encode.run_group(group, args.backend, device, bandwidth, recorder)
                elif level == "generate":
                    generate.run_group(group, device, bandwidth, generated, not args.no_compile, recorder)
                elif level == "capacity":
                    capacity.run_group(group, device, bandwidth, steps, recorder)
                else:
                    model.run_group(group, device, bandwidth, steps, recorder)
        seconds[level] = round(time.perf_counter() - begin, 1)
    metrics = {
        "tool": "benchmark", "device": device_name(device), "versions": versions(), "copy_gbps": bandwidth / 1e9,
        "seconds": seconds, "results": recorder.rows,
    }  # fmt: skip
    write(args, section, metrics)
    recorder.finish()
    about = f"{metrics['device']}, copy bandwidth {metrics['copy_gbps']:,.0f} GB/s"
    if device.type != "cuda":
        about += "; small shapes that show what is measured: their times say nothing about a GPU's"
    print(table.to_markdown(recorder.rows, about))
    return 0


def check_output(output: Path | None) -> None:
    """Raise ValueError where a finished run lies: a benchmark is never overwritten."""
    if output is not None and (output / METRICS).is_file():
        raise ValueError(f"output={str(output)!r} holds a finished run; name another or remove the folder")


def write(args: argparse.Namespace, section: str, metrics: dict[str, Any]) -> None:
    """metrics.json, config.yaml and one picture a level."""
    from turboquant_hf.evaluation.benchmark.plot import plot_level

    if args.output is None:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    (args.output / "config.yaml").write_text(yaml.safe_dump({**config, "section": section}, sort_keys=False))
    for level in LEVELS:
        plot_level(metrics["results"], level, args.output / f"{level}.png", metrics["device"])
    write_environment(args.output, args.device)
    (args.output / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
