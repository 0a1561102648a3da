"""Recall of the codecs; faiss's where it is installed."""

import builtins
import json

import pytest

from turboquant_hf import cli
from turboquant_hf.evaluation.commands import neighbours


def run(tmp_path, *arguments):
    small = ["--rows", "1000", "--queries", "100", "--dim", "32", "--bits", "2", "4"]
    assert cli.main(["neighbours", *small, *arguments, "--output", str(tmp_path)]) == 0
    return {row["codec"]: row for row in json.loads((tmp_path / "metrics.json").read_text())["results"]}


def test_more_bits_find_more_and_a_sketch_finds_less(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def without_faiss(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    found = run(tmp_path)
    assert "pip install faiss-cpu" in capsys.readouterr().out
    assert set(found) == {f"{name} {bits}" for name in ("mse", "prod", "prod, orthogonal", "qjl") for bits in (2, 4)}
    assert found["mse 4"]["recall"]["1"] > found["mse 2"]["recall"]["1"] > found["prod 2"]["recall"]["1"]
    assert found["mse 4"]["recall"]["64"] == 1.0
    assert (tmp_path / "neighbours.png").stat().st_size > 10_000


def test_faiss_codecs_are_measured_beside(tmp_path):
    pytest.importorskip("faiss", reason="needs: pip install faiss-cpu")
    found = run(tmp_path)
    assert found["RaBitQ 4"]["recall"]["1"] > found["RaBitQ 2"]["recall"]["1"] > 0.3
    assert found["PQ 4"]["bits"] == 4


def test_clusters_are_the_same_for_a_seed():
    assert neighbours.clusters(10, 8, 1).equal(neighbours.clusters(10, 8, 1))
