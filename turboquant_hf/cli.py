"""The console command ``turboquant-hf``: one subcommand per row of ``COMMANDS``."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from turboquant_hf.version import __version__

# name -> (module, help). A module has add_arguments(parser) and run(args) -> exit status; it is imported only
# when its own command is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": (
        "turboquant_hf.launch",
        "run another program with the caches registered: lm_eval, transformers serve, a script",
    ),
    "inspect": (
        "turboquant_hf.evaluation.commands.inspect",
        "estimate a cache's memory from a model's configuration: at a length, and the longest context in a memory",
    ),
    "perplexity": (
        "turboquant_hf.evaluation.commands.perplexity",
        "perplexity, KL and top-1 agreement with the uncompressed model, read through the cache",
    ),
    "needle": (
        "turboquant_hf.evaluation.commands.needle",
        "needle in a haystack: whether a fact is still found, by prompt length and depth",
    ),
    "retrieval": (
        "turboquant_hf.evaluation.commands.retrieval",
        "RULER-style long-context retrieval tasks, generated here",
    ),
    "longbench": (
        "turboquant_hf.evaluation.commands.longbench",
        "LongBench-E, the 13 English and code tasks",
    ),
    "presets": (
        "turboquant_hf.evaluation.commands.presets",
        "bits per channel and expected compression of the shipped presets",
    ),
    "distortion": (
        "turboquant_hf.evaluation.commands.distortion",
        "error of every quantizer beside its theory, on synthetic vectors, a file or a model's keys and values",
    ),
    "neighbours": (
        "turboquant_hf.evaluation.commands.neighbours",
        "nearest-neighbour recall and indexing time beside product quantization and RaBitQ",
    ),
    "qjl-lesson": (
        "turboquant_hf.evaluation.commands.qjl_lesson",
        "compare prod with mse at equal bits: bias, variance, softmax, perplexity",
    ),
    "baselines": (
        "turboquant_hf.evaluation.commands.baselines",
        "published methods and other libraries' caches in the same perplexity/KL harness",
    ),
    "ablate": (
        "turboquant_hf.evaluation.commands.ablate",
        "KL with each part of the presets on and off, and over a grid of widths",
    ),
    "allocate": (
        "turboquant_hf.evaluation.commands.allocate",
        "choose per-layer widths under a bit budget and write them as a preset",
    ),
    "profile": (
        "turboquant_hf.evaluation.commands.profile",
        "a file about this model's queries, keys and values, by which its caches lose less",
    ),
    "check": (
        "turboquant_hf.evaluation.commands.check",
        "check that a preset keeps this model's answers, or find one that does",
    ),
    "benchmark": (
        "turboquant_hf.evaluation.commands.benchmark",
        "speed and memory of kernels, encoding and decode steps beside the best 16-bit caches",
    ),
    "sparse-v": (
        "turboquant_hf.evaluation.commands.sparse_v",
        "share of tiles whose values need not be read, by threshold, with KL and saved time (GPU)",
    ),
    "report": (
        "turboquant_hf.evaluation.commands.report",
        "make one HTML and Markdown page from the folders of finished runs",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; bad input prints one line and exits with 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="turboquant-hf", description="TurboQuant KV caches for transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:
            import_module(module).add_arguments(subparser)

    args = parser.parse_args(argv)
    module, _ = COMMANDS[args.command]
    try:
        return import_module(module).run(args)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe: flush nothing at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
