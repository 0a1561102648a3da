"""The site: its navigation names every page, the lessons run in a small setting, and the strict build passes."""

from __future__ import annotations

import doctest
import importlib.util
import math
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
from turboquant_hf import TurboQuantCache, cli, load_preset

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
    for page, name in (("index", "quality"), ("design", "layout")):
        html = (tmp_path / "html" / f"{page}.html").read_text(encoding="utf-8")
        for theme in ("light", "dark"):
            (image,) = re.findall(rf'<img [^>]*class="[^"]*only-{theme}[^>]*>', html)
            source = re.search(r'src="([^"]+)"', image)[1]
            assert f"{name}-{theme}" in source and (tmp_path / "html" / source).is_file()


def test_the_picture_of_a_tile_shows_all_its_bytes(tmp_path):
    drawing = runpy.run_path(str(DOCS / "figures" / "layout.py"))
    preset, dim, tile = load_preset("k4v4"), drawing["DIM"], drawing["TILE"]
    for role, quantizer in (("keys", preset.keys), ("values", preset.values)):
        fields = quantizer.layout(dim, tile, torch.bfloat16).values()
        stored = sum(math.prod(field.shape) * field.dtype.itemsize for field in fields)
        assert sum(size for _, size, _ in drawing["parts"](role)) == stored
    drawing["main"](tmp_path)
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    for theme in drawing["THEMES"]:
        assert (tmp_path / f"layout-{theme}.png").is_file() and f"figures/layout-{theme}.png" in page


SHORT = ("choosing.md", "graphs.md", "index.md")
RUN = {"README.md", "usage.md", "contributing.md", "recipes.md", "quickstart.md", *SHORT}
"""Pages with Python blocks: tests/test_readme.py runs the first two, tests/test_contributing.py and
tests/test_recipes.py the next ones, and the tests below the others."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_page_with_python_is_run():
    assert {page.name for page in PAGES if blocks(page, "python")} == RUN


@pytest.mark.parametrize("name", SHORT)
def test_short_blocks_run_on_a_model(name, small_llama):
    ids = torch.randint(3, 199, (1, 300), generator=torch.Generator().manual_seed(0))
    found = {"inputs": {"input_ids": ids}, "model": small_llama(head_dim=64), "TurboQuantCache": TurboQuantCache}
    for block in blocks(DOCS / name, "python"):
        exec(compile(block, name, "exec"), found)


@pytest.mark.slow
def test_the_quick_start_prints_what_it_shows(capsys):
    page = DOCS / "quickstart.md"
    (program,), (shown,) = blocks(page, "python"), blocks(page, "text")
    exec(compile(program, page.name, "exec"), {})
    printed = capsys.readouterr().out
    assert doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS), printed


def commands() -> list[tuple[str, list[str]]]:
    """(page, arguments) of every `turboquant-hf` command with arguments, in a block for a shell or in a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines = [part.replace("\n", " ") for part in re.findall(r"`(turboquant-hf [^`]+)`", sentences)]
        for block in (*blocks(page, "bash"), *blocks(page, "console")):
            lines += block.replace("\\\n", " ").splitlines()
        for line in lines:
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["turboquant-hf"] and words[2:]:
                found.append((page.name, words[1:]))
    return found


def test_every_command_shown_has_its_flags(monkeypatch):
    """Not run, for they take hours or a GPU: each is read by its own parser."""
    shown = commands()
    assert len(shown) > 40
    load = cli.import_module
    monkeypatch.setattr(
        cli, "import_module", lambda name: SimpleNamespace(add_arguments=load(name).add_arguments, run=lambda args: 0)
    )
    for page, words in shown:
        assert cli.main(words) == 0, (page, words)
