"""Rows of a benchmark as they come: printed, kept on disk, and failures with their reason."""

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
"""What says most about a row, the first that it has."""


class Recorder:
    """Collects rows; after each one `partial.json` in `folder` holds all so far, should the run be killed.

    A run that finds such a file takes over the cells that were complete (`resume`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._folder, self._begin = folder, time.perf_counter()
        self._earlier: list[dict[str, Any]] = []
        if folder is not None and (folder / PARTIAL).is_file():
            self._earlier = [row for row in json.loads((folder / PARTIAL).read_text()) if row.get("complete")]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row, show it on standard error, and return it."""
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
        """Rows that belong together, which all have the fields of `cell`; yields False where they are there already.

        Cells that failed as a whole are measured again.
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
        """What fails within the block becomes `row` with a reason: one cell must not cost the others."""
        try:
            yield
        except Exception as error:
            lines = str(error).splitlines() or [""]
            self.add({**row, "reason": f"{type(error).__name__}: {lines[0]}"[:300]})
        # Outside of the handler: a live exception keeps the frames, and with them the tensors, that it passed.
        self.release()

    @staticmethod
    def release() -> None:
        """Give unused device memory back."""
        gc.collect()
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # after a fault on the device every call fails: the rows then say so
                torch.cuda.empty_cache()

    def finish(self) -> None:
        """The rows are elsewhere now."""
        if self._folder is not None:
            (self._folder / PARTIAL).unlink(missing_ok=True)
