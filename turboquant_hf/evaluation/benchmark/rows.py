"""Collects the rows of a benchmark: prints them, keeps them on disk, and turns failures into rows with a reason."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

PARTIAL = "partial.json"
IDENTITY = ("level", "what", "shape", "dtype", "batch", "tokens", "chunk", "cache", "backend", "preset", "mode")
SHOWN = ("us", "ms", "overhead_s", "first_token_s")
"""The figures to print for a row: the first of these that it has."""


class Recorder:
    """Collects rows. After each row, `partial.json` in `folder` holds all rows so far, in case the run is killed.

    A run that finds such a file takes over the complete cells (`resume`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._folder, self._begin = folder, time.perf_counter()
        self._earlier: list[dict[str, Any]] = []
        if folder is not None and (folder / PARTIAL).is_file():
            self._earlier = [row for row in json.loads((folder / PARTIAL).read_text()) if row.get("complete")]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row, print it on standard error, and return it."""
        self.rows.append(row)
        identity = " ".join(str(row[key]) for key in IDENTITY if row.get(key) is not None)
        value = next((f"{row[unit]:.4g} {unit}" for unit in SHOWN if row.get(unit) is not None), None)
        print(f"[{self.elapsed:6.1f} s] {identity}: {value or row.get('reason')}", file=sys.stderr, flush=True)
        self._save()
        return row

    def _save(self) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / PARTIAL).write_text(json.dumps([*self._earlier, *self.rows]))

    @contextmanager
    def cell(self, cell: Mapping[str, Any]) -> Iterator[bool]:
        """A context for rows that share the fields of `cell`. Yields False if these rows exist already.

        Cells in which every row failed are measured again.
        """
        found = [row for row in self._earlier if cell.items() <= row.items()]
        self._earlier = [row for row in self._earlier if row not in found]
        self.rows += found
        start = len(self.rows)
        with self.guard(dict(cell)):
            yield not found
            for row in self.rows[start:]:
                row["complete"] = True
        self._save()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    @contextmanager
    def guard(self, row: dict[str, Any]) -> Iterator[None]:
        """Turn a failure within the block into `row` with a reason, so that the other cells are still measured."""
        try:
            yield
        except Exception as error:
            lines = str(error).splitlines() or [""]
            self.add({**row, "reason": f"{type(error).__name__}: {lines[0]}"[:300]})
        # Outside the handler: a live exception keeps its frames, and with them their tensors.
        self.release()

    @staticmethod
    def release() -> None:
        """Return unused device memory to the device."""
        gc.collect()
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # after a fault on the device every call fails, and the rows say so
                torch.cuda.empty_cache()

    def finish(self) -> None:
        """Remove `partial.json`: the rows are in metrics.json now."""
        if self._folder is not None:
            (self._folder / PARTIAL).unlink(missing_ok=True)
