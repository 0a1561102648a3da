"""`boundary_layers` and `layers` count the layers whose keys and values are packed, not those of the configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig, DynamicCache

from tests.support.families import available, build, family_named, prompt
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache
from turboquant_hf.config import BOUNDARY_VALUES, load_preset

TILES = {"tile": 8, "recent_window": 8, "min_statistics": 16}
BOUNDARY = {"preset": "k4v2", "boundary_layers": 1, **TILES}


def family(name, label=None, **options):
    base = family_named(name)
    return replace(base, options={**base.options, **options}, label=label or name)


FULL = {"layer_types": ["full_attention"] * 6, "num_hidden_layers": 6}
SIX_LAYERS = {**FULL, "intermediate_size": [48] * 6, "activation_sparsity_pattern": [0.0] * 6}
HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 4, "num_hidden_layers": 8}
MODELS = [
    family("gemma3n", num_kv_shared_layers=2, **SIX_LAYERS),
    family("gemma3n", "gemma3n-none-shared", num_kv_shared_layers=0, **SIX_LAYERS),
    family("gemma4", num_kv_shared_layers=4, **HALF_SLIDING),
    family("gemma4", "gemma4-none-shared", num_kv_shared_layers=0, **HALF_SLIDING),
    family("t5", "t5-short-decoder", num_hidden_layers=6, num_layers=6, num_decoder_layers=4),
    family("bart", "bart-short-decoder", encoder_layers=5, decoder_layers=3),
    family("qwen3_next", num_hidden_layers=8, layer_types=["linear_attention", "full_attention"] * 4),
    family("falcon_h1", num_hidden_layers=4),
    family("gemma2", **HALF_SLIDING),
    family("llama", num_hidden_layers=4),
]
MODES = {
    "dynamic": {"cache_implementation": "turboquant"},
    "prompt-lookup": {"cache_implementation": "turboquant", "prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "turboquant_static"},
}


@pytest.fixture
def made(monkeypatch):
    """The caches that are made while a test runs."""
    caches = []
    for cls in (TurboQuantCache, TurboQuantStaticCache):

        def packing(self, *args, _original=cls._pack_layers, **kwargs):
            _original(self, *args, **kwargs)
            caches.append(self)

        monkeypatch.setattr(cls, "_pack_layers", packing)
    return caches


def assert_boundaries_are_in_use(cache):
    layers = cache.packed_layers
    assert len(layers) >= 2 and all(layer.is_initialized for layer in layers), "only layers in use are counted"
    at_boundary = [layer.quantizers[1] == BOUNDARY_VALUES for layer in layers]
    assert at_boundary == [True, *[False] * (len(layers) - 2), True]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", MODELS, ids=lambda family: family.name)
def test_the_boundary_layers_are_the_first_and_last_in_use(family, mode, made):
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    model = build(family, eos_token_id=198)
    options = {"max_new_tokens": 6, "do_sample": False, **MODES[mode]}
    try:
        model.generate(**prompt(family, batch=1), **options, cache_config=BOUNDARY)
    except (ValueError, KeyError, IndexError) as error:
        upstream = {**options, "cache_implementation": {"static": "static"}.get(mode)}
        with pytest.raises((ValueError, KeyError, IndexError)):  # the cache of transformers cannot do it either
            model.generate(**prompt(family, batch=1), **upstream)
        pytest.skip(f"this transformers: {error!r}")
    if mode == "static" and not made[-1].packed_layers:
        pytest.skip("nothing of it is packed: its attention and recurrent state share a static layer")
    assert_boundaries_are_in_use(made[-1])


RECURRENT = ("qwen3_next", "falcon_h1")
DECODERS = [model for model in MODELS if model.auto == "AutoModelForCausalLM"]


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
@pytest.mark.parametrize("kind", [TurboQuantCache, TurboQuantStaticCache])
def test_a_users_own_cache_counts_the_same(family, kind):
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    if kind is TurboQuantStaticCache and family.kind in RECURRENT:
        pytest.skip("early versions have no static cache for it")
    model = build(family)
    sizes = {"max_cache_len": 64} if kind is TurboQuantStaticCache else {}
    cache = kind(model.config, **sizes, **BOUNDARY)
    model(**prompt(family, batch=1), past_key_values=cache)
    assert_boundaries_are_in_use(cache)


@pytest.mark.parametrize("shared", [0, 2])
def test_a_cache_without_layers_gets_one_per_owning_layer(shared):
    """transformers up to 5.10 makes such a cache for assisted decoding."""
    options = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "head_dim": 16}
    config = AutoConfig.for_model("gemma3n_text", num_kv_shared_layers=shared, **options)
    cache = TurboQuantCache.from_upstream(DynamicCache(), config, load_preset(**BOUNDARY))
    assert len(cache.layers) == len(cache.packed_layers) == 6 - shared
    assert [layer.quantizers[1] == BOUNDARY_VALUES for layer in cache.packed_layers].index(True, 1) == 5 - shared


def test_layer_overrides_count_owners_from_the_end():
    config = AutoConfig.for_model("gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2, head_dim=16)
    preset = load_preset("k4v4", layers={-1: {"values": "lossless"}})
    cache = TurboQuantCache.from_upstream(DynamicCache(), config, preset)
    assert [layer.quantizers[1].name == "lossless" for layer in cache.packed_layers] == [False, True]
    with pytest.raises(ValueError, match="the 2 KV layers of this model"):
        TurboQuantCache.from_upstream(DynamicCache(), config, load_preset("k4v4", layers={2: {"values": "lossless"}}))
