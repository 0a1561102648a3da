"""The rows of a benchmark as Markdown, short enough to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "kernel": {
        "us": ("us", "{:.1f}"), "speedup": ("times the best fp16", "{:.2f}"), "gbps": ("GB/s", "{:.0f}"),
        "copy_share": ("of copy", "{:.0%}"), "error": ("error", "{:.1e}"),
    },
    "encode": {
        "ms": ("ms", "{:.2f}"), "share_of_prefill": ("of the layer's prefill", "{:.1%}"), "gbps": ("GB/s", "{:.0f}"),
        "alone_ms": ("ms alone, host included", "{:.2f}"), "error": ("error", "{:.1e}"),
    },
    "model": {
        "ms": ("ms", "{:.2f}"), "host_ms": ("host ms", "{:.2f}"), "ratio_to_fp16": ("time / fp16", "{:.2f}"),
        "ratio_to_best_fp16": ("time / best fp16", "{:.2f}"), "resident_bytes": ("MB held", "{:.0f}"),
        "memory_saved": ("times less", "{:.2f}"), "peak_bytes": ("MB peak", "{:.0f}"), "error": ("error", "{:.1e}"),
    },
}  # fmt: skip
HEADINGS = {
    "kernel": "Decode attention of one layer",
    "encode": "Encoding a prompt, one layer",
    "model": "One decode step of a model with random weights",
}


def to_markdown(rows: Sequence[Mapping[str, Any]], about: str = "") -> str:
    """One table a level; a row without a speed says why."""
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
        parts.append(f"**{HEADINGS[level]}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _name(row: Mapping[str, Any]) -> str:
    parts = [row.get("cache") or row.get("backend"), row.get("preset")]
    if row.get("way") not in (None, "grouped"):
        parts.append(f"({row['way']})")
    return " ".join(part for part in parts if part) + (", compiled" if row.get("mode") == "compiled" else "")


def _cell(value: Any, form: str, key: str) -> str:
    if value is None:
        return ""
    return form.format(value / 1e6 if key.endswith("_bytes") else value)
