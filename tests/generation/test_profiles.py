"""Caches that use a profile, in `generate`: the same tokens by every way to a cache, and 8 bits that change nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests.conftest import make_llama
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache, make_profile
from turboquant_hf.cache.profiles import FILE

EIGHT = {
    "keys": {"quantizer": "conditioned", "widths": [[0.5, 8], [0.5, 8]], "codebook": "uniform"},
    "values": {"quantizer": "mse", "bits": 8, "codebook": "uniform", "scale": "norm-corrected"},
    "tile": 8, "recent_window": 8, "sinks": 4, "min_statistics": 256,
}  # fmt: skip
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "chunked": {"prefill_chunk_size": 20},
}
WAYS = {
    "growing": ("turboquant", {}),
    "without graphs": ("turboquant", {"graph": False}),
    "own attention": ("turboquant", {"attention": "keep"}),
    "offloaded": ("turboquant", {"offloading": True}),
    "preallocated": ("turboquant_static", {}),
}


def generate(model, inputs, **options):
    torch.manual_seed(0)
    defaults = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**inputs, **{**defaults, **options})


def padded(length, padding):
    ids = torch.randint(3, 199, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def windows(count=2, length=300):
    ids = torch.randint(3, 199, (count, length), generator=torch.Generator().manual_seed(7))
    return list(ids.split(1))


@pytest.fixture(scope="module")
def model():
    return make_llama(head_dim=16)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    make_profile(model, windows()).save(path)
    return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "growing"])
def test_every_way_gives_the_same_tokens(model, path, way, mode):
    inputs, results = padded(length=60, padding=11), []
    for name, options in (WAYS["growing"], WAYS[way]):
        model.set_attn_implementation("sdpa")
        config = {"preset": EIGHT, "profile": str(path), **options}
        results.append(generate(model, inputs, cache_implementation=name, cache_config=config, **MODES[mode]))
    assert torch.equal(*results)


@pytest.mark.parametrize("attention", ["turboquant", "sdpa"])
def test_eight_bits_leave_the_models_answers_alone(model, path, attention):
    model.set_attn_implementation(attention)
    tokens, logits = padded(length=90, padding=0)["input_ids"], []
    with torch.no_grad():
        for cache in (TurboQuantCache(model.config, EIGHT, profile=path), DynamicCache(config=model.config)):
            steps = [model(piece, past_key_values=cache).logits for piece in tokens.split([40, *[1] * 50], dim=1)]
            logits.append(torch.cat(steps, dim=1).log_softmax(dim=-1))
    assert cache.get_seq_length() == 90
    kl = (logits[1].exp() * (logits[1] - logits[0])).sum(dim=-1)
    assert kl.mean() < 2e-3


@pytest.mark.parametrize("preset", ["k4v4", "k2v2", "k3v3-scalar"])
def test_lossy_presets_store_the_same_bytes_in_growing_and_preallocated_caches(model, path, preset):
    model.set_attn_implementation("turboquant")
    options = {"preset": preset, "profile": path, "tile": 32, "recent_window": 0}
    inputs = padded(length=100, padding=0)
    grown, fixed = TurboQuantCache(model.config, **options), TurboQuantStaticCache(model.config, 130, **options)
    tokens = [generate(model, inputs, past_key_values=cache) for cache in (grown, fixed)]
    assert torch.equal(*tokens)
    for a, b in zip(grown.packed_layers, fixed.packed_layers, strict=True):
        assert a.tiles.keys.count == b.tiles.keys.count == 3 and not a.encoder.observes
        for one, two in zip(a.tiles, b.tiles, strict=True):
            assert all(torch.equal(x, two.view()[name]) for name, x in one.view().items())


@pytest.mark.slow
def test_a_compiled_forward_gives_the_tokens_of_an_eager_one(model, path):
    torch._dynamo.reset()
    model.set_attn_implementation("turboquant")
    answers = []
    for forward in (model.forward, torch.compile(model.forward, fullgraph=True, backend="eager")):
        cache = TurboQuantStaticCache(model.config, 80, EIGHT, profile=path)
        tokens, answer = padded(length=40, padding=0)["input_ids"], []
        with torch.no_grad():
            for _ in range(24):
                tokens = forward(input_ids=tokens, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                answer.append(tokens)
        answers.append(torch.cat(answer, dim=1))
        assert cache.packed_layers[0].tiles.keys.count > 4
    torch._dynamo.reset()
    assert torch.equal(*answers)


def test_generate_finds_the_profile_in_the_models_folder(model, path, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    inputs = padded(length=60, padding=0)
    ask = {"cache_implementation": "turboquant", "return_dict_in_generate": True}
    config = {"preset": "k4v4", "tile": 32, "recent_window": 0}
    first = generate(loaded, inputs, cache_config=config, **ask).past_key_values
    assert first.profile is None and first.packed_layers[0].tiles.keys.count == 0
    (tmp_path / FILE).write_bytes(path.read_bytes())
    found = generate(loaded, inputs, cache_config=config, **ask).past_key_values
    assert found.profile is not None and found.packed_layers[0].tiles.keys.count == 2
    without = generate(loaded, inputs, cache_config={**config, "profile": None}, **ask).past_key_values
    assert without.profile is None
