"""Loops in which the host runs one step ahead of the device give the same results, whatever ends them.

On a CPU, nothing runs ahead of the host, but the loop takes the same steps: the recorder says that it is asynchronous.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import utils
from transformers.generation.streamers import BaseStreamer

from tests.conftest import make_llama
from tests.support import generating
from tests.support.families import FAMILIES, build
from tests.support.generating import TILES, inputs_of, turboquant
from tests.support.graphs_by_family import watched
from turboquant_hf import TurboQuantCache
from turboquant_hf.generation import ahead, recorders

pytestmark = [
    pytest.mark.slow,  # whole generations
    pytest.mark.skipif(not hasattr(utils, "DeferredStopCheck"), reason="this transformers always waits for the device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NEW, STOP = 60, 33
KEPT = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


class Event:
    """An event of a device that has finished everything."""

    def __init__(self, **options) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(recorders.Repeat, "asynchronous", True)
        monkeypatch.setattr(torch, "Event", Event)
    return request.param


@pytest.fixture
def model(device):
    return make_llama().to(device)


@pytest.fixture
def late(monkeypatch) -> list[int]:
    """For every loop that runs ahead: how many steps were undone at its end."""
    undone = []
    original = utils.DeferredStopCheck.finish

    def finish(self):
        undone.append(original(self))
        return undone[-1]

    monkeypatch.setattr(utils.DeferredStopCheck, "finish", finish)
    return undone


def generate(model, inputs, **options):
    """Up to NEW tokens, fewer where an end token comes."""
    return generating.generate(model, inputs, new=NEW, **{"min_new_tokens": None, **options})


def end_of(model, inputs, **options) -> int:
    """A token that the first sequence says first at about step STOP, and which no sequence says in its first steps."""
    sequences = generate(model, inputs, **options)[:, inputs["input_ids"].shape[1] :]
    first = sequences[0].tolist()
    return next(token for step, token in enumerate(first) if step >= STOP - 8 and first.index(token) == step)


class Streamer(BaseStreamer):
    def __init__(self) -> None:
        self.got = []

    def put(self, value) -> None:
        self.got.append(value.clone())

    def end(self) -> None:
        self.got.append(None)


class Counting(LogitsProcessor):
    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


class AfterTwenty(StoppingCriteria):
    calls = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return torch.full((len(input_ids),), input_ids.shape[1] >= 65, device=input_ids.device)


MODES = {"greedy": {}, "sampling": {"do_sample": True}}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_an_end_token_ends_the_call_with_the_same_result(model, device, late, mode, batch):
    """Tokens, scores, and the random numbers that follow, as with DynamicCache."""
    inputs, options = inputs_of(batch, device=device), MODES[mode]
    options = {**options, "eos_token_id": end_of(model, inputs, **options), "pad_token_id": 0}
    expected = generate(model, inputs, **options, **KEPT)
    follows = torch.rand(4, device=device)
    assert not late
    with watched(device) as watch:
        got = generate(model, inputs, **options, **KEPT, **turboquant())
    assert torch.equal(torch.rand(4, device=device), follows)
    assert len(late) == 1 and watch.replays >= STOP - 12 and not watch.reasons
    if batch == 1:
        assert late == [1] and got.sequences.shape[1] < inputs["input_ids"].shape[1] + NEW
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("logits", "scores"):
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["given", "returned"])
def test_a_cache_that_outlives_the_call_holds_what_it_would_hold(model, device, late, where):
    inputs = inputs_of(1, device=device)
    options = {"eos_token_id": end_of(model, inputs), "pad_token_id": 0}
    first = generate(model, inputs, **options)
    with watched(device):
        if where == "given":
            model.set_attn_implementation("turboquant")
            cache = TurboQuantCache(model.config, "lossless", **TILES)
            assert torch.equal(generate(model, inputs, past_key_values=cache, **options), first)
        else:
            got = generate(model, inputs, return_dict_in_generate=True, **options, **turboquant())
            cache = got.past_key_values
    assert late == [1] and cache.tokens == first.shape[1] - 1
    assert cache.excess_steps is None
    more = torch.cat([first, inputs["input_ids"][:, :20]], dim=1)
    second = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    expected = generate(model, second)
    assert torch.equal(generate(model, second, past_key_values=cache), expected)


def test_a_call_that_ends_by_its_length_takes_no_step_too_many(model, device, late):
    """Code of the user's own sees every step once, also over sliding windows, which could not take a step back."""
    family = next(f for f in FAMILIES if f.name == "gemma3")
    for each, inputs in ((model, inputs_of(device=device)), (build(family).to(device), inputs_of(1, device=device))):
        processor = Counting()
        options = {"logits_processor": LogitsProcessorList([processor]), "eos_token_id": None}
        expected = generate(each, inputs, **options)
        processor.calls = 0
        with watched(device) as watch:
            got = generate(each, inputs, return_dict_in_generate=True, **options, **turboquant())
        assert torch.equal(got.sequences, expected)
        assert processor.calls == NEW and watch.replays > NEW // 2
    assert late == [0, 0]


@pytest.mark.parametrize("whose", ["processor", "criterion", "streamer"])
def test_code_of_the_users_own_sees_no_step_too_many(model, device, late, whose):
    inputs = inputs_of(1, device=device)
    options = {"eos_token_id": end_of(model, inputs), "pad_token_id": 0}
    own = {"processor": Counting(), "criterion": AfterTwenty(), "streamer": Streamer()}[whose]
    if whose == "processor":
        options["logits_processor"] = LogitsProcessorList([own])
    elif whose == "criterion":
        options["stopping_criteria"] = StoppingCriteriaList([own])
    else:
        options["streamer"] = own
    expected = generate(model, inputs, **options)
    seen = own.calls if whose != "streamer" else len(own.got)
    with watched(device) as watch:
        assert torch.equal(generate(model, inputs, **options, **turboquant()), expected)
    assert watch.replays and not late
    assert seen > 10 and (own.calls if whose != "streamer" else len(own.got)) == 2 * seen


def test_a_streamer_of_transformers_gets_every_token_once(model, device, late, monkeypatch):
    monkeypatch.setattr(Streamer, "__module__", "transformers.generation.streamers")
    inputs = inputs_of(1, device=device)
    options = {"eos_token_id": end_of(model, inputs), "pad_token_id": 0}
    plain, ours = Streamer(), Streamer()
    generate(model, inputs, streamer=plain, **options)
    with watched(device):
        generate(model, inputs, streamer=ours, **options, **turboquant())
    assert late == [1] and plain.got[-1] is ours.got[-1] is None
    assert torch.equal(
        torch.cat([x.flatten() for x in ours.got[:-1]]), torch.cat([x.flatten() for x in plain.got[:-1]])
    )


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "prompt-lookup"])
def test_loops_without_such_a_check_wait_as_before(model, device, late, options):
    inputs = inputs_of(1, device=device)
    inputs["input_ids"][:, 20:40] = inputs["input_ids"][:, :20]
    options = {**options, "eos_token_id": 198, "pad_token_id": 0}
    expected = generate(model, inputs, **options)
    with watched(device) as watch:
        assert torch.equal(generate(model, inputs, **options, **turboquant()), expected)
    assert watch.replays and not late


def test_another_cache_keeps_transformers_own_rule(model, device, late):
    generate(model, inputs_of(device=device), eos_token_id=5, pad_token_id=0)
    ahead.register_ahead()
    assert not late
