"""Decode steps over fixed arrays give DynamicCache's tokens in every mode, and after changes between steps.

On a CPU a "recorded" step is called again at every replay (`recorders.Repeat`): everything but the CUDA graph itself is
what a GPU runs. The same tests run with real graphs where there is a GPU.
"""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.conftest import make_llama
from tests.support import generating
from tests.support.families import FAMILIES, available
from tests.support.generating import LOGITS, TILES, Dictated, inputs_of, turboquant
from tests.support.graphs_by_family import examine, watched
from turboquant_hf import TurboQuantCache

pytestmark = pytest.mark.slow  # whole generations, one per family or mode
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NEW = 60
generate = partial(generating.generate, new=NEW)
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam-sampling": {"num_beams": 3, "do_sample": True},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def model(device):
    return make_llama().to(device)


@pytest.mark.parametrize("padding", [0, 19])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_replays_dynamic_caches_tokens(model, device, mode, padding):
    options = MODES[mode]
    batch = 1 if mode == "prompt-lookup" else 2
    inputs = inputs_of(batch, padding=padding, device=device)
    if mode == "prompt-lookup":
        inputs["input_ids"][:, 20:40] = inputs["input_ids"][:, :20]
        model.generation_config.eos_token_id = 198  # early versions compare candidates with an end
        options = {**options, "suppress_tokens": [198]}
    expected = generate(model, inputs, **options)
    with watched(device) as watch:
        got = generate(model, inputs, **options, **turboquant())
    assert torch.equal(got, expected)
    assert watch.replays >= NEW // 4 and not watch.reasons


@pytest.mark.parametrize("padding", [0, 19])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_preallocated_cache_is_replayed_too(model, device, mode, padding):
    inputs = inputs_of(padding=padding, device=device)
    expected = generate(model, inputs, **MODES[mode])
    with watched(device) as watch:
        got = generate(model, inputs, **MODES[mode], **turboquant(static=True))
    assert torch.equal(got, expected)
    assert watch.replays >= NEW // 2 and not watch.reasons


@pytest.mark.parametrize("length", [3, 17, 45])
def test_short_prompts_reach_the_first_encode_inside_the_loop(model, device, length):
    inputs = inputs_of(length=length, device=device)
    expected = generate(model, inputs)
    with watched(device) as watch:
        assert torch.equal(generate(model, inputs, **turboquant()), expected)
    assert watch.replays > NEW // 2 and watch.recordings <= 4


@pytest.mark.parametrize("preset", ["k4v4", "k3v2", "paper-mse-4", "int8"])
def test_presets_give_the_same_tokens_with_and_without_recorded_steps(device, preset):
    """The tokens are dictated, because rounding may choose between two equally likely tokens."""
    model = make_llama(head_dim=32).to(device)
    tokens = torch.randint(3, 199, (2, 45 + NEW), generator=torch.Generator().manual_seed(1)).to(device)
    inputs = {**inputs_of(padding=7, device=device), "input_ids": tokens[:, :45]}
    options = {"logits_processor": LogitsProcessorList([Dictated(tokens)]), **LOGITS}
    expected = generate(model, inputs, **turboquant(preset, graph=False), **options)
    with watched(device) as watch:
        got = generate(model, inputs, **turboquant(preset), **options)
    assert watch.replays > NEW // 2
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_means_beyond_float16_are_read_again_at_every_step(device):
    """Such means are combined with an offset when they are read, and new tiles come between two steps."""
    model = make_llama(head_dim=32, attention_bias=True).to(device)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[31::32] += 2e5  # the channel that turns the least with the position
    tokens = torch.randint(3, 199, (1, 45 + NEW), generator=torch.Generator().manual_seed(1)).to(device)
    inputs = {"input_ids": tokens[:, :45], "attention_mask": torch.ones_like(tokens[:, :45])}
    options = {"logits_processor": LogitsProcessorList([Dictated(tokens)]), **LOGITS}
    expected = generate(model, inputs, **turboquant("k4v4", graph=False), **options)
    with watched(device) as watch:
        got = generate(model, inputs, **turboquant("k4v4"), **options)
    assert watch.replays > NEW // 2
    for a, b in zip(got.logits, expected.logits, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def test_turns_copies_and_files_follow_a_loop(model, device, tmp_path):
    """After a loop the cache is an ordinary one: a further turn, a copy and a saved file go on from it."""
    inputs = inputs_of(device=device)
    cache = TurboQuantCache(model.config, "lossless", **TILES)
    model.set_attn_implementation("turboquant")
    with watched(device) as watch:
        first = generate(model, inputs, past_key_values=cache)
    assert watch.replays > NEW // 2
    copied = copy.deepcopy(cache)
    cache.save(tmp_path / "cache")
    loaded = TurboQuantCache.load(tmp_path / "cache", model.config, device=device)
    more = torch.cat([first, inputs["input_ids"][:, :20]], dim=1)
    second = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    expected = generate(model, second)
    for each in (cache, copied, loaded):
        assert torch.equal(generate(model, second, past_key_values=each), expected)


class Meddling(LogitsProcessor):
    """Changes the cache between two steps."""

    def __init__(self, cache, act, every: int) -> None:
        self.cache, self.act, self.every, self.calls = cache, act, every, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % self.every == 0:
            self.act(self.cache)
        return scores


@pytest.mark.parametrize(
    "act",
    [
        lambda cache: cache.layers[0].keys.sum(),
        lambda cache: cache.nbytes,
        copy.deepcopy,
        lambda cache: cache.reorder_cache(torch.arange(2)),
        lambda cache: cache.batch_select_indices(torch.arange(2)),
        lambda cache: cache.batch_repeat_interleave(1),
        lambda cache: [layer.offload() or layer.prefetch() for layer in cache.layers],
    ],
    ids=["read", "count", "copy", "reorder", "select", "repeat", "offload"],
)
def test_what_happens_to_a_cache_between_steps_is_seen_by_the_next(model, device, act):
    inputs = inputs_of(device=device)
    expected = generate(model, inputs)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache(model.config, "lossless", **TILES)
    meddling = LogitsProcessorList([Meddling(cache, act, every=9)])
    with watched(device) as watch:
        assert torch.equal(generate(model, inputs, past_key_values=cache, logits_processor=meddling), expected)
    assert watch.replays > NEW // 3


def test_logits_that_a_user_keeps_are_not_overwritten(model, device):
    inputs = inputs_of(device=device)
    options = {**LOGITS, "output_scores": True}
    expected, got = generate(model, inputs, **options), generate(model, inputs, **options, **turboquant())
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_what_a_graph_cannot_return_is_returned_by_ordinary_steps(model, device, option):
    inputs = inputs_of(device=device)
    options = {option: True, "return_dict_in_generate": True}
    if option == "output_attentions":
        model.set_attn_implementation("eager")
    expected = generate(model, inputs, **options)
    with watched(device) as watch:
        got = generate(model, inputs, **options, **turboquant())
    assert watch.replays == 0
    name = option.removeprefix("output_")
    if option == "output_hidden_states":
        assert [len(x) for x in got[name]] == [len(x) for x in expected[name]]


MOMENTS = [("cpu", 1), *(pytest.param("cuda", step, marks=pytest.mark.gpu) for step in (1, 2))]


@pytest.mark.parametrize(("device", "step"), MOMENTS, ids=["cpu-first", "gpu-first", "gpu-recorded"])
def test_a_step_that_cannot_be_recorded_runs_once_and_says_why(model, device, step, monkeypatch):
    """The failed step is neither lost nor run twice; random numbers go on as if nothing had been tried."""
    inputs = inputs_of(device=device)
    expected = generate(model, inputs, do_sample=True)
    inner, calls = model.model.forward, []

    def asks_the_device(*args, **kwargs):
        output = inner(*args, **kwargs)
        if output.last_hidden_state.shape[1] == 1:
            calls.append(1)
            if len(calls) == step:
                if step > 1:
                    torch.cuda.synchronize()  # forbidden in a recording, and not visible as an operation of torch
                raise RuntimeError("asks the device")
        return output

    monkeypatch.setattr(model.model, "forward", asks_the_device)
    with watched(device) as watch:
        got = generate(model, inputs, do_sample=True, **turboquant())
    assert torch.equal(got, expected)
    assert len(watch.reasons) == 1 and watch.replays == 0
    torch.rand(3, device=device)


def test_graph_false_and_a_compile_config_leave_steps_alone(model, device):
    inputs = inputs_of(device=device)
    with watched(device) as watch:
        generate(model, inputs, **turboquant(graph=False))
    assert watch.replays == 0 and not watch.reasons
    with pytest.raises(ValueError, match="graph=1 is not supported; allowed: true, false"):
        generate(model, inputs, **turboquant(graph=1))


def test_a_users_own_hooks_are_still_called(model, device):
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with watched(device) as watch:
        generate(model, inputs_of(device=device), **turboquant())
    handle.remove()
    assert len(calls) == NEW and "hooks" in watch.reasons[0]


def test_a_cache_and_its_graphs_are_freed(model, device):
    cache = TurboQuantCache(model.config, "lossless", **TILES)
    model.set_attn_implementation("turboquant")
    generate(model, inputs_of(device=device), past_key_values=cache)
    assert "forward" not in vars(model) and cache.graph_nbytes == 0
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_addresses_that_keep_changing_end_recording(model, device, monkeypatch):
    cache = TurboQuantCache(model.config, "lossless", **TILES)
    model.set_attn_implementation("turboquant")
    inputs = inputs_of(device=device)
    expected = generate(model, inputs)
    moving = LogitsProcessorList([Meddling(cache, lambda cache: cache.batch_repeat_interleave(1), every=1)])
    with watched(device) as watch:
        assert torch.equal(generate(model, inputs, past_key_values=cache, logits_processor=moving), expected)
    assert watch.recordings <= 6 and "keep changing" in watch.reasons[0]


@pytest.mark.gpu
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.packed and not f.refused], ids=lambda f: f.name)
def test_families_on_a_gpu(family):
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    row = examine(family, "cuda")
    assert row.same_tokens and row.error < 1e-2
    assert row.replayed or row.reason or family.auto != "AutoModelForCausalLM"
