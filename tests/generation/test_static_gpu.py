"""The preallocated cache on a GPU: code compiled by generate or by hand gives the logits of eager steps."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LogitsProcessorList

from tests.conftest import make_llama
from tests.support.generating import LOGITS, Dictated, generate
from turboquant_hf import TurboQuantStaticCache
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.config import load_preset

pytestmark = pytest.mark.gpu
NEW = 200


@pytest.fixture
def model():
    torch._dynamo.reset()
    counters.clear()
    # Weights this small keep rounding to half precision below a hundredth of the logits, while 16 other tokens of 300
    # still change them by a quarter.
    yield make_llama(head_dim=64, hidden_size=256, initializer_range=0.07).to("cuda", torch.float16)
    torch._dynamo.reset()


@pytest.mark.parametrize(("preset", "length"), [("k4v4", 100), ("k3v3", 400), ("lossless", 100)])
def test_compiled_generation_equals_the_eager_dynamic_cache(model, preset, length):
    """From below the first encode across it, and over several tiles behind it. Tokens are given, so that a step where
    two are as likely does not end the comparison.
    """
    tokens = torch.randint(3, 199, (2, length + NEW), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    ids = tokens[:, :length]
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}

    def run(static=False, graph=False, **options):
        config = {"preset": preset, "min_statistics": 256, "graph": graph}
        options |= {"cache_implementation": "turboquant_static" if static else "turboquant", "cache_config": config}
        processor = LogitsProcessorList([Dictated(tokens)])
        return generate(model, inputs, new=NEW, logits_processor=processor, **LOGITS, **options)

    expected, eager = run(), run(static=True, disable_compile=True)
    compiled = run(static=True)
    assert counters["stats"]["unique_graphs"] > 0, "transformers compiles by itself"
    graphs = counters["stats"]["unique_graphs"]
    again, recorded = run(static=True), run(static=True, graph=True)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    for result in (eager, compiled, again, recorded):
        assert torch.equal(result.sequences, tokens) and len(result.logits) == NEW
        for a, b in zip(result.logits, expected.logits, strict=True):
            assert (a - b).norm() < 5e-2 * b.norm()


def test_reduce_overhead_compiles_once(model):
    model.set_attn_implementation("turboquant")
    ids = torch.randint(3, 199, (1, 700), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    results = []
    for forward in (model.forward, compiled, compiled):
        cache = TurboQuantStaticCache(model.config, 800, "k4v4")
        logits = []
        with torch.no_grad():
            model(input_ids=ids[:, :400], past_key_values=cache)
            for n in range(400, 690):
                torch.compiler.cudagraph_mark_step_begin()
                logits.append(forward(input_ids=ids[:, n : n + 1], past_key_values=cache).logits.clone())
        results.append(torch.cat(logits, 1).float())
        layer = cache.packed_layers[0]
        assert [layer.tiles[0].count, layer.get_seq_length()] == [(690 - 128) // 128, 690]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for result in results[1:]:
        assert (result - results[0]).norm() < 5e-2 * results[0].norm()


def test_a_users_own_recording_is_refused():
    preset = load_preset("k4v4")
    layer = TurboQuantStaticLayer(preset, *preset.layer_quantizers(0, 1), 300)
    new = torch.randn(1, 2, 290, 64, device="cuda").half()
    layer.update(new, new)
    with pytest.raises(RuntimeError, match="counts its tokens on the host"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer.update(new[:, :, :1], new[:, :, :1])


def test_a_full_cache_raises_an_error():
    preset = load_preset("k4v4")
    layer = TurboQuantStaticLayer(preset, *preset.layer_quantizers(0, 1), 300)
    new = torch.randn(1, 2, 290, 64, device="cuda").half()
    layer.update(new, new)
    layer.update(new[:, :, :10], new[:, :, :10])
    with pytest.raises(ValueError, match="max_cache_len=300 is not enough: 300 tokens are held and 1 more came"):
        layer.update(new[:, :, :1], new[:, :, :1])
