"""Flat presets are built of the shipped quantizers."""

import pytest

from turboquant_hf import load_preset
from turboquant_hf.evaluation.presets.widths import flat_preset


@pytest.mark.parametrize("name", ["k2v2", "k3v3", "k4v4"])
def test_flat_preset_is_the_shipped_one(name):
    assert flat_preset(int(name[1]), int(name[3])) == load_preset(name, boundary_layers=0)


def test_flat_preset_with_8_bit_keys_has_the_values_of_k4v4():
    assert flat_preset(8, 4) == load_preset("k8v4", boundary_layers=0, values=load_preset("k4v4").values)


def test_flat_preset_lists_the_existing_widths():
    with pytest.raises(ValueError, match="keys: width=5 is not supported; allowed: 2, 3, 4, 8"):
        flat_preset(5, 4)
