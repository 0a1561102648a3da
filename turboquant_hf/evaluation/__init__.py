"""Measures a cache: quality, memory and time.

- `commands/`: one file per subcommand of `turboquant-hf`: its flags, and what it does.
- `harness/`: what commands share: run descriptions, output folders, models, texts, decoding, fidelity.
- `presets/`: what can be computed about a preset without a model: bits, bytes, widths.
- `tasks/`: the questions that models are asked: needles, retrieval tasks, LongBench.
- `metrics/`: how answers are scored, one file per metric.
- `rivals/`: other methods and other libraries' caches.
- `benchmark/`: speed and memory.
- `report/`: makes one page from the folders of finished runs.
- `labels.py`: words that all tables and pictures share.

A room imports only what tests/test_imports.py allows it; reports import no experiment.

The names below are public: tutorial and recipes use them, and `docs/api.md` describes them. Each is imported when it is
first used.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "capture": "vectors",
    "errors": "vectors",
    "load_model": "models",
    "measure": "fidelity",
    "packaged_text": "texts",
    "round_trip": "vectors",
}
"""Public name -> the file of `harness` that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.harness.{_EXPORTS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


__all__ = ["capture", "errors", "load_model", "measure", "packaged_text", "round_trip"]
