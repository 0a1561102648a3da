"""The rows of a benchmark as short Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turboquant_hf.evaluation.labels import LEVELS

COLUMNS = {
    "kernel": {
        "us": ("us", "{:.1f}"), "speedup": ("times the best uncompressed", "{:.2f}"), "gbps": ("GB/s", "{:.0f}"),
        "copy_share": ("of copy", "{:.0%}"), "error": ("error", "{:.1e}"),
    },
    "encode": {
        "ms": ("ms", "{:.2f}"), "share_of_prefill": ("of the layer's prefill", "{:.1%}"), "gbps": ("GB/s", "{:.0f}"),
        "alone_ms": ("ms alone, host included", "{:.2f}"), "error": ("error", "{:.1e}"),
    },
    "model": {
        "ms": ("ms", "{:.2f}"), "host_ms": ("host ms", "{:.2f}"), "ratio_to_fp16": ("time / uncompressed", "{:.2f}"),
        "ratio_to_best_fp16": ("time / best uncompressed", "{:.2f}"), "resident_bytes": ("MB held", "{:.0f}"),
        "memory_saved": ("times less", "{:.2f}"), "peak_bytes": ("MB peak", "{:.0f}"), "error": ("error", "{:.1e}"),
    },
}  # fmt: skip
GENERATE = {
    "first_token_s": ("first token s", "{:.2f}"), "ms": ("ms per token", "{:.2f}"),
    "speedup": ("x DynamicCache", "{:.2f}"), "speedup_to_eager": ("x graph=False", "{:.2f}"),
    "ratio_to_floor": ("x floor", "{:.2f}"), "prefill_speedup": ("x DynamicCache, alike", "{:.2f}"),
    "ratio_to_whole": ("x one piece", "{:.2f}"), "call_s": ("s per call, equal lengths", "{:.3f}"),
    "overhead_s": ("more s per call, ten lengths", "{:.3f}"), "held_bytes": ("held GiB", "{:.2f}"),
    "memory_saved": ("x less held", "{:.2f}"), "peak_bytes": ("peak GiB", "{:.2f}"), "error": ("error", "{:.1e}"),
}  # fmt: skip
"""Columns of the levels of whole calls. "x DynamicCache" is a speed-up; "x floor" is a multiple of the floor's time."""
TITLES = {
    "lengths": "ten calls, prompts of ten lengths beside equal ones",
    "chunks": "a long prompt, at once and in pieces",
}
"""Titles of the other rows of the generate level, by `what`."""


def to_markdown(rows: Sequence[Mapping[str, Any]], about: str = "") -> str:
    """One table per level. A row without a speed says why."""
    parts = [about] if about else []
    for level, columns in COLUMNS.items():
        own = [row for row in rows if row["level"] == level]
        if not own:
            continue
        own = sorted(own, key=lambda row: (row["shape"], row["dtype"], row["batch"], row["tokens"]))
        kept = {key: spec for key, spec in columns.items() if any(row.get(key) is not None for row in own)}
        head = ["shape", "batch x tokens", "cache" if level == "model" else "backend", *(n for n, _ in kept.values())]
        lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "---|" * len(kept)]
        for row in own:
            cells = [f"{row['shape']}, {row['dtype']}", f"{row['batch']} x {row['tokens']:,}", _name(row)]
            cells += [_cell(row.get(key), form, key) for key, (_, form) in kept.items()]
            if row.get("reason"):
                cells[2] += f" ({row['reason'][:80].replace('|', '/')})"
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"**{LEVELS[level].title}**\n\n" + "\n".join(lines))
    calls = [row for row in rows if row["level"] in ("generate", "capacity")]
    for key in dict.fromkeys(_table_of(row) for row in calls):
        parts.append(_calls_table([row for row in calls if _table_of(row) == key]))
    return "\n\n".join(parts) + "\n"


def _table_of(row: Mapping[str, Any]) -> tuple:
    return row["level"], row.get("what"), row["shape"], row["dtype"], row.get("layers")


def _calls_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of one shape, with a line per cell and cache."""
    first = rows[0]
    kept = {key: spec for key, spec in GENERATE.items() if any(row.get(key) is not None for row in rows)}
    lines = [f"| cell | cache | {' | '.join(name for name, _ in kept.values())} |", "|---|---|" + "---|" * len(kept)]
    for row in rows:
        cell = f"{row['batch']} x {row['tokens']:,}"
        cell += f" by {row['chunk']:,}" if row.get("chunk") else ""
        name = _name(row) + (f" ({row['reason'][:80].replace('|', '/')})" if row.get("reason") else "")
        values = [_gib(row.get(key), form, key) for key, (_, form) in kept.items()]
        lines.append(f"| {' | '.join([cell, name, *values])} |")
    layers = f", {first['layers']} layers" if first.get("layers") else ""
    title = TITLES.get(first.get("what")) or LEVELS[first["level"]].title
    heading = f"**{first['shape']}{layers}, {first['dtype']}: {title[0].lower()}{title[1:]}**"
    return f"{heading}\n\n" + "\n".join(lines)


def _gib(value: Any, form: str, key: str) -> str:
    if value is None:
        return ""
    return form.format(value / 2**30 if key.endswith("_bytes") else value)


def _name(row: Mapping[str, Any]) -> str:
    parts = [row.get("cache") or row.get("backend"), row.get("preset")]
    if row.get("way") not in (None, "grouped"):
        parts.append(f"({row['way']})")
    return " ".join(part for part in parts if part) + (", compiled" if row.get("mode") == "compiled" else "")


def _cell(value: Any, form: str, key: str) -> str:
    if value is None:
        return ""
    return form.format(value / 1e6 if key.endswith("_bytes") else value)
