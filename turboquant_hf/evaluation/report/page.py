"""Writes the sections of a report as one self-contained HTML page, and as Markdown without pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { margin-bottom: .3rem } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
nav { color: #555; margin-bottom: 1.5rem } nav a { margin-right: 1rem; white-space: nowrap; color: #06c }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; color: #555 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; font-variant-numeric: tabular-nums }
th:first-child, .text { text-align: left } td:first-child { white-space: nowrap }
th { background: #f4f4f4 } tr:hover td { background: #fafafa }
img { max-width: 100% } figure { margin: 1rem 0 } .note { color: #555; max-width: 60rem }
@media print { body { max-width: none } h2 { break-after: avoid } figure { break-inside: avoid } }
"""


@dataclass
class Table:
    """Rows under a header, with a caption."""

    header: list[str]
    rows: list[list[Any]]
    caption: str = ""


@dataclass
class Section:
    """A heading with sentences, pictures (title, PNG) and tables, shown in this order."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.tables or self.pictures or self.notes)


def to_html(title: str, sections: Sequence[Section]) -> str:
    """A page with its pictures inside."""
    links = "".join(f'<a href="#s{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections))
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        f"<h1>{html.escape(title)}</h1><nav>{links}</nav>",
    ]
    for i, section in enumerate(sections):
        parts.append(f'<h2 id="s{i}">{html.escape(section.title)}</h2>')
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
        for name, data in section.pictures:
            source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            parts.append(f'<figure><img alt="{html.escape(name)}" src="{source}"></figure>')
        parts += [_html_table(table) for table in section.tables]
    return "\n".join(parts) + "\n</html>\n"


def _html_table(table: Table) -> str:
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = "\n".join("<tr>" + "".join(map(_td, row)) + "</tr>" for row in table.rows)
    return f"<div class=wide><table>{caption}<tr>{head}</tr>\n{rows}\n</table></div>"


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    """The page as Markdown: the same words and tables, without pictures."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += section.notes
        for table in section.tables:
            parts += [f"*{table.caption}*"] if table.caption else []
            lines = ["| " + " | ".join(table.header) + " |", "|" + " --- |" + " ---: |" * (len(table.header) - 1)]
            lines += ["| " + " | ".join(cell(v).replace("|", "\\|") for v in row) + " |" for row in table.rows]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def cell(value: Any) -> str:
    """A value as text: four digits, with separators between thousands."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _td(value: Any) -> str:
    return f"<td{' class=text' if isinstance(value, str) else ''}>{html.escape(cell(value))}</td>"
