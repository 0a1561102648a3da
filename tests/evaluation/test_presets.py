"""The table of presets: computed figures beside those of a real cache."""

import pytest
import torch
from transformers import LlamaConfig

from turboquant_hf import TurboQuantCache, cli, load_preset, preset_names
from turboquant_hf.evaluation import common
from turboquant_hf.evaluation.presets import bits_per_channel, expected_compression, flat_preset

CONFIG = LlamaConfig(num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2, head_dim=64, hidden_size=128)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2", "paper-2.5", "kivi-4", "old-turbo4", "polar-4"])
def test_expected_compression_is_the_caches_own(name):
    cache = TurboQuantCache(CONFIG, name)
    x = torch.randn(1, 2, 700, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in range(6):
        cache.update(x, x, layer)
    assert expected_compression(load_preset(name), 64, 700, 6, 2) == pytest.approx(cache.compression_ratio, rel=1e-3)
    assert bits_per_channel(load_preset(name), 64, 6) == pytest.approx(common.average_bits(cache))


def test_presets_lists_every_shipped_preset(capsys):
    assert cli.main(["presets", "--head-dim", "64", "128"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in preset_names())


def test_presets_marks_a_head_dim_that_a_preset_cannot_serve(capsys):
    assert cli.main(["presets", "--head-dim", "24", "--preset", "polar-4"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["polar-4", "-", "-", "-"]


@pytest.mark.parametrize("name", ["k2v2", "k3v3", "k4v4", "k8v4"])
def test_flat_preset_is_the_shipped_one(name):
    assert flat_preset(int(name[1]), int(name[3])) == load_preset(name, boundary_layers=0)


def test_flat_preset_names_the_widths_there_are():
    with pytest.raises(ValueError, match="keys: width=5 is not supported; allowed: 2, 3, 4, 8"):
        flat_preset(5, 4)
