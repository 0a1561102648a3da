"""Answers through a cache equal those of one pass without a cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from turboquant_hf import TurboQuantCache
from turboquant_hf.evaluation.harness import decoding
from turboquant_hf.evaluation.presets.named import resolve_caches


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="turboquant").eval()


def test_decode_greedy_and_answer_nll_equal_one_pass_without_a_cache(tiny):
    tokens = torch.randint(0, 250, (2, 300), generator=torch.Generator().manual_seed(0))
    cache = decoding.new_cache(tiny, None)
    logits = decoding.prefill(tiny, tokens, cache, chunk=128)
    answers = [[5, 6, 7], [8, 9]]
    nll = decoding.answer_nll(tiny, logits, cache, answers)
    decoded = decoding.decode_greedy(tiny, logits, cache, steps=5)
    with torch.inference_mode():
        for row in range(2):
            log = tiny(torch.cat([tokens[row], torch.tensor(answers[row])])[None]).logits[0, 299:-1].log_softmax(-1)
            expected = -log[torch.arange(len(answers[row])), answers[row]].mean().item()
            assert nll[row] == pytest.approx(expected, rel=1e-4)
            greedy = tiny.generate(tokens[row : row + 1], max_new_tokens=5, do_sample=False, eos_token_id=None)[0, 300:]
            assert decoded[row] == greedy.tolist()


def test_answer_nll_leaves_the_cache_as_it_is(tiny):
    cache = TurboQuantCache(tiny.config, "k4v4", recent_window=0, encode_first=True)
    tokens = torch.randint(0, 250, (1, 380), generator=torch.Generator().manual_seed(0))
    logits = decoding.prefill(tiny, tokens, cache)
    before = cache.layers[0].keys.clone()
    decoding.answer_nll(tiny, logits, cache, [list(range(20))])
    assert torch.equal(cache.layers[0].keys, before)


def test_decode_greedy_ends_before_a_stop_token(tiny):
    tokens = torch.randint(0, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    whole = decoding.decode_greedy(tiny, *_prefilled(tiny, tokens), steps=8)[0]
    stop = whole[3]
    assert (
        decoding.decode_greedy(tiny, *_prefilled(tiny, tokens), steps=8, stop={stop})[0] == whole[: whole.index(stop)]
    )


def test_decode_greedy_ends_when_there_is_enough(tiny):
    tokens = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = decoding.decode_greedy(tiny, *_prefilled(tiny, tokens), steps=8)
    some = decoding.decode_greedy(tiny, *_prefilled(tiny, tokens), steps=8, enough=lambda s: min(map(len, s)) >= 3)
    assert some == [tokens[:3] for tokens in whole]


def _prefilled(model, tokens):
    cache = decoding.new_cache(model, None)
    return decoding.prefill(model, tokens, cache), cache


def test_recent_window_0_leaves_nothing_of_the_prompt_raw(tiny):
    caches = resolve_caches(["k4v4", "uncompressed"], recent_window=0)
    assert list(caches) == ["uncompressed", "k4v4"] and caches["k4v4"].encode_first
    cache = decoding.new_cache(tiny, caches["k4v4"])
    decoding.prefill(tiny, torch.randint(0, 250, (1, 512)), cache)
    assert all(layer.tail.count == 0 for layer in cache.packed_layers)
    assert not resolve_caches(["k4v4"], recent_window=None)["k4v4"].encode_first
