"""The metadata of this project for pip."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOREIGN = "turboquant-hf"
"""The name of another project on PyPI. An upgrade of a distribution with this name would install that project."""


def test_the_distribution_has_a_name_of_its_own():
    assert PROJECT["name"] == "turboquant-transformers"
    assert PROJECT["scripts"] == {"turboquant-hf": "turboquant_hf.cli:main"}


def test_nothing_installs_or_looks_up_the_foreign_name():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    asks = re.compile(rf"""(pip_?\s?install.*|version\(\W|requires?\(\W|distribution\(\W){FOREIGN}""")
    found = []
    for path in (ROOT / name for name in listed.stdout.split()):
        if path.suffix not in (".py", ".sh", ".md", ".toml", ".yaml", "") or not path.is_file():
            continue
        found += [line for line in path.read_text().splitlines() if asks.search(line) and "not" not in line.split()]
    assert found == []


def test_the_licence_is_apache_2_in_full():
    assert PROJECT["license"] == "Apache-2.0"
    (name,) = PROJECT["license-files"]
    text = (ROOT / name).read_text()
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text and "APPENDIX: How to apply the Apache License to your work." in text
