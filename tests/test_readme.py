"""The README's "Use" section runs as it stands, with declared dependencies only, and its reuse of a file is right."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import torch
from transformers import DynamicCache

ROOT = Path(__file__).parent.parent


def use_blocks() -> list[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Use\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def test_the_blocks_import_declared_dependencies_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    names = set()
    for node in ast.walk(ast.parse("\n".join(use_blocks()))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
            assert "evaluation" not in node.module, "its packaged model is no dependency"
    assert names - {"turboquant_hf"} - set(sys.stdlib_module_names) <= declared


def test_the_blocks_run_and_two_questions_of_a_file_get_dynamic_caches_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    first, reuse = use_blocks()
    # A model whose answers differ by question; the README's own is any model.
    first = first.replace("eos_token_id=None)", "eos_token_id=None, initializer_range=0.4)")
    found: dict = {}
    exec(compile(first, "README.md", "exec"), found)
    exec(compile(reuse, "README.md", "exec"), found)
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
