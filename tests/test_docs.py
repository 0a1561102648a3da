"""The site: its navigation names every page, the lessons run in a small setting, and the strict build passes."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import compatibility

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial"
LESSONS = sorted(TUTORIAL.glob("[0-9]_*.py"))
INDEXES = (DOCS / "index.md", TUTORIAL / "index.md")


def test_the_navigation_names_every_page_once():
    listed = []
    for index in INDEXES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(encoding="utf-8"), flags=re.DOTALL):
            listed += [index.parent / line for line in block.splitlines() if line and not line.startswith(":")]
    pages = [page.with_suffix("") for page in (*DOCS.glob("*.md"), *TUTORIAL.glob("*.md"), *LESSONS)]
    assert sorted([*listed, DOCS / "index"]) == sorted(pages)
    assert len(LESSONS) == 6


def test_the_compatibility_page_is_what_its_command_writes():
    assert (DOCS / "compatibility.md").read_text(encoding="utf-8") == compatibility.page(ROOT)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_and_draws_its_pictures_for_both_themes(lesson, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUTORIAL_QUICK", "1")
    monkeypatch.syspath_prepend(str(TUTORIAL))
    if "lesson" in sys.modules:
        assert sys.modules["lesson"].QUICK
    import lesson as shared  # its model is loaded once for all lessons

    monkeypatch.setattr(shared, "FIGURES", tmp_path)
    runpy.run_path(str(lesson))
    drawn = {path.name.rpartition("-")[0] for path in tmp_path.glob("*-light.png")}
    assert drawn == {path.name.rpartition("-")[0] for path in tmp_path.glob("*-dark.png")} and len(drawn) >= 2
    printed = capsys.readouterr().out
    assert printed.count("| --- |") >= 2 and not re.search(r"\bnan\b", printed)


def test_the_messages_that_the_page_explains_exist():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "turboquant_hf").rglob("*.py"))
    source = re.sub(r"""["']\s*\n\s*f?["']""", "", source)  # a message goes on in the next line
    page = (DOCS / "faq.md").read_text(encoding="utf-8").partition("## Questions")[0]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 12 and [text for text in quoted if text not in source] == []


def test_the_strict_build_passes(tmp_path):
    """Without the lessons' cells, which the tests above run; needs the `docs` extra."""
    if not all(importlib.util.find_spec(name) for name in ("furo", "jupytext", "myst_nb", "sphinx")):
        pytest.skip("the docs extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), str(DOCS)]
    environment = {**os.environ, "DOCS_EXECUTION": "off"}
    done = subprocess.run([*command, str(tmp_path / "html")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index", "api", "tutorial/4_qjl"):
        assert (tmp_path / "html" / f"{page}.html").is_file()
