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
        "another program in this process, with the caches registered: lm_eval, transformers serve, a script",
    ),
    "inspect": (
        "turboquant_hf.evaluation.commands.inspect",
        "what a model's cache takes, by its configuration alone: at a length, and the longest context in a memory",
    ),
    "perplexity": (
        "turboquant_hf.evaluation.commands.perplexity",
        "perplexity, KL and top-1 agreement with the uncompressed model, read through the cache",
    ),
    "needle": (
        "turboquant_hf.evaluation.commands.needle",
        "needle in a haystack: is a fact still found, by prompt length and depth",
    ),
    "retrieval": (
        "turboquant_hf.evaluation.commands.retrieval",
        "RULER-style long-context retrieval tasks, made here",
    ),
    "longbench": (
        "turboquant_hf.evaluation.commands.longbench",
        "LongBench-E, the 13 English and code tasks",
    ),
    "presets": (
        "turboquant_hf.evaluation.commands.presets",
        "real bits per channel and expected compression of the shipped presets",
    ),
    "distortion": (
        "turboquant_hf.evaluation.commands.distortion",
        "error of every quantizer beside the theory, on synthetic vectors, a file or a model's keys and values",
    ),
    "neighbours": (
        "turboquant_hf.evaluation.commands.neighbours",
        "nearest-neighbour recall and indexing time beside product quantization and RaBitQ",
    ),
    "qjl-lesson": (
        "turboquant_hf.evaluation.commands.qjl_lesson",
        "prod against mse at equal bits: bias, variance, softmax, perplexity",
    ),
    "baselines": (
        "turboquant_hf.evaluation.commands.baselines",
        "published methods and other libraries' caches in the same perplexity/KL harness",
    ),
    "ablate": (
        "turboquant_hf.evaluation.commands.ablate",
        "each ingredient of the presets on and off, and the width grid, by KL",
    ),
    "allocate": (
        "turboquant_hf.evaluation.commands.allocate",
        "per-layer widths under a bit budget, written as a preset",
    ),
    "profile": (
        "turboquant_hf.evaluation.commands.profile",
        "a file about this model's queries, keys and values, by which its caches lose less",
    ),
    "check": (
        "turboquant_hf.evaluation.commands.check",
        "does a preset leave this model's answers alone, and if not, which one does",
    ),
    "benchmark": (
        "turboquant_hf.evaluation.commands.benchmark",
        "speed and memory of kernels, encoding and decode steps beside the best 16-bit rivals",
    ),
    "sparse-v": (
        "turboquant_hf.evaluation.commands.sparse_v",
        "share of tiles whose values need not be read, by threshold, its KL and the time it saves (GPU)",
    ),
    "report": (
        "turboquant_hf.evaluation.commands.report",
        "one HTML and Markdown page from the runs in some folders",
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
    except BrokenPipeError:  # the reader, such as `head`, has seen enough: nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
