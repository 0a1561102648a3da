"""The console command ``turboquant-hf``: one subcommand per row of ``COMMANDS``."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from turboquant_hf.version import __version__

# name -> (module, help). A module has add_arguments(parser) and run(args) -> exit status; it is imported only
# when its own command is asked for.
COMMANDS: dict[str, tuple[str, str]] = {
    "perplexity": (
        "turboquant_hf.evaluation.perplexity",
        "perplexity, KL and top-1 agreement with the uncompressed model, read through the cache",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; bad input prints one line and exits with 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="turboquant-hf", description="TurboQuant KV caches for transformers."
    )
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
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
