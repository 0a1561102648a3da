"""The memory estimated from a configuration equals that of real caches of real models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from tests.support.families import FAMILIES, VOCAB, available, build, family_named, prompt
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, load_preset, preset_names
from turboquant_hf.cache.base import raw_nbytes
from turboquant_hf.cache.estimate import MemoryPlan, longest_context
from turboquant_hf.cache.probe import cache_parameter
from turboquant_hf.cache.switching import could_switch

SMALL = {"tile": 8, "recent_window": 8, "sinks": 2, "min_statistics": 24}
DECODERS = {f.name: f for f in FAMILIES if "Seq2Seq" not in f.auto and available(f)}
LENGTHS = {3: 1, 23: 2, 24: 1, 41: 2, 300: 3}
"""{tokens: batch}: before the first tile, at the first tile, and with room for several tiles ahead."""
SOME = ("llama", "mistral", "mixtral", "qwen3", "gemma3", "gemma4", "gpt_oss", "phi3", "deepseek_v3", "qwen3_next")
SOME += ("falcon_h1", "llama4")
"""Families that are tested at every length. The others are `slow`."""
ASK_FOR_NUMBERS = ("granitemoe",)
"""Families whose experts sort tokens on the host in early versions of transformers."""
CONFIG = LlamaConfig(num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=2, head_dim=64, hidden_size=128)


def made(name):
    return build(DECODERS[name]).to(torch.bfloat16)


def read(model, cache, batch, tokens, chunk=None):
    """A cache that holds a random prompt."""
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in ids.split(chunk or tokens, dim=1):
            model(part, use_cache=True, **{cache_parameter(type(model)): cache})
    return cache


def same(estimate, cache):
    assert estimate.resident_nbytes == cache.resident_nbytes and estimate.nbytes == cache.nbytes
    assert estimate.dense_nbytes == cache.dense_nbytes
    assert sum(kind.nbytes for kind in estimate.layers) == cache.nbytes - estimate.shared_nbytes
    assert sum(kind.dense_nbytes for kind in estimate.layers) == cache.dense_nbytes
    assert sum(kind.layers for kind in estimate.layers) == len(cache.layers)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in DECODERS]
)
def test_estimates_are_what_caches_of_models_hold(name):
    model = made(name)
    observed, own = could_switch(model), model.config._attn_implementation
    try:
        plan, preset = MemoryPlan(model.config, torch.bfloat16), load_preset("k4v4", **SMALL)
    except ValueError:
        if name not in ASK_FOR_NUMBERS:
            raise
        pytest.skip("its experts ask for numbers in this version of transformers")
    for tokens, batch in LENGTHS.items() if name in SOME else [(41, 2)]:
        dense = raw_nbytes(read(model, DynamicCache(config=model.config), batch, tokens).layers)
        if observed:
            model.set_attn_implementation("turboquant")
        estimate = plan.estimate(tokens, preset, batch, observed=observed)
        same(estimate, read(model, TurboQuantCache(model.config, preset), batch, tokens))
        assert estimate.dense_nbytes == dense, "the tensors of transformers' own cache"
        if observed:
            model.set_attn_implementation(own)
    packed = sum(kind.layers for kind in estimate.layers if "packed" in kind.kind)
    assert packed == (DECODERS[name].packed or 0) or name == "mpt", "mpt's cache packs, but its model does not use it"


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders(name):
    """Self-attention as estimated; cross-attention is transformers' own, and grows with the encoder's tokens."""
    family = family_named(name)
    model = build(family).to(torch.bfloat16)
    inputs = {key: x.to(torch.bfloat16) if x.is_floating_point() else x for key, x in prompt(family).items()}
    config, plan = model.config, MemoryPlan(model.config, torch.bfloat16)
    for tokens in (23, 41, 200):
        cache = TurboQuantCache(config, "k4v4", **SMALL)
        both = EncoderDecoderCache(cache, DynamicCache(config=config.get_text_config(decoder=True)))
        ids = torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model(**inputs, decoder_input_ids=ids, use_cache=True, **{cache_parameter(type(model)): both})
        estimate = plan.estimate(tokens, load_preset("k4v4", **SMALL), 2, observed=False)
        same(estimate, cache)
        cross = both.cross_attention_cache.layers
        assert sum(kind.layers for kind in estimate.layers) == len(cross) == 2
        assert raw_nbytes(cross) == estimate.cross_token_nbytes * 2 * cross[0].keys.shape[2] > 0


def test_layers_with_an_indexer_grow_uncompressed():
    if "deepseek_v32" not in DECODERS:
        pytest.skip("this transformers has no deepseek_v32")
    config = made("deepseek_v32").config
    short, long = (TurboQuantCache.estimate(config, tokens, "k4v4") for tokens in (100, 1100))
    assert [kind.kind for kind in long.layers] == ["indexed"] and long.layers[0].layers == 2
    assert long.nbytes - short.nbytes == 1000 * long.token_nbytes == 1000 * long.dense_token_nbytes
    assert long.dense_token_nbytes == 2 * 2 * (16 + 8 + 16), "bytes and layers: the latent, its positions, the indexer"
    assert long.cross_token_nbytes == 0 and long.compression_ratio == 1


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "phi3", "mixtral", "qwen3_next"])
def test_estimates_of_preallocated_caches(name):
    model = made(name)
    assert could_switch(model)
    model.set_attn_implementation("turboquant")
    for tokens, batch in LENGTHS.items():
        cache = read(model, TurboQuantStaticCache(model.config, 320, "k4v4", **SMALL), batch, tokens)
        same(TurboQuantStaticCache.estimate(model.config, 320, tokens, "k4v4", batch, torch.bfloat16, **SMALL), cache)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset(preset):
    """With tiles and a tail."""
    hold(preset, 700)


@pytest.mark.parametrize("preset", ["k4v4", "paper-mse-3"], ids=["with statistics", "without"])
@pytest.mark.parametrize("tokens", [100, 511])
def test_before_the_first_tile_and_before_there_are_statistics(preset, tokens):
    hold(preset, tokens)


def test_room_ahead_for_more_than_one_tile():
    hold("kivi-4", 6000)


def hold(preset, tokens):
    cache = TurboQuantCache(CONFIG, preset)
    x = torch.randn(2, 2, tokens, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in range(6):
        cache.update(x, x, layer)
    same(plan_of_llama().estimate(tokens, load_preset(preset), 2, observed=False), cache)


def plan_of_llama(plans=[]):  # noqa: B006  (one for all tests)
    return plans[0] if plans else plans.append(MemoryPlan(CONFIG, torch.bfloat16)) or plans[0]


def test_a_prompt_in_pieces_and_the_bytes_that_sliding_layers_free():
    model = made("gemma3")
    model.set_attn_implementation("turboquant")
    for chunk in (100, 50, 7):
        estimate = TurboQuantCache.estimate(model.config, 120, "k4v4", 2, torch.bfloat16, chunk, **SMALL)
        cache = read(model, TurboQuantCache(model.config, "k4v4", **SMALL), 2, 120, chunk)
        same(estimate, cache)
        read(model, cache, 2, 1)
        assert cache.resident_nbytes == estimate.resident_nbytes - estimate.released_nbytes
    whole = TurboQuantCache.estimate(model.config, 120, "k4v4", 2, torch.bfloat16, **SMALL)
    assert whole.released_nbytes > 0 == estimate.released_nbytes, "the last piece is one token"
    assert {kind.kind: (kind.layers, kind.window) for kind in whole.layers} == {
        "sliding window": (2, 12),
        "packed": (2, None),
    }


def test_a_layer_with_a_recurrent_state_grows_by_its_packed_tokens_alone():
    plan, preset = MemoryPlan(made("falcon_h1").config, torch.bfloat16), load_preset("k4v4", **SMALL)
    short, long = (plan.estimate(tokens, preset) for tokens in (8 * 100 + 15, 8 * 300 + 15))
    assert long.nbytes - short.nbytes == 8 * 200 * short.token_nbytes
    assert long.dense_nbytes - short.dense_nbytes == 8 * 200 * short.dense_token_nbytes


def test_the_growth_per_token_and_the_longest_context():
    plan, preset = plan_of_llama(), load_preset("k3v3")
    short, long = (plan.estimate(tokens, preset, 2) for tokens in (128 * 100 + 255, 128 * 300 + 255))
    assert long.nbytes - short.nbytes == 2 * 128 * 200 * short.token_nbytes
    assert long.dense_nbytes - short.dense_nbytes == 2 * 128 * 200 * short.dense_token_nbytes

    def held(tokens):
        return plan.cache_behind(tokens, preset).resident_nbytes

    for memory in (held(10_000), held(100_000) - 1, 50_000_000):
        longest = longest_context(memory, held)
        assert held(longest) <= memory < held(longest + 1)
    assert longest_context(10, held) == 0


def test_bad_input_is_refused():
    for options, words in [
        ({"tokens": 0}, "tokens=0"),
        ({"batch": 0}, "batch=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"preset": "k4v5"}, "k4v5"),
        ({"config": {}}, "config="),
        ({"config": PreTrainedConfig()}, "cannot be told from its configuration"),
    ]:
        with pytest.raises(ValueError, match=words):
            TurboQuantCache.estimate(**{"config": CONFIG, "tokens": 100, **options})
    with pytest.raises(ValueError, match="max_cache_len=50"):
        TurboQuantStaticCache.estimate(CONFIG, 50, 100)
    assert CONFIG.pad_token_id is None and CONFIG._attn_implementation != "eager", "the configuration is left as it was"
