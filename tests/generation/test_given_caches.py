"""Mistakes in a cache that the user gives, or in a `cache_config`, raise an error before anything runs."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, EncoderDecoderCache, GenerationConfig

from tests.support.generating import generate
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, load_preset

CACHES = {
    "dynamic": lambda config: TurboQuantCache(config, "lossless"),
    "static": lambda config: TurboQuantStaticCache(config, 200, "lossless"),
}


@pytest.fixture
def ids():
    return torch.randint(3, 199, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def filled(model, tokens, make):
    cache = make(model.config)
    model(tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("held", [40, 41, 60])
def test_a_cache_that_is_not_shorter_than_the_prompt_is_refused(llama, ids, make, held):
    cache = filled(llama, torch.cat([ids, ids], dim=1)[:, :held], make)
    with pytest.raises(ValueError, match=f"holds {held} tokens and the prompt has 40: the prompt must begin"):
        generate(llama, ids, cache)
    if not isinstance(cache, TurboQuantStaticCache):
        cache.crop(39 - held)  # as the message advises
        assert torch.equal(generate(llama, ids, cache), generate(llama, ids))


@pytest.mark.parametrize("held", [1, 20, 39])
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_cache_of_the_prompts_beginning_is_continued(llama, ids, make, held):
    cache = filled(llama, ids[:, :held], make)
    assert torch.equal(generate(llama, ids, cache), generate(llama, ids))


def test_new_tokens_alone_continue_with_the_mask_of_all_tokens(llama, ids):
    cache = filled(llama, ids[:, :30], CACHES["dynamic"])
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    new = llama.generate(ids[:, 30:], past_key_values=copy.deepcopy(cache), **options)
    dense = filled(llama, ids[:, :30], lambda config: DynamicCache(config=config))
    assert torch.equal(new, llama.generate(ids[:, 30:], past_key_values=dense, **options))


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(("mine", "models"), [(2, 3), (3, 2)])
def test_a_cache_for_another_number_of_layers_is_refused(small_llama, ids, make, mine, models):
    model = small_llama(num_hidden_layers=models)
    cache = make(small_llama(num_hidden_layers=mine).config)
    with pytest.raises(ValueError, match=f"num_hidden_layers={mine}, but LlamaForCausalLM has {models}.*model.config"):
        generate(model, ids, cache)
    if mine < models:
        with pytest.raises(ValueError, match="made for a model of 2 layers, .* asks for layer 2"):
            model(ids, past_key_values=cache)


def test_a_cache_for_other_heads_is_refused(small_llama, ids):
    cache = TurboQuantCache(small_llama(num_key_value_heads=4).config)
    with pytest.raises(ValueError, match="num_key_value_heads=4, but LlamaForCausalLM has 2"):
        generate(small_llama(), ids, cache)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": Path("mine.yaml")}, r"preset=PosixPath\('mine.yaml'\).*saved as JSON; allowed: .* 'mine.yaml'"),
        ({"preset": load_preset("k4v4")}, r"preset=.*allowed: a name, or CachePreset.to_dict\(\)"),
        ({"keys": load_preset("k4v4").keys}, "keys=.*allowed: text, numbers"),
        ({"sinks": torch.tensor(3)}, "sinks=.*allowed: text, numbers"),
        ({"preset": torch.float16}, "preset=torch.float16.*allowed: text, numbers"),
        ({"layers": {(0, 1): {}}}, "layers=.*allowed: text, numbers"),
    ],
    ids=str,
)
def test_what_json_cannot_hold_is_refused_in_a_cache_config(llama, ids, config, message):
    config = GenerationConfig(cache_implementation="turboquant", cache_config=config, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        llama.generate(ids, generation_config=config)


@pytest.mark.parametrize("name", ["turboquant", "turboquant_static"])
def test_a_cache_config_that_is_taken_can_be_shown_saved_and_loaded(llama, ids, name, tmp_path):
    """In JSON, tuples become lists and ordinals become text. Both are read back correctly."""
    preset = load_preset("k4v4", layers={1: {"values": "lossless"}}).to_dict()
    for options in ({"preset": preset}, {"preset": "k4v4", "layers": {1: {"values": "lossless"}}}):
        config = GenerationConfig(cache_implementation=name, cache_config=options, max_new_tokens=2, do_sample=False)
        expected = llama.generate(ids, generation_config=config)
        assert name in repr(config)
        config.save_pretrained(tmp_path)
        loaded = GenerationConfig.from_pretrained(tmp_path)
        assert loaded.cache_config == json.loads(json.dumps(options))
        assert torch.equal(llama.generate(ids, generation_config=loaded), expected)


def mistakes(model, folder):
    """{name: (a call with a typical mistake, the text of the error)}."""
    config, cache = model.config, TurboQuantCache(model.config)
    load, save = TurboQuantCache.load, cache.save
    dynamic, static = TurboQuantCache, partial(TurboQuantStaticCache, config)
    saved = folder / "ok.cache"
    cache.save(saved)
    return {
        "model for config": (lambda: dynamic(model), "config=<LlamaForCausalLM>.*model.config"),
        "name for config": (lambda: dynamic("k4v4"), "config='k4v4'.*model.config"),
        "config for preset": (lambda: dynamic(config, config), "preset=<LlamaConfig>.*allowed: a name"),
        "bits for preset": (lambda: dynamic(config, 4), "preset=4"),
        "no preset": (lambda: dynamic(config, None), "preset=None"),
        "folder for preset": (lambda: dynamic(config, "x.yaml"), "preset='x.yaml': no such file"),
        "offloading as text": (lambda: dynamic(config, offloading="cpu"), "offloading='cpu'.*true, false"),
        "float window": (lambda: dynamic(config, recent_window=1.0), "recent_window=1.0"),
        "huge window": (lambda: dynamic(config, recent_window=10**9), "recent_window=1000000000"),
        "static: no length": (lambda: static(None), "max_cache_len=None.*from 1"),
        "static: float": (lambda: static(64.0), "max_cache_len=64.0"),
        "static: negative": (lambda: static(-1), "max_cache_len=-1"),
        "static: config": (lambda: static(config), "max_cache_len=<LlamaConfig>"),
        "from_yaml: name": (lambda: dynamic.from_yaml("k4v4", config), "preset='k4v4' names the shipped preset"),
        "from_yaml: folder": (lambda: dynamic.from_yaml(folder, config), "a folder; allowed: a YAML file"),
        "from_yaml: swapped": (lambda: dynamic.from_yaml(config, "k4v4"), "path=<LlamaConfig>.*YAML file"),
        "load: model": (lambda: load(saved, model), "config=<LlamaForCausalLM>.*model.config"),
        "load: swapped": (lambda: load(config, saved), "config=.*ok.cache.*model.config"),
        "load: folder": (lambda: load(folder, config), "a folder; allowed: a saved cache"),
        "load: nothing": (lambda: load(None, config), "path=None.*a saved cache"),
        "load: missing": (lambda: load(folder / "no", config), "no': no such file"),
        "load: device": (lambda: load(saved, config, device="gpu:zero"), "device='gpu:zero'.*cuda:0"),
        "load: devices": (lambda: load(saved, config, device={0: object}), "device=.*layer index"),
        "load: offloading": (lambda: load(saved, config, offloading=1), "offloading=1"),
        "save: folder": (lambda: save(folder), "path=.*allowed: the path of a file"),
        "save: nothing": (lambda: save(None), "path=None.*the path of a file"),
        "mask: list": (lambda: cache.note_padding([[0, 1]]), r"attention_mask=\[\[0, 1\]\].*tensor \[B, T\]"),
    }


def test_wrong_arguments_are_named_in_the_error(llama, tmp_path):
    for name, (call, message) in mistakes(llama, tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()
            pytest.fail(f"{name} is taken")


def test_a_changed_preset_is_seen_in_the_caches_text(llama):
    for cache in (TurboQuantCache(llama.config, keys="lossless"), TurboQuantStaticCache(llama.config, 9, sinks=2)):
        assert "preset='k4v4 with " in repr(cache)
    assert "preset='k4v4'" in repr(TurboQuantCache(llama.config))


def test_the_decoders_part_of_an_encoder_decoder_cache_is_checked():
    sizes = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 99}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "pad_token_id": 0}
    model = BartForConditionalGeneration(BartConfig(**sizes, decoder_layers=2)).eval()
    ids = torch.randint(5, 99, (1, 12))

    def cache(layers):
        config = BartConfig(**sizes, decoder_layers=layers)
        return EncoderDecoderCache(TurboQuantCache(config, "lossless"), DynamicCache(config=config))

    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 1}
    assert torch.equal(model.generate(ids, past_key_values=cache(2), **options), model.generate(ids, **options))
    with pytest.raises(ValueError, match="num_hidden_layers=3, but BartForConditionalGeneration has 2"):
        model.generate(ids, past_key_values=cache(3), **options)
