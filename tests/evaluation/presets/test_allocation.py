"""The knapsack over layers, and the preset that it makes."""

import random
from itertools import product

import pytest
import yaml

from turboquant_hf import CachePreset
from turboquant_hf.evaluation.presets import allocation
from turboquant_hf.evaluation.presets.memory import bits_per_channel
from turboquant_hf.evaluation.presets.widths import flat_preset


def made_up_costs(layers, choices, seed):
    draw = random.Random(seed)
    weight = {(role, layer): draw.random() for role in allocation.ROLES for layer in range(layers)}
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
    choice = allocation.choose_widths(costs, PRICES, 2, budget)

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
        allocation.choose_widths(made_up_costs(2, (2, 3, 4), 0), PRICES, 2, 2.5)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_price_list_is_the_flat_presets_real_bits(width):
    prices = allocation.price_list((2, 3, 4), 64)
    assert (prices["keys", width], prices["values", width]) == bits_per_channel(flat_preset(width, width), 64, 1)


def test_allocated_preset_survives_its_yaml():
    choice = allocation.choose_widths(made_up_costs(6, (2, 3, 4), 3), PRICES, 6, 3.4375)
    preset = allocation.allocated_preset(choice, "mine")
    read = CachePreset.from_dict(yaml.safe_load(yaml.safe_dump(allocation.preset_data(preset))))
    assert read == preset and read.layers
    for layer in range(6):
        flat = flat_preset(choice["keys", layer], choice["values", layer])
        assert read.layer_quantizers(layer, 6) == (flat.keys, flat.values)


def test_preset_data_keeps_changed_fields():
    preset = CachePreset(name="mine", sinks=2, boundary_layers=1)
    assert CachePreset.from_dict(allocation.preset_data(preset)) == preset


@pytest.mark.parametrize(
    ("budget", "names"), [(3.0, ["k2v4", "k3v3", "k4v2"]), (2.6, ["k2v3", "k3v2"]), (2.0, ["k2v2"])]
)
def test_flat_rivals_have_the_budgets_bytes(budget, names):
    assert [preset.name for preset in allocation.flat_rivals((2, 3, 4), budget)] == names


def test_flat_cost_is_that_of_the_presets_own_widths():
    costs = made_up_costs(2, (2, 3, 4), 0)
    expected = sum(costs["keys", layer, 4] + costs["values", layer, 2] for layer in range(2))
    assert allocation.flat_cost(costs, flat_preset(4, 2), (2, 3, 4), 2) == pytest.approx(expected)


def test_allocated_preset_has_no_more_bits_than_its_budget():
    budget = sum(bits_per_channel(flat_preset(3, 3), 64, 6)) / 2
    choice = allocation.choose_widths(made_up_costs(6, (2, 3, 4), 1), allocation.price_list((2, 3, 4), 64), 6, budget)
    preset = allocation.allocated_preset(choice, "mine")
    assert sum(bits_per_channel(preset, 64, 6)) / 2 <= budget
