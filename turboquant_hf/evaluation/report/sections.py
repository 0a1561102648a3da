"""The sections of a report: the summary, memory by context, then one per run, laid out by the command that wrote it."""

from __future__ import annotations

import io
from collections.abc import Sequence

from turboquant_hf.evaluation.report import tables
from turboquant_hf.evaluation.report.finished import FinishedRun
from turboquant_hf.evaluation.report.heatmap import plot_heatmaps
from turboquant_hf.evaluation.report.page import Section, Table
from turboquant_hf.evaluation.report.summary import FIDELITY, memory, summary


def build(runs: Sequence[FinishedRun]) -> list[Section]:
    """A summary over all runs, memory by context, then a section per run."""
    first = summary(runs)
    return [section for section in (first, memory(first), *map(run_section, runs)) if not section.empty]


def run_section(run: FinishedRun) -> Section:
    """What one run measured: how it was made, its pictures, its tables."""
    section = Section(run.title)
    if run.rows:
        LAYOUTS.get(run.tool, _plain)(run, section)
    for more in filter(None, (run.metrics.get("pruned"), run.metrics.get("layer"))):
        section.tables.append(tables.plain_table(more))
    if run.tool != "needle":  # a folder of `needle` has a picture per cache, and the page draws all of them in one
        section.pictures += [(path.stem, path.read_bytes()) for path in sorted(run.folder.glob("*.png"))]
    findings = list(run.metrics.get("findings", []))
    if section.tables or section.pictures or findings:
        section.notes += [*tables.about(run), *findings]
    return section


def _needle(run: FinishedRun, section: Section) -> None:
    section.tables += tables.needle_tables(run)
    stream = io.BytesIO()
    plot_heatmaps(stream, tables.needle_grids(run, "accuracy"))
    section.pictures.append(("needles found by length and depth", stream.getvalue()))


def _benchmark(run: FinishedRun, section: Section) -> None:
    section.tables += tables.speed_tables(run.rows)


def _tasks(run: FinishedRun, section: Section) -> None:
    section.tables.append(tables.task_table(run))


def _fidelity(run: FinishedRun, section: Section) -> None:
    keys = [key for key in FIDELITY if key in run.rows[0]]
    rows = [[row.get(key) for key in keys] for row in run.rows]
    section.tables.append(Table([FIDELITY[key] for key in keys], rows))


def _plain(run: FinishedRun, section: Section) -> None:
    section.tables.append(tables.plain_table(run.rows))


LAYOUTS = {
    "benchmark": _benchmark,
    "needle": _needle,
    **dict.fromkeys(("retrieval", "longbench"), _tasks),
    **dict.fromkeys(("perplexity", "baselines", "ablate", "allocate", "qjl-lesson"), _fidelity),
}
"""{command: the layout of its section}. Any other run gets a table of all fields of its rows."""
