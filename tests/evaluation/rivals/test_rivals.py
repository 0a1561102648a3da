"""Quantizers that only the evaluation has, and caches of other libraries in the harness."""

import pytest
import torch

from turboquant_hf import load_preset
from turboquant_hf.evaluation.harness import fidelity
from turboquant_hf.evaluation.harness.vectors import round_trip
from turboquant_hf.evaluation.rivals import foreign, non_uniform, pruning


@pytest.fixture
def model(small_llama):
    model = small_llama(head_dim=64, hidden_size=64)
    model.set_attn_implementation("turboquant")
    return model


@pytest.fixture
def window():
    return torch.randint(3, 199, (1, 512), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_non_uniform_keeps_outliers_and_stores_what_its_layout_says(axis):
    x = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3, 5] = 1000.0
    quantizer = non_uniform.NonUniform(bits=4, axis=axis)
    decoded = round_trip(quantizer, x)
    assert decoded[0, 3, 5] == 1000.0
    x[0, 3, 5] = decoded[0, 3, 5] = 0.0
    assert (decoded - x).square().sum() < 0.02 * x.square().sum()
    tiles = x.unflatten(1, (-1, 128))[None]
    packed = quantizer.encode(tiles, quantizer.fit(tiles, torch.ones(1, 2, 128), None))
    for name, field in quantizer.layout(64, 128, torch.float32).items():
        assert packed[name].shape[3:] == field.shape and packed[name].dtype == field.dtype


def test_non_uniform_places_reach_the_end_of_a_large_tile():
    x = torch.zeros(1, 128, 512)
    x[0, 127, 511] = 7.0
    assert round_trip(non_uniform.NonUniform(bits=2, outliers=1e-4), x)[0, 127, 511] == 7.0


def test_lloyd_levels_are_the_gaussian_codebooks():
    x = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    levels = non_uniform.lloyd_levels(x, 4, rounds=100)
    torch.testing.assert_close(levels[0], torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=0.03, rtol=0)


def test_non_uniform_runs_in_the_harness(model, window):
    preset = non_uniform.non_uniform_preset("nu", bits=4, outliers=0.01, recent_window=0)
    _, [nu, ours] = fidelity.measure(
        model,
        [window],
        [preset, load_preset("k2v2", recent_window=0, min_statistics=256)],
        cache_class=foreign.make_cache,
    )
    assert 0 < nu["kl"] < ours["kl"]


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantized_cache_is_measured_by_its_own_bytes(model, window, backend):
    pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq"}[backend], reason="optional backend")
    options = {"backend": backend, "nbits": 4} | ({"axis_key": 1, "axis_value": 1} if backend == "hqq" else {})
    preset = foreign.ForeignPreset(name=backend, min_statistics=0, recent_window=0, options=tuple(options.items()))
    _, [found] = fidelity.measure(model, [window], [preset], cache_class=foreign.make_cache)
    assert found["kl"] > 0
    assert 4 < found["key_bits"] <= 5 and found["compression_ratio"] == pytest.approx(16 / found["key_bits"], rel=0.01)


def test_prune_then_quantize_composes(small_llama):
    pytest.importorskip("kvpress", reason="needs: pip install --no-deps kvpress")
    model = small_llama(head_dim=64, hidden_size=64)
    model.set_attn_implementation("turboquant")
    window = torch.randint(3, 199, (1, 1024), generator=torch.Generator().manual_seed(0))
    options = {"press": "SnapKVPress", "presets": ["lossless", "k4v4"], "compression_ratio": 0.5}
    lossless, packed = pruning.measure_pruned(model, window, **options, chunk=128, recent_window=0)
    assert lossless["kl"] > 0 and packed["kl"] > 0 and lossless["kept"] == 0.5 and packed["bits"] < 3
