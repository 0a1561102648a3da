"""docs/contributing.md adds a quantizer. A copy of the checkout with these changes passes the contract tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contributing.md"
USE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from turboquant_hf import TurboQuantCache, load_preset

sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99, "intermediate_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()
cache = TurboQuantCache(model.config, preset="fp8")
ids = torch.randint(99, (1, 400))
model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4)
assert cache.layers[0].tiles[0].count == 2 and cache.layers[0].quantizers[0].name == "fp8"
print(load_preset("fp8").keys.bits_per_channel(128, 128))
"""


def steps() -> list[tuple[str, str, str]]:
    """(file, kind of block, block) of every change that the page makes."""
    found = re.findall(r"^\*\*`(\S+)`\*\*.*?\n\n```(\w+)\n(.*?)```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert [kind for _, kind, _ in found].count("python") == 1
    return found


def patched(text: str, diff: str) -> str:
    """`text` with the added lines of a diff. Each goes behind the line above it, which must be in `text`."""
    lines, at = text.splitlines(), -1
    for line in diff.splitlines():
        if line.startswith("+"):
            at += 1
            lines.insert(at, line[1:])
        else:
            assert line[1:] in lines[at + 1 :], f"{line[1:]!r} is not in the file any more"
            at = lines.index(line[1:], at + 1)
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, changed as the page says."""
    copy = tmp_path_factory.mktemp("contributing")
    for name in ("turboquant_hf", "configs", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, kind, block in steps():
        path = copy / name
        assert path.exists() == (kind == "diff"), name
        path.write_text(patched(path.read_text(), block) if kind == "diff" else block)
    return copy


def python(checkout: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    return run.stdout


def test_the_method_is_short():
    (block,) = (block for _, kind, block in steps() if kind == "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 40


@pytest.mark.slow
def test_the_quantizer_of_the_page_keeps_the_contract(checkout):
    command = re.search(r"`python (-m pytest .*?)`, and measure", PAGE.read_text())[1]
    arguments = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
    printed = python(checkout, *arguments, "-q", "-p", "no:cacheprovider")
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert passed > 100 and "failed" not in printed


@pytest.mark.slow
def test_its_preset_packs_in_generate(checkout):
    assert float(python(checkout, "-c", USE)) == 8 + 16 / 128


def test_the_pages_code_is_formatted(checkout):
    path = checkout / "turboquant_hf" / "quantizers" / "fp8.py"
    settings = ["--config", str(checkout / "pyproject.toml")]
    python(checkout, "-m", "ruff", "check", *settings, str(path))
    python(checkout, "-m", "ruff", "format", "--check", *settings, str(path))
