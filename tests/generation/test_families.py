"""Every family: the tokens and logits of DynamicCache with `lossless`, sane ones with the default preset."""

from __future__ import annotations

import pytest
import torch

from tests.generation.families import FAMILIES, Family, available, build, own_attention, prompt
from turboquant_hf import TurboQuantCache
from turboquant_hf.cache import TurboQuantLayer

TILES = {"tile": 8, "recent_window": 8, "sinks": 4, "min_statistics": 16}
NEW = 28


def generate(model, inputs, new=NEW, **options):
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, **options)


def attention_of(model) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def with_softcap(model, inputs):
    """What DynamicCache gives under eager attention, where the model's SDPA drops its soft-cap (early versions)."""
    if getattr(model.config, "attn_logit_softcapping", None) is None or attention_of(model) != "sdpa":
        return None
    model.set_attn_implementation("eager")
    expected = generate(model, inputs)
    model.set_attn_implementation("sdpa")
    return expected


@pytest.fixture
def packed_counts(monkeypatch):
    """Tiles appended by every packed layer that a test touches: proof that packed tiles were read."""
    counts: dict[int, int] = {}
    commit = TurboQuantLayer.commit

    def counting(self):
        commit(self)
        if self.is_initialized:
            counts[id(self)] = self.tiles[0].count

    monkeypatch.setattr(TurboQuantLayer, "commit", counting)
    return counts


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    if not available(request.param):
        pytest.skip(f"this transformers has no {request.param.kind}")
    return request.param


def test_lossless_equals_dynamic_cache(family, packed_counts):
    model = build(family)
    own = attention_of(model)
    for length in (5, 41):
        inputs = prompt(family, length=length)
        expected = {"keep": generate(model, inputs)}
        expected["auto"] = with_softcap(model, inputs) or expected["keep"]
        for attention in ("keep", "auto"):
            packed_counts.clear()
            got = generate(
                model,
                inputs,
                cache_implementation="turboquant",
                cache_config={"preset": "lossless", "attention": attention, **TILES},
            )
            assert torch.equal(got.sequences, expected[attention].sequences), attention
            for step, (a, b) in enumerate(zip(got.logits, expected[attention].logits, strict=True)):
                torch.testing.assert_close(a, b, msg=f"{attention}, step {step}")
            assert len(packed_counts) == (family.packed or 0)
            assert all(count >= 2 for count in packed_counts.values())
            switched = attention == "auto" and family.packed and not own_attention(model)
            assert attention_of(model) == ("turboquant" if switched else own)
        if attention_of(model) != own:
            model.set_attn_implementation(own)


DECODERS = [family for family in FAMILIES if family.packed and family.auto == "AutoModelForCausalLM"]


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_quantized_history_is_near_and_a_shuffled_one_is_not(family):
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    model = build(family)
    inputs = prompt(family, length=73)
    teacher = generate(model, inputs, new=8).sequences
    if not own_attention(model):
        model.set_attn_implementation("turboquant")

    def run(preset, spoil=False):
        cache = TurboQuantCache(model.config, preset, **TILES)
        model(**inputs, past_key_values=cache, use_cache=True)
        if spoil:
            for layer in cache.packed_layers:
                for store in layer.tiles:
                    for x in store.view().values():
                        x.copy_(x.flip(2).roll((1, 1), dims=(0, 1)).clone())
                layer.sinks.map(lambda x: x.roll(1, dims=0))
        # The continuation alone is scored: it reads packed tiles.
        mask, out = inputs["attention_mask"], []
        for step in range(inputs["input_ids"].shape[1], teacher.shape[1]):
            mask = torch.cat([mask, mask[:, :1]], dim=1)
            token = teacher[:, step : step + 1]
            out.append(model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1])
        return torch.stack(out, dim=1).float().log_softmax(-1)

    def divergence(a, b):
        return (a.exp() * (a - b)).sum(-1).mean().item()

    reference = run("lossless")
    near, nearer, far = run("k4v4"), run("k8v4"), run("lossless", spoil=True)
    assert near.isfinite().all()
    assert divergence(reference, far) > 1e-3, "the history matters to this model"
    # Random experts behind a sharp softmax answer to small errors: 4-bit keys are near, 8-bit ones must be very near.
    assert divergence(reference, near) < 0.5 * divergence(reference, far)
    assert divergence(reference, nearer) < 0.05 * divergence(reference, far)
