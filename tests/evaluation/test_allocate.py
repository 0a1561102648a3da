"""The knapsack, the preset it writes, and the fidelity check."""

import argparse
import json
import random
from itertools import product

import pytest
import torch
import yaml

from turboquant_hf import CachePreset, cli, load_preset
from turboquant_hf.evaluation import allocate, check, fidelity, widths
from turboquant_hf.evaluation.presets import bits_per_channel, flat_preset


def made_up_costs(layers, choices, seed):
    draw = random.Random(seed)
    weight = {(role, layer): draw.random() for role in widths.ROLES for layer in range(layers)}
    return {(*slot, width): value * 4.0**-width for slot, value in weight.items() for width in choices}


PRICES = {
    ("keys", 2): 2.875,
    ("keys", 3): 3.625,
    ("keys", 4): 4.375,
    ("values", 2): 2.25,
    ("values", 3): 3.25,
    ("values", 4): 4.25,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.5625, 3.0, 3.4375, 4.4])
def test_choose_widths_is_the_best_there_is(seed, budget):
    costs = made_up_costs(2, (2, 3, 4), seed)
    choice = widths.choose_widths(costs, PRICES, 2, budget)

    def price(chosen):
        return sum(PRICES[role, width] for (role, _), width in zip(choice, chosen, strict=True)) / 4

    def cost(chosen):
        return sum(costs[*slot, width] for slot, width in zip(choice, chosen, strict=True))

    assert price(choice.values()) <= budget
    assert cost(choice.values()) == pytest.approx(
        min(cost(w) for w in product((2, 3, 4), repeat=4) if price(w) <= budget)
    )


def test_choose_widths_refuses_a_budget_below_every_width():
    with pytest.raises(ValueError, match="allowed: at least 2.5625"):
        widths.choose_widths(made_up_costs(2, (2, 3, 4), 0), PRICES, 2, 2.5)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_price_list_is_the_flat_presets_real_bits(width):
    prices = widths.price_list((2, 3, 4), 64)
    assert (prices["keys", width], prices["values", width]) == bits_per_channel(flat_preset(width, width), 64, 1)


def test_allocated_preset_survives_its_yaml():
    choice = widths.choose_widths(made_up_costs(6, (2, 3, 4), 3), PRICES, 6, 3.4375)
    preset = widths.allocated_preset(choice, "mine")
    read = CachePreset.from_dict(yaml.safe_load(yaml.safe_dump(widths.preset_data(preset))))
    assert read == preset and read.layers
    for layer in range(6):
        flat = flat_preset(choice["keys", layer], choice["values", layer])
        assert read.layer_quantizers(layer, 6) == (flat.keys, flat.values)


def test_preset_data_keeps_changed_fields():
    preset = CachePreset(name="mine", sinks=2, boundary_layers=1)
    assert CachePreset.from_dict(widths.preset_data(preset)) == preset


@pytest.mark.parametrize(
    ("budget", "names"), [(3.0, ["k2v4", "k3v3", "k4v2"]), (2.6, ["k2v3", "k3v2"]), (2.0, ["k2v2"])]
)
def test_flat_rivals_have_the_budgets_bytes(budget, names):
    assert [preset.name for preset in widths.flat_rivals((2, 3, 4), budget)] == names


def test_flat_cost_is_that_of_the_presets_own_widths():
    costs = made_up_costs(2, (2, 3, 4), 0)
    expected = sum(costs["keys", layer, 4] + costs["values", layer, 2] for layer in range(2))
    assert widths.flat_cost(costs, flat_preset(4, 2), (2, 3, 4), 2) == pytest.approx(expected)


def test_allocated_preset_has_no_more_bits_than_its_budget():
    budget = sum(bits_per_channel(flat_preset(3, 3), 64, 6)) / 2
    choice = widths.choose_widths(made_up_costs(6, (2, 3, 4), 1), widths.price_list((2, 3, 4), 64), 6, budget)
    preset = widths.allocated_preset(choice, "mine")
    assert sum(bits_per_channel(preset, 64, 6)) / 2 <= budget


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a long and quiet text. " for i in range(100)))
    return str(path)


def test_sensitivity_measures_each_side_of_each_layer(tiny_folder, text):
    options = {"model": str(tiny_folder), "device": "cpu", "dtype": None, "output": None, "text": [text]}
    options |= {"dataset": None, "widths": [2, 4], "probe": [2], "context": 384, "windows": 1, "chunk": 128}
    costs = allocate.sensitivity(argparse.Namespace(**options), layers=2)
    assert set(costs) == set(product(widths.ROLES, range(2), (2, 4)))
    assert all(costs[role, layer, 2] > costs[role, layer, 4] > 0 for role, layer in product(widths.ROLES, range(2)))


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
