"""Variants from YAML, the front, the picture."""

from dataclasses import replace

import pytest

from turboquant_hf import load_preset
from turboquant_hf.evaluation.commands import ablate
from turboquant_hf.resources import config_path


def test_every_shipped_variant_is_a_preset_with_nothing_raw():
    rows = ablate.read_variants(config_path("eval", "ablate.yaml"))
    for section, _, preset in rows:
        assert preset.encode_first and (preset.recent_window == 0 or section.startswith("recent window"))
        preset.validate(64)
    assert len({section for section, *_ in rows}) >= 7


def test_variant_changes_options_of_the_bases_quantizer():
    preset = ablate.variant({"base": "k3v3", "keys": {"center": False}, "sinks": 0})
    assert preset.keys == replace(load_preset("k3v3").keys, center=False)
    assert preset.values == load_preset("k3v3").values and preset.sinks == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": 1}, "'base'"),
        ({"base": "k4v4", "keys": {"centre": False}}, "centre"),
        ({"base": "k4v4", "sink": 1}, "unknown field 'sink'"),
    ],
    ids=["no-base", "unknown-option", "unknown-field"],
)
def test_variant_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        ablate.variant(change)


def test_read_variants_lists_the_existing_sections():
    with pytest.raises(ValueError, match="allowed: 'ingredients, 4-bit keys'"):
        ablate.read_variants(config_path("eval", "ablate.yaml"), ["colours"])


def test_pareto_front_keeps_the_points_that_no_other_beats():
    points = [(4.0, 0.1), (3.0, 0.2), (3.5, 0.3), (2.0, 0.9), (3.0, 0.25), (5.0, 0.1)]
    assert ablate.pareto_front(points) == [3, 1, 0]
