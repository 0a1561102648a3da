"""Options of the attention are honoured, refused, or left to the model's own attention."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.support.attentions import EAGER, PACKED, attention_of, check_same, eager_model, generate
from tests.support.families import build, family_named
from tests.support.generating import TILES
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache
from turboquant_hf.attention import dense, forward, packed

CACHES = {
    "plain": lambda config: DynamicCache(config=config),
    "growing": lambda config: TurboQuantCache(config, "lossless", **TILES),
    "static": lambda config: TurboQuantStaticCache(config, 80, "lossless", **TILES),
}
KINDS = {
    "growing": TurboQuantCache,
    "static": lambda config, preset, **options: TurboQuantStaticCache(config, 80, preset, **options),
}


@pytest.fixture(params=EAGER)
def model(request):
    return eager_model(request.param)


@pytest.fixture
def ids():
    return torch.randint(3, 198, (1, 41), generator=torch.Generator().manual_seed(0))


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
    model = build(family_named(kind))
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
