"""Computed bits and bytes equal those of a real cache."""

import pytest
import torch
from transformers import LlamaConfig

from turboquant_hf import TurboQuantCache, load_preset
from turboquant_hf.evaluation.presets.memory import (
    average_bits,
    bits_per_channel,
    memory_cell,
    resident_compression,
    used_compression,
)

CONFIG = LlamaConfig(num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2, head_dim=64, hidden_size=128)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2", "paper-2.5", "kivi-4", "old-turbo4", "polar-4"])
def test_used_compression_is_the_caches_own(name):
    cache = TurboQuantCache(CONFIG, name)
    x = torch.randn(1, 2, 700, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in range(6):
        cache.update(x, x, layer)
    assert used_compression(load_preset(name), 64, 700, 6, 2) == pytest.approx(cache.compression_ratio_in_use, rel=1e-3)
    assert bits_per_channel(load_preset(name), 64, 6) == pytest.approx(average_bits(cache))


@pytest.mark.parametrize("name", ["k4v4", "k8v4", "lossless", "paper-mse-2"])
@pytest.mark.parametrize("tokens", [100, 255, 512, 700])
def test_resident_compression_is_a_real_caches(name, tokens):
    """Behind a prompt, the room allocated ahead included; below 1 where the cache takes more than a 16-bit one."""
    cache = TurboQuantCache(CONFIG, name)
    x = torch.randn(1, 2, tokens, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in range(6):
        cache.update(x, x, layer)
    real = cache.dense_nbytes / (cache.nbytes + cache.spare_nbytes)
    assert resident_compression(load_preset(name), 64, tokens, 6, 2) == pytest.approx(real, rel=2e-3)


def test_memory_says_resident_bytes_first_and_where_there_is_no_gain():
    preset = load_preset("k4v4")
    assert memory_cell(preset, 128, 32768, 32, 8) == "3.58x (3.80x)"
    short = memory_cell(preset, 128, 255, 32, 8)
    assert short.startswith("0.") and "x: larger than 16 bit (" in short
