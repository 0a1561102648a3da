"""The knapsack, the preset it writes, and the fidelity check."""

import random
from itertools import product

import pytest
import torch
import yaml

from turboquant_hf import CachePreset
from turboquant_hf.evaluation import allocate, perplexity
from turboquant_hf.evaluation.presets import bits_per_channel, flat_preset


def made_up_costs(layers, widths, seed):
    draw = random.Random(seed)
    weight = {(role, layer): draw.random() for role in allocate.ROLES for layer in range(layers)}
    return {(*slot, width): value * 4.0**-width for slot, value in weight.items() for width in widths}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [2.0, 2.6, 3.0, 4.0])
def test_choose_widths_is_the_best_there_is(seed, budget):
    costs = made_up_costs(2, (2, 3, 4), seed)
    choice = allocate.choose_widths(costs, 2, (2, 3, 4), budget)
    assert sum(choice.values()) <= budget * 4 + 1e-6

    def cost(widths):
        return sum(costs[*slot, width] for slot, width in zip(choice, widths, strict=True))

    best = min(cost(widths) for widths in product((2, 3, 4), repeat=4) if sum(widths) <= budget * 4 + 1e-6)
    assert cost(choice.values()) == pytest.approx(best)


def test_choose_widths_refuses_a_budget_below_every_width():
    with pytest.raises(ValueError, match="allowed: at least 2"):
        allocate.choose_widths(made_up_costs(2, (2, 3), 0), 2, (2, 3), 1.5)


def test_allocated_preset_survives_its_yaml():
    choice = allocate.choose_widths(made_up_costs(6, (2, 3, 4), 3), 6, (2, 3, 4), 3.0)
    preset = allocate.allocated_preset(choice, "mine")
    read = CachePreset.from_dict(yaml.safe_load(yaml.safe_dump(allocate.preset_data(preset))))
    assert read == preset and read.layers
    for layer in range(6):
        flat = flat_preset(choice["keys", layer], choice["values", layer])
        assert read.layer_quantizers(layer, 6) == (flat.keys, flat.values)


def test_preset_data_keeps_changed_fields():
    preset = CachePreset(name="mine", sinks=2, boundary_layers=1)
    assert CachePreset.from_dict(allocate.preset_data(preset)) == preset


@pytest.mark.parametrize(("budget", "names"), [(3.0, ["k2v4", "k3v3", "k4v2"]), (2.6, ["k2v3", "k3v2"]), (2.0, ["k2v2"])])
def test_flat_rivals_have_the_budgets_bytes(budget, names):
    assert [preset.name for preset in allocate.flat_rivals((2, 3, 4), budget)] == names


def test_allocated_preset_has_no_more_bytes_of_codes_than_its_budget():
    choice = allocate.choose_widths(made_up_costs(6, (2, 4), 1), 6, (2, 4), 3.0)
    preset = allocate.allocated_preset(choice, "mine")
    assert sum(bits_per_channel(preset, 64, 6)) <= sum(bits_per_channel(flat_preset(4, 2), 64, 6)) + 0.5


def test_sensitivity_measures_each_side_of_each_layer(small_llama):
    model = small_llama(head_dim=64, hidden_size=64, num_hidden_layers=2)
    model.set_attn_implementation("turboquant")
    window = torch.randint(3, 199, (1, 384), generator=torch.Generator().manual_seed(0))
    costs = allocate.sensitivity(model, [window], widths=(2, 4), probe=(2,))
    assert set(costs) == set(product(allocate.ROLES, range(2), (2, 4)))
    assert all(costs[role, layer, 2] > costs[role, layer, 4] > 0 for role, layer in product(allocate.ROLES, range(2)))


class FakeTokenizer:
    def __call__(self, text, return_tensors):
        return type("Tokens", (), {"input_ids": torch.zeros(1, 600, dtype=torch.long)})


@pytest.mark.parametrize(
    ("kl", "safer"),
    [({"k2v2": 0.05}, None), ({"k2v2": 0.5, "k3v3": 0.2, "k4v4": 0.02}, "k4v4"), ({"k2v2": 9.0, "k3v3": 9.0, "k4v4": 9.0, "k8v4": 9.0}, None)],
    ids=["faithful", "safer", "hostile"],
)
def test_check_fidelity_warns_and_names_a_safer_preset(monkeypatch, recwarn, kl, safer):
    def measure(model, windows, presets, chunk):
        return 1.0, [{"preset": presets[0].name, "kl": kl[presets[0].name], "top1": 0.9}]

    monkeypatch.setattr(perplexity, "measure", measure)
    found = allocate.check_fidelity(None, FakeTokenizer(), "k2v2", "text")
    assert (found.kl, found.safer) == (kl["k2v2"], safer)
    assert len(recwarn) == (0 if len(kl) == 1 else 1)
    if safer:
        assert f"{safer} stays below" in str(recwarn[0].message)
