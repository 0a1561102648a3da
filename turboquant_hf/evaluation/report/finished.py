"""Finished runs, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turboquant_hf.evaluation.harness.environment import read_about
from turboquant_hf.evaluation.harness.folder import METRICS
from turboquant_hf.evaluation.labels import cache_label
from turboquant_hf.evaluation.report.earlier import brought_up_to_date

ORDER = ("benchmark", "perplexity", "needle", "retrieval", "longbench", "baselines", "ablate", "allocate", "distortion")
"""Commands in the order of the page. Other runs follow by folder."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that a folder holds.

    Attributes:
        tool: the command that wrote it.
        metrics: the content of metrics.json.
        conditions: date, hardware, versions, dtype and recent window, as far as the folder records them.
    """

    folder: Path
    tool: str
    metrics: Mapping[str, Any]
    conditions: Mapping[str, Any]

    @property
    def title(self) -> str:
        return self.folder.name if self.tool in ("", self.folder.name) else f"{self.tool} ({self.folder.name})"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the run's main table."""
        rows = self.metrics.get("results", [])
        return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []

    @property
    def dtype(self) -> str | None:
        return self.metrics.get("dtype") or self.conditions.get("dtype")

    def label(self, preset: str) -> str:
        """The name of a row's cache on the page."""
        return cache_label(preset, self.dtype)


def read_runs(folders: Iterable[Path]) -> list[FinishedRun]:
    """The runs under some folders, in the order of the page.

    Raises:
        ValueError: there is no metrics.json under the folders, or one cannot be read.
    """
    runs = [_read(path) for path in sorted({path for folder in folders for path in folder.rglob(METRICS)})]
    if not runs:
        raise ValueError(f"no metrics.json under {', '.join(map(str, folders))}")
    return sorted(runs, key=_rank)


def _read(path: Path) -> FinishedRun:
    try:
        metrics = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not supported: {error}") from None
    if not isinstance(metrics, dict):
        raise ValueError(f"{path} is not supported: it holds no mapping")
    metrics = brought_up_to_date(metrics)
    return FinishedRun(path.parent, str(metrics["tool"]), metrics, read_about(path.parent))


def _rank(run: FinishedRun) -> tuple[int, str]:
    return (ORDER.index(run.tool) if run.tool in ORDER else len(ORDER)), str(run.folder)
