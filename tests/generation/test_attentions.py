"""Options of the attention are honoured, refused, or left to the model's own attention; and restore_attention."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.support import generating
from tests.support.families import FAMILIES, build
from tests.support.generating import TILES, turboquant
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, restore_attention
from turboquant_hf.attention import dense, forward, packed

PACKED = turboquant()
generate = partial(generating.generate, new=9, return_dict_in_generate=True)
EAGER = ["gpt_oss", "gemma2"]
CACHES = {
    "plain": lambda config: DynamicCache(config=config),
    "growing": lambda config: TurboQuantCache(config, "lossless", **TILES),
    "static": lambda config: TurboQuantStaticCache(config, 80, "lossless", **TILES),
}
KINDS = {
    "growing": TurboQuantCache,
    "static": lambda config, preset, **options: TurboQuantStaticCache(config, 80, preset, **options),
}


def family(kind):
    return next(family for family in FAMILIES if family.name == kind)


@pytest.fixture(params=EAGER)
def model(request):
    """A model whose default attention is "eager", which returns attentions."""
    model = build(family(request.param))
    if attention_of(model) != "eager":
        pytest.skip("with this transformers the model starts with SDPA")
    model.generation_config.eos_token_id = 198  # one that prompt lookup can compare with
    model.generation_config.suppress_tokens = [198]
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 198, (1, 41), generator=torch.Generator().manual_seed(0))


def attention_of(model) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def check_same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.attentions) == len(expected.attentions)
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


WAYS = {
    "argument": lambda model: {"output_attentions": True},
    "model": lambda model: setattr(model.generation_config, "output_attentions", True) or {},
    "config": lambda model: setattr(model.config, "output_attentions", True) or {"output_attentions": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}], ids=["", "lookup", "beams"]
)
def test_attentions_of_generate(model, ids, options, way):
    wanted = {**WAYS[way](model), **options}
    expected = generate(model, ids, **wanted)
    check_same(generate(model, ids, **PACKED, **wanted), expected)
    assert attention_of(model) == "eager"


def test_attentions_behind_an_earlier_switch(model, ids):
    """A call that asks for attentions runs with the model's own attention. The next call is switched again."""
    expected = generate(model, ids, output_attentions=True)
    for options in (PACKED, {}, {"past_key_values": TurboQuantCache(model.config, "lossless", **TILES)}):
        generate(model, ids, **PACKED)
        assert attention_of(model) == "turboquant"
        check_same(generate(model, ids, output_attentions=True, **options), expected)
        assert attention_of(model) == "eager"


def test_a_configuration_that_asks_is_not_switched(model, ids):
    """A switched configuration could not be saved: transformers refuses `output_attentions` with our attention."""
    model.config.output_attentions = True
    generate(model, ids, **PACKED)
    assert attention_of(model) == "eager"


@torch.no_grad()
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("kind", [*EAGER, "llama", "gpt2", "opt"])
def test_attentions_of_forward_with_our_attention(kind, make, ids):
    """Our attention, set by hand or by an earlier call, gives the weights of eager attention over the cache."""
    model = build(family(kind))
    found = {}
    for attention, cache in (("eager", DynamicCache(config=model.config)), ("turboquant", make(model.config))):
        model.set_attn_implementation(attention)
        found[attention] = [model(ids[:, :37], past_key_values=cache, output_attentions=True).attentions]
        for new in (slice(37, 40), slice(40, 41)):
            found[attention].append(model(ids[:, new], past_key_values=cache, output_attentions=True).attentions)
    for got, expected in zip(found["turboquant"], found["eager"], strict=True):
        assert len(got) == len(expected) == model.config.num_hidden_layers
        for x, y in zip(got, expected, strict=True):
            if isinstance(cache, TurboQuantStaticCache):  # sliding layers, too, have room for what is to come
                assert x.shape[:3] == y.shape[:3]
                x, y = (weights.sort(dim=-1, descending=True).values[..., :37] for weights in (x, y))
                y = torch.nn.functional.pad(y, (0, max(0, x.shape[-1] - y.shape[-1])))
                x = torch.nn.functional.pad(x, (0, max(0, y.shape[-1] - x.shape[-1])))
            torch.testing.assert_close(x, y)


@torch.no_grad()
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_attentions_over_packed_tiles(llama, ids, make):
    """This also holds for presets that kernels read."""
    llama.set_attn_implementation("turboquant")
    cache = make(llama.config, "k8v4", **TILES)
    llama(ids[:, :40], past_key_values=cache)
    got = llama(ids[:, 40:], past_key_values=cache, output_attentions=True).attentions
    expected = llama(ids, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    for x, y in zip(got, expected, strict=True):
        assert (x[..., :41] - y[:, :, 40:]).abs().mean() < 0.1 * y[:, :, 40:].mean()


def test_attentions_that_are_not_asked_for_cost_nothing(llama, ids):
    llama.set_attn_implementation("turboquant")
    assert llama(ids).attentions is None
    assert llama(ids, output_attentions=True).attentions is not None
    assert llama(ids, output_attentions=False).attentions is None


@pytest.mark.parametrize("sdpa_takes_bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"output_attentions": True}], ids=lambda x: "".join(x))
def test_a_position_bias_is_not_lost(options, sdpa_takes_bias, monkeypatch):
    """In early versions of transformers, SDPA ignores the bias."""
    if sdpa_takes_bias and not dense.SDPA_TAKES_BIAS:
        pytest.skip("this transformers' SDPA takes none")
    monkeypatch.setattr(dense, "SDPA_TAKES_BIAS", sdpa_takes_bias)
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    bias = torch.randn(1, 4, 9, 9)
    scores = query @ key.transpose(2, 3) * 8**-0.5
    scores = options["softcap"] * (scores / options["softcap"]).tanh() if "softcap" in options else scores
    weights = (scores + bias).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    got, found = forward.turboquant_attention_forward(
        torch.nn.Module(), query, key, value, None, position_bias=bias, **options
    )
    torch.testing.assert_close(got, (weights @ value).transpose(1, 2))
    assert found is None or torch.allclose(found, weights, atol=1e-6)


def test_sinks_of_each_query_are_not_lost():
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind()
    sinks = torch.randn(2, 4, 9, 1)
    scores = (query @ key.transpose(2, 3) * 8**-0.5).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    expected = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1] @ value
    got, _ = forward.turboquant_attention_forward(torch.nn.Module(), query, key, value, None, sinks=sinks)
    torch.testing.assert_close(got, expected.transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_mask_of_every_head_reaches_every_head(llama, ids, make, dtype, monkeypatch):
    """Kernels take one mask for all heads, so such a call must not reach them."""
    monkeypatch.setattr(packed, "packed_attention", lambda layer, query, mask, **_: pytest.fail("one mask for all"))
    room = 80 if make is CACHES["static"] else 42
    mask = torch.ones(1, 4, 1, 42, dtype=torch.bool)
    mask[:, 1, :, :30], mask[:, 2, :, 3:20] = False, False

    def step(cache, width):
        own = torch.nn.functional.pad(mask, (0, width - 42))
        own = own if dtype == torch.bool else torch.zeros(own.shape).masked_fill(~own, torch.finfo(dtype).min)
        llama(ids[:, :40], past_key_values=cache, output_attentions=True)
        llama(ids[:, :1], past_key_values=cache, output_attentions=True)
        return llama(ids[:, :1], attention_mask=own, past_key_values=cache).logits

    expected = step(DynamicCache(config=llama.config), 42)
    llama.set_attn_implementation("turboquant")
    torch.testing.assert_close(step(make(llama.config), room), expected)


def test_options_that_cannot_be_honoured_are_refused(llama, ids):
    llama.set_attn_implementation("turboquant")
    with pytest.raises(ValueError, match=r"head_mask=Tensor is not supported.*restore_attention\(model\)"):
        llama(ids, head_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"attention_mask: dtype=torch.int64 .* allowed: torch.bool"):
        llama(ids, attention_mask=torch.ones(1, 1, 41, 41, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_prompt_that_is_not_causal(llama, ids, make):
    expected = llama(ids, is_causal=False).logits
    assert not torch.allclose(expected, llama(ids).logits, atol=0.1)
    llama.set_attn_implementation("turboquant")
    torch.testing.assert_close(llama(ids, past_key_values=make(llama.config), is_causal=False).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_a_few_tokens_that_are_not_causal(llama, ids, make):
    expected = llama(ids[:, :9], is_causal=False).logits
    llama.set_attn_implementation("turboquant")
    torch.testing.assert_close(llama(ids[:, :9], past_key_values=make(llama.config), is_causal=False).logits, expected)


# ------------------------------------------------------------------ the way back


@pytest.fixture
def composite():
    """A model of two parts with different attentions."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=199, num_key_value_heads=2, bos_token_id=1, eos_token_id=None, **sizes),
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=32, **sizes),
        image_token_index=198,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"vision_config": "eager"})
    return model


def attentions(model) -> list[str]:
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "wrapper": lambda model: torch.nn.ModuleDict({"wrapped": model}),
}


@pytest.mark.parametrize("how", COPIES)
def test_restore_attention(composite, ids, how):
    before = attentions(composite)
    assert set(before) == {"eager", "sdpa"}
    for _ in range(2):
        generate(composite, ids, **PACKED)
        assert attention_of(composite) == "turboquant"
        model = COPIES[how](composite)
        assert restore_attention(model)
        assert attentions(model) == before
        assert not restore_attention(model)
    assert not any("turboquant" in name for name in vars(model)), "nothing is left behind"


def test_restore_attention_of_a_saved_model(model, ids, tmp_path):
    generate(model, ids, **PACKED)
    model.save_pretrained(tmp_path)
    assert "turboquant" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert not restore_attention(loaded)
    assert attention_of(loaded) == "eager"
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="turboquant")
    assert restore_attention(loaded)
    assert attention_of(loaded) == "eager", "by hand: what transformers picks by itself"


def test_a_choice_made_since_the_switch_stays(llama, ids):
    generate(llama, ids, **PACKED)
    llama.set_attn_implementation("eager")
    assert not restore_attention(llama)
    assert attention_of(llama) == "eager"
    llama.set_attn_implementation("sdpa")
    assert not restore_attention(llama)


def test_attention_set_by_hand_is_left_to_a_call_that_asks_for_attentions(llama, ids):
    llama.set_attn_implementation("eager")
    expected = generate(llama, ids, output_attentions=True)
    llama.set_attn_implementation("turboquant")
    check_same(generate(llama, ids, output_attentions=True, **PACKED), expected)
    assert attention_of(llama) == "turboquant"


def test_restore_attention_refuses_what_is_not_a_model(llama):
    with pytest.raises(ValueError, match="model=LlamaConfig is not supported; allowed: a model"):
        restore_attention(llama.config)


@torch.no_grad()
def test_restoring_behind_a_live_cache(llama, ids):
    """The cache notices at once that it must return dense tensors."""
    expected = llama(ids).logits
    llama.set_attn_implementation("turboquant")
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    llama(ids[:, :30], past_key_values=cache)
    restore_attention(llama)
    torch.testing.assert_close(llama(ids[:, 30:], past_key_values=cache).logits, expected[:, 30:])
