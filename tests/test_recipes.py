"""The programs of docs/recipes.md run as they stand and print what the page shows, through packed layers."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import transformers

from turboquant_hf import cli
from turboquant_hf.cache import defaults
from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.evaluation.harness.models import packaged_folder

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
HEAD, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
RECIPES = {section.splitlines()[0]: section for section in SECTIONS}
SERVER = "transformers serve and transformers chat"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def missing(program: str) -> list[str]:
    """What a program imports and nobody installed."""
    names = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


@pytest.fixture
def tiles(monkeypatch):
    """Tiles that were packed, by layer: proof that a program used the cache."""
    counts: dict[int, int] = {}
    commit = TurboQuantLayer.commit

    def counting(self):
        commit(self)
        if self.is_initialized and self.tiles[0].count:
            counts[id(self)] = self.tiles[0].count

    monkeypatch.setattr(TurboQuantLayer, "commit", counting)
    return counts


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the program of a recipe in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def program(name: str) -> str:
        (start,), parts = blocks(HEAD, "python"), blocks(RECIPES[name], "python")
        text = "\n".join([start, *parts])
        if missing(text):
            pytest.skip(f"not installed: {', '.join(missing(text))}")
        capsys.readouterr()
        transformers.set_seed(0)
        exec(compile(text, f"docs/recipes.md, {name}", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    return program


SHOWN = [name for name, section in RECIPES.items() if blocks(section, "text") and blocks(section, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_program_prints_what_the_page_shows(name, run, tiles):
    printed = run(name)
    (shown,) = blocks(RECIPES[name], "text")
    assert doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS), printed
    assert len(tiles) >= 2


def test_every_recipe_is_run():
    assert set(RECIPES) == {*SHOWN, "lm-evaluation-harness", SERVER} and len(SHOWN) == 5


def command(name: str, program: str) -> list[str]:
    """The arguments of `turboquant-hf` in a recipe's bash block, for the line that runs `program`."""
    (text,) = blocks(RECIPES[name], "bash")
    lines = text.replace("\\\n", " ").splitlines()
    return next(shlex.split(line)[1:] for line in lines if line.startswith("turboquant-hf run") and program in line)


@pytest.mark.slow
def test_a_task_of_lm_evaluation_harness_generates_through_the_cache(run, tiles, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    run("lm-evaluation-harness")
    try:
        words = command("lm-evaluation-harness", "lm_eval")
        assert cli.main([*words, "--output_path", str(tmp_path / "out.json")]) == 0
    finally:
        defaults.clear_cache_defaults()
    (written,) = tmp_path.glob("out_*.json")
    assert set(json.loads(written.read_text())["results"]["exceptions"]) >= {"exact_match,none"}
    assert "|exceptions|" in capsys.readouterr().out and len(tiles) == 30


def ask(url: str, body: dict, server: subprocess.Popen) -> dict:
    """The answer of a server that may still be starting."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while server.poll() is None:
        try:
            return json.loads(urllib.request.urlopen(request, timeout=200).read())
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server ended")


@pytest.mark.slow
def test_a_server_answers_through_the_cache(tmp_path):
    """`transformers serve` as the page runs it; `transformers chat` sends it the same requests."""
    if not transformers.utils.import_utils.is_serve_available():
        pytest.skip("not installed: transformers[serving]")
    words = command(SERVER, "serve")
    words[words.index("smollm2")] = folder = str(packaged_folder())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        words[words.index("8000")] = port = str(free.getsockname()[1])
    log = tmp_path / "log"
    program = [sys.executable, "-m", "turboquant_hf.cli", *words]
    with log.open("w") as file:
        server = subprocess.Popen(program, stderr=file, stdout=file, cwd=ROOT)
    try:
        message = {"role": "user", "content": "a long question " * 30}
        body = {"model": folder, "messages": [message], "max_tokens": 4, "temperature": 0}
        answer = ask(f"http://localhost:{port}/v1/chat/completions", body, server)
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        server.terminate()
        server.wait()
    assert 'attention switched from "sdpa" to "turboquant"' in log.read_text()
