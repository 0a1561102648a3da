"""Whole generations by the packed path, with the kernels' plain definition, against decoded tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.families import build, family_named, prompt
from tests.support.generating import LOGITS, TILES, assert_same, generate, inputs_of, turboquant
from turboquant_hf import TurboQuantCache
from turboquant_hf.attention import packed
from turboquant_hf.kernels.decode import reference


@pytest.fixture
def calls(monkeypatch):
    """`calls.on()` turns packed attention on, and records (queries, tiles, masked) of every call."""
    applies = packed._applies
    monkeypatch.setattr(packed, "_applies", lambda *arguments: False)

    class Calls(list):
        def on(self):
            monkeypatch.setattr(packed, "_applies", applies)
            monkeypatch.setattr(packed, "backend", lambda device=None: "triton")
            monkeypatch.setattr(packed, "decode_attention", count)

    def count(query, history, scoring, *, mask):
        seen.append((query.shape[2], history.keys.codes.shape[2], mask is not None))
        return reference.decode_attention(query, history, scoring, mask=mask)

    seen = Calls()
    return seen


@pytest.mark.parametrize("preset", ["k4v4", "k3v3", "k8v4", "paper-mse-4"])
@pytest.mark.parametrize("padding", [0, 3, 19])
def test_greedy(llama, calls, preset, padding):
    inputs = inputs_of(padding=padding)
    expected = generate(llama, inputs, **LOGITS, **turboquant(preset))
    assert not calls
    calls.on()
    assert_same(generate(llama, inputs, **LOGITS, **turboquant(preset)), expected)
    assert len(calls) == 2 * 23, "every step after the prompt, in both layers"
    assert all(queries == 1 and tiles >= 4 for queries, tiles, _ in calls)
    assert max(tiles for _, tiles, _ in calls) > 5 and (not padding or all(masked for *_, masked in calls))


@pytest.mark.parametrize("padding", [0, 19])
def test_beams(llama, calls, padding):
    inputs = inputs_of(padding=padding)
    expected = generate(llama, inputs, num_beams=3, **LOGITS, **turboquant("k4v4"))
    calls.on()
    got = generate(llama, inputs, num_beams=3, **LOGITS, **turboquant("k4v4"))
    assert torch.equal(got.sequences, expected.sequences) and len(calls) == 2 * 23


@pytest.mark.parametrize(("padding", "hole"), [(0, False), (19, False), (19, True)])
@torch.no_grad()
def test_a_block_of_queries(llama, calls, padding, hole):
    """With several queries, the kernels apply the causal order, and a hidden token that is not left padding."""
    llama.set_attn_implementation("turboquant")
    inputs = inputs_of(padding=padding, length=58)
    if hole:
        inputs["attention_mask"][:, 24:31] = 0

    def run():
        cache, out = TurboQuantCache(llama.config, "k4v4", **TILES), []
        for start, stop in ((0, 45), (45, 48), (48, 58)):
            mask = inputs["attention_mask"][:, :stop] if padding else None
            ids = inputs["input_ids"][:, start:stop]
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)[:, start:stop]
            out.append(llama(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
        return torch.cat(out[1:], dim=1)

    expected = run()
    calls.on()
    torch.testing.assert_close(run(), expected, atol=2e-4, rtol=2e-4)
    assert [queries for queries, *_ in calls] == [3, 3, 10, 10]


def test_assisted_decoding(llama, small_llama, calls):
    helper = small_llama(seed=1)
    for model in (llama, helper):
        model.generation_config.eos_token_id = 198
        model.generation_config.suppress_tokens = [198]
    inputs = inputs_of(batch=1)
    expected = generate(llama, inputs, assistant_model=helper, **LOGITS, **turboquant("k4v4"))
    calls.on()
    assert_same(generate(llama, inputs, assistant_model=helper, **LOGITS, **turboquant("k4v4")), expected)
    assert any(queries > 1 for queries, *_ in calls)


@pytest.mark.parametrize("padding", [0, 19])
@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_softcaps_and_attention_sinks(kind, calls, padding, monkeypatch):
    family = family_named(kind)
    model = build(family)
    model.set_attn_implementation("turboquant")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # as strong as the strongest keys
                parameter.fill_(8.0)
    inputs = prompt(family, seed=2)  # with seeds 0 and 1 a code of gpt_oss lies on a threshold
    if padding:
        inputs["attention_mask"][1, :padding] = 0
    expected = generate(model, inputs, **LOGITS, **turboquant("k4v4"))
    calls.on()
    assert_same(generate(model, inputs, **LOGITS, **turboquant("k4v4")), expected)
    assert len(calls) == 2 * 23, "the full layers"
    option = {"gemma2": "softcap", "gpt_oss": "s_aux"}[kind]
    counted = packed.decode_attention

    def without(query, history, scoring, **given):
        return counted(query, history, replace(scoring, **{option: None}), **given)

    monkeypatch.setattr(packed, "decode_attention", without)
    spoiled = generate(model, inputs, **LOGITS, **turboquant("k4v4"))
    near = [torch.allclose(a, b, atol=1e-2) for a, b in zip(spoiled.logits, expected.logits, strict=True)]
    assert not all(near), option


@pytest.mark.parametrize("preset", ["lossless", "int8", "paper-prod-3", "k4v16"])
def test_what_kernels_do_not_read_is_decoded(llama, calls, preset):
    inputs = inputs_of()
    expected = generate(llama, inputs, **LOGITS, **turboquant(preset))
    calls.on()
    assert_same(generate(llama, inputs, **LOGITS, **turboquant(preset)), expected)
    assert not calls
