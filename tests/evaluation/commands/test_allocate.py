"""The knapsack, the preset it writes, and the fidelity check."""

import json
from itertools import product

import pytest
import torch

from turboquant_hf import cli, load_preset
from turboquant_hf.evaluation.commands import allocate, check
from turboquant_hf.evaluation.harness import fidelity
from turboquant_hf.evaluation.harness.run import Run
from turboquant_hf.evaluation.presets import allocation
from turboquant_hf.evaluation.presets.widths import flat_preset


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a long and quiet text. " for i in range(100)))
    return str(path)


def test_sensitivity_measures_each_side_of_each_layer(tiny_folder, text):
    options = {"model": str(tiny_folder), "device": "cpu", "dtype": "float32", "output": None, "text": [text]}
    options |= {"dataset": None, "widths": [2, 4], "probe": [2], "context": 384, "windows": 1, "chunk": 128}
    costs = allocate.sensitivity(Run("allocate", options), layers=2)
    assert set(costs) == set(product(allocation.ROLES, range(2), (2, 4)))
    assert all(costs[role, layer, 2] > costs[role, layer, 4] > 0 for role, layer in product(allocation.ROLES, range(2)))


def test_allocate_command_writes_a_preset_that_caches_take(tiny_folder, text, tmp_path, capsys):
    argv = ["allocate", "--model", str(tiny_folder), "--text", text, "--device", "cpu"]
    argv += ["--context", "384", "--check-context", "384", "--check-windows", "2", "--output", str(tmp_path / "run")]
    assert cli.main(argv) == 0
    assert "of 2 windows, where its KL is " in capsys.readouterr().out
    preset = load_preset(tmp_path / "run" / "preset.yaml")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["results"][0]["preset"] == preset.name == "allocated-3"
    for layer, (keys, values) in enumerate(zip(*metrics["widths"].values(), strict=True)):
        flat = flat_preset(keys, values)
        assert preset.layer_quantizers(layer, 2) == (flat.keys, flat.values)
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.count("finished before") == 2, "the sensitivity, and the check of the choice"


class FakeTokenizer:
    def __call__(self, text, return_tensors, verbose):
        return type("Tokens", (), {"input_ids": torch.zeros(1, 600, dtype=torch.long)})


@pytest.mark.parametrize(
    ("kl", "safer"),
    [
        ({"k2v2": 0.05}, None),
        ({"k2v2": 0.5, "k3v3": 0.2, "k4v4": 0.02}, "k4v4"),
        ({"k2v2": 9.0, "k3v3": 9.0, "k4v4": 9.0, "k8v4": 9.0}, None),
    ],
    ids=["faithful", "safer", "hostile"],
)
def test_check_fidelity_warns_and_names_a_safer_preset(monkeypatch, recwarn, kl, safer):
    def measure(model, windows, presets, chunk):
        return 1.0, [{"preset": presets[0].name, "kl": kl[presets[0].name], "top1": 0.9}]

    monkeypatch.setattr(fidelity, "measure", measure)
    found = check.check_fidelity(None, FakeTokenizer(), "k2v2", "text")
    assert (found.kl, found.safer) == (kl["k2v2"], safer)
    assert len(recwarn) == (0 if len(kl) == 1 else 1)
    if safer:
        assert f"{safer} stays below" in str(recwarn[0].message)


def test_check_command_says_which_preset_is_safer(tiny_folder, text, capsys):
    argv = ["check", "--model", str(tiny_folder), "--text", text, "--device", "cpu", "--preset", "k2v2"]
    assert cli.main([*argv, "--limit", "1e9"]) == 0
    assert "k2v2 stays close to the uncompressed model" in capsys.readouterr().out
    assert cli.main([*argv, "--limit", "0"]) == 1
    assert "none of k3v3, k4v4, k8v4 stays below" in capsys.readouterr().out
