"""Metrics of earlier versions, in the form that commands write today. The only place where a report guesses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turboquant_hf.evaluation.labels import UNCOMPRESSED


def brought_up_to_date(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The same metrics with the name of the command, and with "uncompressed" where "baseline" stood in a row."""
    metrics = {"tool": None, **metrics}
    if metrics["tool"] is None:
        metrics["tool"] = _tool(metrics)
    if isinstance(metrics.get("results"), list):
        metrics["results"] = [
            {**row, "preset": UNCOMPRESSED} if isinstance(row, Mapping) and row.get("preset") == "baseline" else row
            for row in metrics["results"]
        ]
    return metrics


def _tool(metrics: Mapping[str, Any]) -> str:
    """Which command wrote metrics that do not say it, by the fields of their first row; "" where none fits."""
    rows = metrics.get("results")
    first = rows[0] if isinstance(rows, list) and rows else {}
    fields = first.keys() if isinstance(first, Mapping) else set()
    if {"length", "depth", "accuracy"} <= fields:
        return "needle"
    if {"task", "score"} <= fields:
        return "longbench" if "category" in fields else "retrieval"
    return "perplexity" if "kl" in fields else ""
