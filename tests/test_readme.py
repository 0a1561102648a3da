"""The Python blocks of README and docs/usage.md run as they stand, and every page's links lead somewhere."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from turboquant_hf.cache.layer import TurboQuantLayer
from turboquant_hf.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(page), flags=re.DOTALL)


def test_the_blocks_import_declared_dependencies_only():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    names = set()
    for node in ast.walk(ast.parse("\n".join(python_blocks("README.md") + python_blocks("docs/usage.md")))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
            assert "evaluation" not in node.module, "its packaged model is no dependency"
    assert names - {"turboquant_hf"} - set(sys.stdlib_module_names) <= declared


def test_readmes_block_runs_and_packs(monkeypatch):
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=256, eos_token_id=None)).eval()
    ids = torch.randint(512, (1, 700))
    packed, commit = set(), TurboQuantLayer.commit

    def watch(layer):
        commit(layer)
        packed.update([id(layer)] if layer.is_initialized and layer.tiles[0].count else [])

    monkeypatch.setattr(TurboQuantLayer, "commit", watch)
    (block,) = python_blocks("README.md")
    exec(compile(block, "README.md", "exec"), {"model": model, "inputs": {"input_ids": ids}})
    assert len(packed) == 2


def test_usages_blocks_run_and_two_questions_of_a_file_get_dynamic_caches_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found: dict = {}
    for block in python_blocks("docs/usage.md"):
        # This model's answers differ by question; those of the page's model need not.
        block = block.replace("eos_token_id=None)", "eos_token_id=None, initializer_range=0.4)")
        exec(compile(block, "docs/usage.md", "exec"), found)
    model, document, answers = found["model"], found["document"], found["answers"]
    assert (tmp_path / "document.cache").is_file() and found["cache"].get_seq_length() == document.shape[1]
    assert len(answers) == 2 and answers[0][0, -20:].tolist() != answers[1][0, -20:].tolist()
    model.set_attn_implementation("sdpa")
    for answer in answers:
        prompt = answer[:, :-20]
        assert torch.equal(prompt[:, : document.shape[1]], document)
        mask, cache = torch.ones_like(prompt), DynamicCache(config=model.config)
        expected = model.generate(prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=20)
        assert torch.equal(answer, expected)


def test_usages_output_is_what_its_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in python_blocks("docs/usage.md") if "config.save_pretrained" in block)
    exec(compile(block, "docs/usage.md", "exec"), {"LlamaConfig": LlamaConfig})
    (shown,) = re.findall(r"```console\n\$ turboquant-hf (.*?)\n(.*?)```", read("docs/usage.md"), flags=re.DOTALL)
    assert main(shlex.split(shown[0])) == 0
    assert capsys.readouterr().out == shown[1]


def test_readmes_commands_are_those_that_ci_runs():
    """The commands that a reader is told to run are tested."""
    commands = [line.partition("#")[0].strip() for line in read("README.md").splitlines() if line.startswith("bash ")]
    assert commands == ["bash scripts/quickstart.sh", "bash scripts/test.sh"]
    assert commands[1] in read(".ci/run").splitlines()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"""\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)\"""", text)
    for target in (a or b for a, b in links):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        place = page.parent / name if name else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Paths in backticks, relative to the checkout or the package. (A page with a bold path creates that file.)"""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<!\*\*)`([a-z.][\w./-]+/[\w.-]+\.(?:py|cuh?|yaml|sh|md))`", text)
    missing = [name for name in named if not any((base / name).exists() for base in (ROOT, ROOT / "turboquant_hf"))]
    assert missing == []


def test_the_table_of_places_names_what_is_there():
    """docs/design.md: every name in a row is in one of the files, or folders, of its row."""
    table = read("docs/design.md").split("## Where to find what")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!what \| where|---)(.*?) \| (.*) \|$", table, flags=re.MULTILINE)
    assert len(rows) >= 12
    for question, places in rows:
        quoted = re.findall(r"`([^`]+)`", places)
        paths = [path for name in quoted if (path := ROOT / "turboquant_hf" / name).exists()]
        names = [name for name in quoted if not (ROOT / "turboquant_hf" / name).exists()]
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        missing = [name for name in names if files and not all(part in text for part in name.split("."))]
        assert missing == [], question


def test_the_rows_of_a_run_are_those_of_the_page(tmp_path):
    """What `--rows` prints of a run is what the picture reads."""
    drawing = runpy.run_path(str(ROOT / "docs/figures/quality.py"))
    numbers = {"top1": 0.953, "key_bits": 4.5, "value_bits": 4.0}
    found = [{"preset": "kivi-2", "kl": 0.1912, **numbers}, {"preset": "k4v4", "kl": 0.00144, **numbers}]
    text = drawing["table"]({"results": [*found, {"preset": "int4", "kl": 0.1, **numbers}]})
    page = tmp_path / "page.md"
    page.write_text(f"{drawing['HEADING']}\n\n{text}\n\nmore")
    assert drawing["read_points"](page) == {"k4v4": (4.25, 0.0014), "kivi-2": (4.25, 0.191)}
    assert text.splitlines()[2] == "| `k4v4` | this project | 4.25 | .0014 | .953 |"


def test_the_picture_shows_every_row_of_its_table(tmp_path):
    drawing = runpy.run_path(str(ROOT / "docs/figures/quality.py"))
    points = drawing["read_points"](ROOT / "docs/results.md")
    below = read("docs/results.md").split(drawing["HEADING"])[1]
    rows = below[below.index("\n| method") :].split("\n\n")[0].splitlines()
    assert len(points) == sum(line.startswith("| ") for line in rows) - 1 > 10
    assert points.keys() <= {*drawing["OURS"], *drawing["SCALAR"], *drawing["OTHERS"]}
    assert points.keys() & {*drawing["OURS"], *drawing["SCALAR"]}
    measured = yaml.safe_load(read("configs/eval/baselines.yaml"))
    names = {*measured["presets"], *measured["non_uniform"], *measured["quantized_cache"]}
    assert {*drawing["OURS"], *drawing["SCALAR"], *drawing["OTHERS"]} <= names
    drawing["main"](tmp_path)
    for theme in drawing["THEMES"]:
        assert (tmp_path / f"quality-{theme}.png").stat().st_size > 10_000
        assert f"docs/figures/quality-{theme}.png" in read("README.md")
