"""`turboquant-hf run COMMAND ARGS...`: runs another Python program in this process, with our cache names registered.

If a program does not import this package, transformers refuses the name "turboquant". This command imports the package
first. It can also set a default cache and preset for calls of `generate` that name none.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

HARNESSES = dict.fromkeys(("lm_eval", "lm-eval"), "turboquant_hf.evaluation.harness.lm_eval")
"""{command: the module that adds this package's models to it}."""
SPAWNERS = ("accelerate", "torchrun", "deepspeed")
"""Commands that start their own processes, which would not import this package."""
INTERPRETERS = ("python", "python3", Path(sys.executable).name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [--cache NAME] [--preset NAME] [--cache-config KEY=VALUE] [-m] COMMAND ARGS ..."
    parser.add_argument(
        "--cache",
        metavar="NAME",
        help="turboquant or turboquant_static: the cache for calls of generate that name none "
        "(default: such calls stay uncompressed, and the log says so)",
    )
    parser.add_argument("--preset", metavar="NAME", help="preset or YAML file, for calls that name only the cache")
    parser.add_argument(
        "--cache-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of cache_config for calls that do not set it, such as recent_window=64; may be repeated",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="COMMAND is a module, as for python -m")
    parser.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ARGS",
        help="an installed Python command, a Python file, or a module with -m, and its own arguments",
    )


def run(args: argparse.Namespace) -> int:
    """Run the program and return its exit status. Its exceptions are shown as Python would show them.

    Raises:
        ValueError: there is no program, the program is not Python, or an option is invalid.
    """
    name, arguments, module = _split(args.program, args.module)
    script = None if module else _script(name)
    main = _module(name) if module else script or _command(name)

    # This import loads transformers, and with it the names are registered (`import_hook.py`).
    from turboquant_hf.cache.defaults import set_cache_defaults

    config = _cache_config(args.preset, args.cache_config)
    defaults = set_cache_defaults(args.cache, **config)
    harness = HARNESSES.get(name)
    if harness:
        importlib.import_module(harness)
    sys.argv = [name if script else shutil.which(name) or name, *arguments]
    try:
        return _status(main)
    finally:
        if (args.cache or config) and not defaults.calls:
            hint = "; log-likelihood tasks do not call generate: use --model turboquant" if harness else ""
            print(
                f"turboquant-hf run: {name} made no TurboQuant cache by generate: --cache, --preset and --cache-config "
                f"had no effect{hint}",
                file=sys.stderr,
            )


def _split(program: Sequence[str], module: bool) -> tuple[str, list[str], bool]:
    """(name, arguments, whether it is a module) of the words after the options, without a leading "--" or "python"."""
    program = list(program)
    if program[:1] == ["--"]:
        program = program[1:]
    if not module and program and program[0] in (*INTERPRETERS, sys.executable):
        program = program[1:]
        module = program[:1] == ["-m"]
        program = program[1:] if module else program
    if not program or program[0].startswith("-"):
        given = program[0] if program else "nothing"
        raise ValueError(f"COMMAND: {given} is not supported; allowed: a Python command, a Python file, or -m MODULE")
    return program[0], program[1:], module


def _cache_config(preset: str | None, pairs: Sequence[str]) -> dict[str, Any]:
    """The `cache_config` of the options, each value read as YAML. `set_cache_defaults` checks the fields."""
    config: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"cache-config={pair!r} is not supported; allowed: KEY=VALUE")
        try:
            config[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"cache-config={pair!r} is not supported; allowed: KEY=VALUE, VALUE in YAML") from error
    if preset is not None:
        # An absolute path: the program may change its working folder.
        config["preset"] = str(Path(preset).resolve()) if Path(preset).is_file() else preset
    return config


def _module(name: str) -> Callable[[], Any]:
    def main() -> None:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return main


def _run_file(path: Path) -> None:
    if path.is_file():  # runpy does this itself for a folder
        sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")


def _script(name: str) -> Callable[[], Any] | None:
    """What runs a Python file or a folder with a __main__.py; None if `name` is neither."""
    path = Path(name)
    if not (path.is_file() and path.suffix in (".py", ".pyz")) and not (path / "__main__.py").is_file():
        return None

    return lambda: _run_file(path)


def _command(name: str) -> Callable[[], Any]:
    """What runs the command of an installed package, or a Python script on the PATH."""
    if name in SPAWNERS:
        raise ValueError(
            f"COMMAND: {name} starts its own processes, which would not know the caches; allowed: "
            f"{name} before this command, as in accelerate launch -m turboquant_hf.cli run COMMAND ARGS"
        )
    for point in metadata.entry_points(group="console_scripts", name=name):
        return lambda point=point: point.load()()
    path = shutil.which(name)
    if path is None:
        raise ValueError(
            f"COMMAND: {name!r} is not supported; allowed: a command that a package of this Python installs, "
            "a Python file, or -m MODULE"
        )
    with open(path, "rb") as file:
        first = file.readline()
    if not first.startswith(b"#!") or b"python" not in first:
        raise ValueError(f"COMMAND: {path} is not a Python program, so the caches cannot be registered in it")
    return lambda: _run_file(Path(path))


def _status(main: Callable[[], Any]) -> int:
    """Run `main` as a console command. It returns an exit status or a message."""
    try:
        status = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    if status is None or isinstance(status, int):
        return status or 0
    sys.exit(status)
