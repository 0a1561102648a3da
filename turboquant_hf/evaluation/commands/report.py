"""`turboquant-hf report`: one page from metrics.json files, as HTML with pictures and as Markdown without."""

from __future__ import annotations

import argparse
from pathlib import Path

from turboquant_hf.evaluation.report.finished import read_runs
from turboquant_hf.evaluation.report.page import to_html, to_markdown
from turboquant_hf.evaluation.report.sections import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run folders, or folders of run folders")
    parser.add_argument(
        "--output", type=Path, default=Path("report"), help="folder for report.html and report.md (%(default)s)"
    )
    parser.add_argument("--title", default="KV cache evaluation")


def run(args: argparse.Namespace) -> int:
    """Read the runs, write report.html and report.md. Returns 0."""
    runs = read_runs(args.folders)
    sections = build(runs)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.html", to_html(args.title, sections)),
        ("report.md", to_markdown(args.title, sections)),
    ):
        (args.output / name).write_text(text, encoding="utf-8")
        print(f"Wrote {args.output / name} ({len(runs)} runs)")
    return 0
