"""The site: its navigation names every page, the lessons run in a small setting, and the strict build passes."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.support import compatibility
from turboquant_hf import TurboQuantCache, cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TUTORIAL = DOCS / "tutorial"
LESSONS = sorted(TUTORIAL.glob("[0-9]_*.py"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
INDEXES = (DOCS / "index.md", TUTORIAL / "index.md")


def test_the_navigation_names_every_page_once():
    listed = []
    for index in INDEXES:
        for block in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(encoding="utf-8"), flags=re.DOTALL):
            listed += [index.parent / line for line in block.splitlines() if line and not line.startswith(":")]
    pages = [page.with_suffix("") for page in (*DOCS.glob("*.md"), *TUTORIAL.glob("*.md"), *LESSONS)]
    assert sorted([*listed, DOCS / "index"]) == sorted(pages)
    assert len(LESSONS) == 6


@pytest.mark.slow
def test_the_compatibility_page_is_what_its_command_writes():
    assert (DOCS / "compatibility.md").read_text(encoding="utf-8") == compatibility.page(ROOT)


@pytest.mark.slow
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
    source = re.sub(r"""["']\s*\n\s*f?["']""", "", source)  # a message may continue in the next line
    page = (DOCS / "faq.md").read_text(encoding="utf-8").partition("## Questions")[0]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 12 and [text for text in quoted if text not in source] == []


@pytest.mark.slow
def test_the_strict_build_passes(tmp_path):
    """The lessons' cells are not run here: the tests above run them. Needs the `docs` extra."""
    if not all(importlib.util.find_spec(name) for name in ("furo", "jupytext", "myst_nb", "sphinx")):
        pytest.skip("the docs extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), str(DOCS)]
    environment = {**os.environ, "DOCS_EXECUTION": "off"}
    done = subprocess.run([*command, str(tmp_path / "html")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("index", "api", "tutorial/4_qjl"):
        assert (tmp_path / "html" / f"{page}.html").is_file()


RUN = {"README.md", "usage.md", "contributing.md", "recipes.md", "choosing.md", "graphs.md", "index.md"}
"""Pages with Python blocks: the first by tests/test_readme.py, the next ones by tests/test_contributing.py and
tests/test_recipes.py, the last three below."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_page_with_python_is_run():
    assert {page.name for page in PAGES if blocks(page, "python")} == RUN


@pytest.mark.parametrize("name", ["choosing.md", "graphs.md", "index.md"])
def test_short_blocks_run_on_a_model(name, small_llama):
    ids = torch.randint(3, 199, (1, 300), generator=torch.Generator().manual_seed(0))
    found = {"inputs": {"input_ids": ids}, "model": small_llama(head_dim=64), "TurboQuantCache": TurboQuantCache}
    for block in blocks(DOCS / name, "python"):
        exec(compile(block, name, "exec"), found)


def commands() -> list[tuple[str, list[str]]]:
    """(page, arguments) of every `turboquant-hf` command in a block for a shell."""
    found = []
    for page in PAGES:
        for block in (*blocks(page, "bash"), *blocks(page, "console")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["turboquant-hf"]:
                    found.append((page.name, words[1:]))
    return found


def test_every_command_shown_has_its_flags(monkeypatch):
    """Not run, for they take hours or a GPU: each is read by its own parser."""
    shown = commands()
    assert len(shown) > 20
    load = cli.import_module
    monkeypatch.setattr(
        cli, "import_module", lambda name: SimpleNamespace(add_arguments=load(name).add_arguments, run=lambda args: 0)
    )
    for page, words in shown:
        assert cli.main(words) == 0, (page, words)
