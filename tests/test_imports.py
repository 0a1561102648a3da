"""Which module may import which, read from the imports: the package in one direction, and no test from a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from turboquant_hf.cli import COMMANDS

ROOT = Path(__file__).parent.parent
ORDER = [
    "primitives",
    "kernels",
    "quantizers",
    "config",
    "cache",
    "attention",
    "generation",
    "evaluation",
    "launch",
    "cli",
]
ROOMS = {
    "labels": (),
    "metrics": (),
    "presets": ("labels",),
    "harness": ("labels", "presets"),
    "tasks": ("labels", "presets", "harness"),
    "rivals": ("labels", "presets", "harness"),
    "benchmark": ("labels", "presets", "harness"),
    "report": ("labels", "presets", "harness"),
    "commands": ("labels", "metrics", "presets", "harness", "tasks", "rivals", "benchmark", "report"),
}
"""{folder of evaluation: the other folders that it may import}. Reports import no experiment."""
FILES = sorted((ROOT / "turboquant_hf").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "turboquant_hf").with_suffix("").parts[0]


def imports_of(tree: ast.AST, path: Path) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    part, names = part_of(path), imports_of(ast.parse(path.read_text()), path)
    for name in names:
        pieces = name.split(".")
        if pieces[0] == "turboquant_hf" and part in ORDER and len(pieces) > 1 and pieces[1] in ORDER:
            assert ORDER.index(pieces[1]) <= ORDER.index(part), name
        if pieces[0] == "transformers":
            assert part in ("cache", "attention", "generation", "evaluation"), name
        if pieces[0] == "triton":
            assert part == "kernels", name
    assert part != "kernels" or not any(name.startswith("turboquant_hf.config") for name in names)


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "evaluation"], ids=lambda path: path.stem)
def test_rooms_of_evaluation_import_what_they_may(path):
    inside = path.relative_to(ROOT / "turboquant_hf" / "evaluation").with_suffix("").parts
    names = imports_of(ast.parse(path.read_text()), path)
    if inside == ("__init__",):
        assert names == ["importlib.import_module", "typing.Any"]  # its public names are imported when they are used
        return
    rooms = {name.split(".")[2] for name in names if name.startswith("turboquant_hf.evaluation.")}
    assert rooms <= {inside[0], *ROOMS[inside[0]]}


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_imports_a_test(path):
    """What several test modules need is in tests/support or in a conftest, and imports no test either."""
    names = imports_of(ast.parse(path.read_text()), path)
    assert [name for name in names if any(piece.startswith("test_") for piece in name.split(".")[:-1])] == []
    assert [name for name in names if name.startswith("tests.") and name.split(".")[-1].startswith("test_")] == []


def test_every_command_is_a_file_of_its_room():
    modules = {module.removeprefix("turboquant_hf.evaluation.commands.") for module, _ in COMMANDS.values()}
    files = {path.stem for path in (ROOT / "turboquant_hf" / "evaluation" / "commands").glob("[!_]*.py")}
    assert modules - {"turboquant_hf.launch"} == files
