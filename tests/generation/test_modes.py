"""Every mode of `generate` with `lossless` gives the tokens of DynamicCache, with both kinds of attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

from tests.support.families import build, family_named
from tests.support.generating import TILES, generate, inputs_of, turboquant
from turboquant_hf import TurboQuantCache

PROMPT = 45


@pytest.fixture(params=["auto", "keep"])
def packed(request):
    """The arguments of `generate` that ask for a packed cache."""
    return turboquant(attention=request.param)


@pytest.fixture
def inputs():
    return inputs_of(length=PROMPT)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "beam-sampling": {"num_beams": 3, "do_sample": True},
    "chunked-prefill": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(llama, inputs, packed, mode):
    expected = generate(llama, inputs, **MODES[mode])
    config = copy.deepcopy(packed["cache_config"])
    for _ in range(2):
        assert torch.equal(generate(llama, inputs, **MODES[mode], **packed), expected)
        assert packed["cache_config"] == config, "not consumed"


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_left_padding(llama, inputs, packed, mode):
    inputs["attention_mask"][1, :19] = 0
    inputs["input_ids"][1, :19] = 0
    expected = generate(llama, inputs, **MODES[mode])
    assert torch.equal(generate(llama, inputs, **MODES[mode], **packed), expected)


def test_a_padded_batch_equals_its_singles(llama, inputs, packed):
    inputs["attention_mask"][1, :19] = 0
    both = generate(llama, inputs, **packed)
    for row, start in ((0, 0), (1, 19)):
        single = generate(llama, {name: x[row : row + 1, start:] for name, x in inputs.items()}, **packed)
        assert torch.equal(both[row, PROMPT:], single[0, PROMPT - start :])


@pytest.mark.parametrize("assistant", [True, False], ids=["assisted", "prompt-lookup"])
def test_candidates(llama, small_llama, inputs, packed, assistant):
    single = {name: x[:1] for name, x in inputs.items()}
    helper = small_llama(seed=1)
    for model in (llama, helper):  # early versions want to compare candidates with an end, here one that never comes
        model.generation_config.eos_token_id = 198
        model.generation_config.suppress_tokens = [198]
    helper = {"assistant_model": helper} if assistant else {"prompt_lookup_num_tokens": 3}
    expected = generate(llama, single)
    assert torch.equal(generate(llama, single, **helper, **packed), expected)


@pytest.mark.parametrize("attention", ["sdpa", "turboquant", "eager"])
def test_a_second_turn_and_a_copied_prompt(llama, inputs, attention):
    llama.set_attn_implementation(attention)
    expected = generate(llama, inputs)
    more = torch.cat([expected, inputs["input_ids"][:, :20]], dim=1)
    second = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    llama(**{name: x[:, :-1] for name, x in inputs.items()}, past_key_values=cache)
    for _ in range(2):
        own = copy.deepcopy(cache)
        assert torch.equal(generate(llama, inputs, past_key_values=own), expected)
        assert torch.equal(generate(llama, second, past_key_values=own), generate(llama, second))
    assert cache.get_seq_length() == PROMPT - 1


def test_switching_the_attention_of_a_live_model(llama, inputs):
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    plain = [llama(**inputs).logits[:, -1]]
    ids = inputs["input_ids"]
    got = []
    for step, attention in enumerate(["sdpa", "turboquant", "eager", "turboquant", "sdpa"] * 4):
        llama.set_attn_implementation(attention)
        got.append(llama(ids if step == 0 else ids[:, step : step + 1], past_key_values=cache).logits[:, -1])
    llama.set_attn_implementation("sdpa")
    full = torch.cat([ids, ids[:, 1:20]], dim=1)
    plain = llama(full).logits[:, PROMPT - 1 :]
    torch.testing.assert_close(torch.stack(got, dim=1), plain, atol=1e-4, rtol=1e-4)


def test_static_cache_on_a_switched_model(llama, inputs):
    expected = generate(llama, inputs)
    llama.set_attn_implementation("turboquant")
    assert torch.equal(generate(llama, inputs, cache_implementation="static", disable_compile=True), expected)


def test_saved_generation_config(llama, inputs, packed, tmp_path):
    GenerationConfig(max_new_tokens=24, do_sample=False, **packed).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config.cache_implementation == "turboquant"
    assert torch.equal(llama.generate(**inputs, generation_config=config), generate(llama, inputs))


def test_unknown_presets_and_conflicts_are_named(llama, inputs):
    with pytest.raises(ValueError, match="k9v9.*allowed"):
        generate(llama, inputs, cache_implementation="turboquant", cache_config={"preset": "k9v9"})
    with pytest.raises(ValueError, match="attention='fast'.*auto, keep"):
        generate(llama, inputs, cache_implementation="turboquant", cache_config={"attention": "fast"})
    with pytest.raises(ValueError, match="only one"):
        generate(llama, inputs, cache_implementation="turboquant", past_key_values=TurboQuantCache(llama.config))


def test_an_invalid_cache_config_is_named_in_the_error(llama, inputs):
    for config, message in (
        ("k3v3", 'a mapping, such as {"preset": "k4v4"}'),
        ({"offload": True}, r"cache_config: unknown field 'offload'=True \(did you mean 'offloading'\?\); .*preset"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(llama, inputs, cache_implementation="turboquant", cache_config=config)


def test_a_users_own_cache_recommends_its_attention_once(llama, inputs, monkeypatch):
    from turboquant_hf.cache import registration

    said = []
    monkeypatch.setattr(registration.logger, "warning_once", said.append)
    generate(llama, inputs, past_key_values=TurboQuantCache(llama.config))
    assert len(said) == 1 and 'model.set_attn_implementation("turboquant")' in said[0]
    llama.set_attn_implementation("turboquant")
    generate(llama, inputs, past_key_values=TurboQuantCache(llama.config))
    assert len(said) == 1


def test_continuous_batching_is_refused(llama, inputs):
    config = GenerationConfig(max_new_tokens=2, cache_implementation="turboquant")
    with pytest.raises(ValueError, match="continuous batching"):
        llama.generate_batch(inputs["input_ids"].tolist(), generation_config=config)


def test_continuous_batching_of_a_switched_model_is_refused(llama, inputs):
    llama.set_attn_implementation("turboquant")
    with pytest.raises(ValueError, match="own paged cache.*use generate"):
        llama.generate_batch(inputs["input_ids"].tolist(), generation_config=GenerationConfig(max_new_tokens=2))


@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
@torch.no_grad()
def test_crop_anywhere(llama, inputs, attention):
    """After a crop from any length to every tenth length, the cache continues like a fresh cache."""
    llama.set_attn_implementation(attention)
    ids = inputs["input_ids"]
    expected = llama(ids).logits
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    llama(ids, past_key_values=cache)
    for keep in [*range(PROMPT - 1, 0, -10), *range(3, PROMPT, 7), *range(PROMPT - 1, 0, -1)]:
        cache.crop(keep - cache.get_seq_length())
        assert cache.get_seq_length() == keep
        got = llama(ids[:, keep:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected[:, keep:], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
@pytest.mark.parametrize("preset", ["lossless", "k4v4", "k2v2"])
def test_reset_and_reuse(small_llama, inputs, attention, preset):
    """After a reset, a cache that served another batch with other padding is like a new cache."""
    model = small_llama(head_dim=16)
    model.set_attn_implementation(attention)
    cache = TurboQuantCache(model.config, preset, **TILES)
    padded = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1].clone()}
    padded["attention_mask"][:, :11] = 0
    for given in (inputs, padded, inputs):
        expected = generate(model, given, past_key_values=TurboQuantCache(model.config, preset, **TILES))
        assert torch.equal(generate(model, given, past_key_values=cache), expected)
        assert cache.packed_layers[0].tiles[0].count
        cache.reset()
        assert cache.get_seq_length() == cache.nbytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", ["k4v4", "k3v3"])
def test_modes_of_a_preset_repeat_themselves(small_llama, inputs, packed, mode, preset):
    """Two runs give the same tokens, as many as without compression."""
    model = small_llama(head_dim=16)
    packed["cache_config"]["preset"] = preset
    runs = [generate(model, inputs, **MODES[mode], **packed) for _ in range(2)]
    assert torch.equal(*runs)
    assert runs[0].shape == generate(model, inputs, **MODES[mode]).shape


def test_gradient_checkpointing_leaves_the_cache_out(llama, inputs):
    """transformers drops any cache there and says so. The gradients are those without a cache."""
    llama.set_attn_implementation("turboquant")
    llama.train()
    llama.gradient_checkpointing_enable()
    ids, gradients = inputs["input_ids"], []
    cache = TurboQuantCache(llama.config, "lossless")
    for options in ({"use_cache": False}, {"past_key_values": cache}):
        llama.zero_grad()
        llama(ids, labels=ids, **options).loss.backward()
        gradients.append([x.grad.clone() for x in llama.parameters()])
    assert cache.get_seq_length() == 0
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_after_a_step_with_a_cache_is_refused(llama, inputs):
    llama.set_attn_implementation("turboquant")
    ids = inputs["input_ids"]
    loss = llama(ids, labels=ids, past_key_values=TurboQuantCache(llama.config, "lossless")).loss
    with pytest.raises(RuntimeError, match="keeps no gradients.*use_cache=False"):
        loss.backward()


def test_training_is_refused(llama, inputs):
    llama.set_attn_implementation("turboquant")
    llama.train()
    with pytest.raises(ValueError, match="no training"):
        llama(**inputs, past_key_values=TurboQuantCache(llama.config, "lossless"))


def test_pipeline(llama, inputs, packed):
    """`pipeline` passes the same arguments on."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<bos>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, 199)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    generator = pipeline("text-generation", model=llama, tokenizer=tokenizer)
    text = " ".join(f"w{index}" for index in inputs["input_ids"][0].tolist())
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = generator(text, **options)
    assert generator(text, **options, **packed) == expected
    switched = packed["cache_config"]["attention"] == "auto"
    assert llama.config._attn_implementation == ("turboquant" if switched else "sdpa")


@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
@pytest.mark.parametrize("tokens", [5, 60])
@torch.no_grad()
def test_an_empty_batch(llama, attention, tokens):
    """Only the cache is tested, because models cannot reshape an empty batch."""
    llama.set_attn_implementation(attention)
    cache = TurboQuantCache(llama.config, "k4v4", **TILES)
    for new in (tokens, 1, 0):
        for x in cache.update(torch.empty(0, 2, new, 8), torch.empty(0, 2, new, 8), 0):
            assert x.shape == (0, 2, cache.get_seq_length(), 8) == torch.cat([x], dim=1).shape
    assert cache.get_seq_length() == tokens + 1


@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
@torch.no_grad()
def test_a_step_without_tokens_changes_nothing(llama, inputs, attention):
    llama.set_attn_implementation(attention)
    expected = llama(inputs["input_ids"]).logits[:, -1]
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    empty = torch.empty(2, 2, 0, 8)
    for index in (0, 1):
        cache.update(empty, empty, index)
    assert cache.get_seq_length() == 0
    llama(inputs["input_ids"][:, :-1], past_key_values=cache)
    for index in (0, 1):
        cache.update(empty, empty, index)
    assert cache.get_seq_length() == PROMPT - 1
    torch.testing.assert_close(llama(inputs["input_ids"][:, -1:], past_key_values=cache).logits[:, -1], expected)


def test_an_empty_prompt_starts_from_bos(llama, packed):
    assert torch.equal(generate(llama, {}, **packed), generate(llama, {}))


def test_a_model_with_its_own_attention_refuses_the_name():
    model = build(family_named("bloom"))
    model.config._attn_implementation_internal = "turboquant"  # what from_pretrained does with the argument
    ids = torch.randint(3, 199, (1, 9))
    with pytest.raises(ValueError, match="attention in its own code.*load it without"):
        generate(model, {"input_ids": ids}, cache_implementation="turboquant")
