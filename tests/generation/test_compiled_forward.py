"""`torch.compile(model.forward)` on a `TurboQuantStaticCache` of the user's own, fresh or allocated before."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from turboquant_hf import TurboQuantStaticCache
from turboquant_hf.cache import traced

pytestmark = pytest.mark.slow  # compilers
PROMPT, ANSWER = 40, 24
PRESETS = {
    "lossless": {"tile": 8, "recent_window": 8, "min_statistics": 16},
    "k4v4": {"tile": 32, "recent_window": 0, "min_statistics": 32},
}


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(small_llama):
    model = small_llama(head_dim=32)
    model.set_attn_implementation("turboquant")
    return model


def fresh(model, preset="k4v4"):
    return TurboQuantStaticCache(model.config, max_cache_len=PROMPT + ANSWER, preset=preset, **PRESETS[preset])


def allocated(model, preset="k4v4"):
    cache = fresh(model, preset)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=32, dtype=torch.float32, device="cpu")
    return cache


@torch.no_grad()
def greedy(forward, cache):
    """(tokens [2, ANSWER], their logits) of a prefill and steps that all go through `forward`."""
    tokens = torch.randint(3, 199, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    answer, logits = [], []
    for _ in range(ANSWER):
        logits.append(forward(input_ids=tokens, past_key_values=cache).logits[:, -1])
        tokens = logits[-1].argmax(-1, keepdim=True)
        answer.append(tokens)
    return torch.cat(answer, dim=1), torch.stack(logits, dim=1)


def assert_same(result, expected):
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["turboquant", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_cache_works_without_fullgraph(model, preset, attention):
    model.set_attn_implementation(attention)
    expected = greedy(model, fresh(model, preset))
    compiled = torch.compile(model.forward, backend="aot_eager")
    for _ in range(2):  # the second cache has the same size
        cache = fresh(model, preset)
        assert_same(greedy(compiled, cache), expected)
        assert all(layer.is_initialized for layer in cache.packed_layers)
    assert counters["stats"]["unique_graphs"] > 0
    if attention == "turboquant":
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("make", [fresh, allocated])
def test_any_cache_gives_whole_graphs(model, make, preset):
    expected = greedy(model, fresh(model, preset))
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(greedy(compiled, make(model, preset)), expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2, "the prefill's and the step's"


def test_early_initialization_may_itself_be_compiled(model):
    @torch.compile(backend="aot_eager")
    def start(cache, x):
        cache.early_initialization(batch_size=2, num_heads=2, head_dim=32, dtype=torch.float32, device="cpu")
        return x + 1

    cache = fresh(model)
    start(cache, torch.zeros(1))
    assert_same(greedy(model, cache), greedy(model, fresh(model)))


def test_what_is_stored_outlives_the_tensors_of_compiled_code(model):
    """Compiled code reuses its memory as soon as the operator is done. A long block must have been copied by then."""
    layer = TurboQuantStaticCache(model.config, max_cache_len=1024).layers[0]
    given = torch.randn(2, 2, 2, 900, 32)
    new = given.clone()
    traced.append(*new, layer.number)
    new.zero_()
    assert torch.equal(layer.keys[:, :, :900], given[0]) and torch.equal(layer.values[:, :, :900], given[1])
