"""Brings metrics of earlier versions into the form of today. This is the only place where a report guesses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turboquant_hf.evaluation.labels import UNCOMPRESSED


def brought_up_to_date(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The same metrics with the name of the command, and with "uncompressed" instead of "baseline" in rows."""
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
    """The command that wrote metrics without its name, by the fields of the first row; "" if none fits."""
    rows = metrics.get("results")
    first = rows[0] if isinstance(rows, list) and rows else {}
    fields = first.keys() if isinstance(first, Mapping) else set()
    if {"length", "depth", "accuracy"} <= fields:
        return "needle"
    if {"task", "score"} <= fields:
        return "longbench" if "category" in fields else "retrieval"
    return "perplexity" if "kl" in fields else ""
