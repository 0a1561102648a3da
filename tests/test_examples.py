"""The examples in the docstrings of public classes and functions run, and print what they show."""

from __future__ import annotations

import doctest
import inspect

import pytest

import turboquant_hf
from turboquant_hf.cache.defaults import set_cache_defaults

PUBLIC = {name: getattr(turboquant_hf, name) for name in turboquant_hf.__all__ if not name.startswith("__")}
PUBLIC["set_cache_defaults"] = set_cache_defaults
EXAMPLES = [
    example
    for name, thing in PUBLIC.items()
    for example in doctest.DocTestFinder(exclude_empty=False).find(thing, name, module=inspect.getmodule(thing))
    if example.examples
]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name):
    assert name in {example.name for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_prints_what_it_shows(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example.globs = {}  # a reader has imported nothing
    lines: list[str] = []
    result = doctest.DocTestRunner().run(example, out=lines.append)
    assert result.attempted and not result.failed, "".join(lines)
