"""What `import turboquant_hf` does to transformers, and how `cache_config` is read."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, GenerationMixin, StaticCache

from tests.support.generating import TILES, generate, inputs_of, turboquant
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache
from turboquant_hf.cache.registration import _pack, parse_cache_config, register_cache
from turboquant_hf.config import load_preset


def test_registering_again_wraps_nothing_twice():
    names = ("_prepare_cache_for_generation", "_prefill", "init_continuous_batching")
    before = [getattr(GenerationMixin, name, None) for name in names]
    assert register_cache() and register_cache()
    assert [getattr(GenerationMixin, name, None) for name in names] == before


@pytest.mark.parametrize("name", ["turboquant", "turboquant_static"])
def test_the_names_are_valid_and_others_are_not(name):
    GenerationConfig(cache_implementation=name).validate()
    with pytest.raises(ValueError):
        GenerationConfig(cache_implementation=f"{name}_2").validate()


@pytest.mark.parametrize(
    ("name", "kind"), [("turboquant", TurboQuantCache), ("turboquant_static", TurboQuantStaticCache)]
)
def test_a_name_gives_its_cache_with_the_options_of_the_call(llama, name, kind):
    options = turboquant("k8v4", static=name.endswith("static"), graph=False)
    cache = generate(llama, inputs_of(), return_dict_in_generate=True, **options).past_key_values
    assert type(cache) is kind and not cache.graph and len(cache.packed_layers) == 2
    assert {field: getattr(cache.preset, field) for field in TILES} == TILES


def test_calls_with_other_caches_are_left_alone(llama):
    static = {"cache_implementation": "static", "disable_compile": True}
    for options, kind in (({}, DynamicCache), (static, StaticCache)):
        output = generate(llama, inputs_of(), return_dict_in_generate=True, **options)
        assert type(output.past_key_values) is kind
    assert llama.config._attn_implementation == "sdpa"


def test_the_configuration_of_a_call_is_as_it_was_afterwards(llama):
    config = GenerationConfig(
        max_new_tokens=4, do_sample=False, prefill_chunk_size=20, cache_implementation="turboquant", cache_config=TILES
    )
    before = config.to_dict()
    llama.generate(**inputs_of(), generation_config=config)
    assert config.to_dict() == before


def test_a_failing_call_leaves_the_configuration_as_it_was(llama):
    config = GenerationConfig(max_new_tokens=4, cache_implementation="turboquant", prefill_chunk_size=20)
    before = config.to_dict()
    with pytest.raises(RuntimeError, match="no such device"):
        llama._prepare_cache_for_generation(*_arguments(llama, config, broken=True))
    assert config.to_dict() == before


def _arguments(model, config, broken):
    class Broken(dict):
        def get(self, *_):
            raise RuntimeError("no such device")

    return config, Broken() if broken else {}, None, 1, 60


def test_cache_config_is_read_into_its_parts():
    assert parse_cache_config(None) == (load_preset("k4v4"), "auto", False, True)
    given = {"preset": "k3v3", "sinks": 8, "attention": "keep", "offloading": True, "graph": False}
    kept = dict(given)
    assert parse_cache_config(given) == (load_preset("k3v3", sinks=8), "keep", True, False)
    assert given == kept, "not consumed"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("k4v4", "a mapping, such as"),
        ({"attention": "fast"}, "attention='fast' is not supported; allowed: auto, keep"),
        ({"graphs": True}, r"unknown field 'graphs'=True \(did you mean 'graph'\?\)"),
        ({"graph": 1}, "graph=1 is not supported; allowed: true, false"),
    ],
    ids=str,
)
def test_bad_cache_configs_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        parse_cache_config(given)


def test_upstreams_empty_cache_is_replaced_by_ours(llama):
    preset = load_preset("k4v4", **TILES)
    ours = _pack(DynamicCache(config=llama.config), llama.config, preset, False)
    static = _pack(StaticCache(llama.config, 60), llama.config, preset, False)
    assert type(ours) is TurboQuantCache and type(static) is TurboQuantStaticCache
    assert [layer.max_cache_len for layer in static.packed_layers] == [60, 60]
    assert torch.equal(generate(llama, inputs_of(), ours, new=4), generate(llama, inputs_of(), static, new=4))
