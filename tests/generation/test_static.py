"""The preallocated cache gives DynamicCache's tokens with `lossless`, and those of "turboquant" with other presets."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.compatibility import COMPILED
from tests.support.families import FAMILIES, available, build, family_named, prompt
from tests.support.generating import LOGITS, TILES, generate, inputs_of, turboquant
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache

pytestmark = pytest.mark.slow  # whole generations, one per family or mode
KINDS = ("llama", "gemma2", "gemma3n", "gpt_oss", "llama4", "deepseek_v3", "qwen3_next", "falcon", "t5")
PICKED = [family for family in FAMILIES if (family.label or family.kind) in KINDS]


@pytest.mark.parametrize("family", PICKED, ids=lambda family: family.label or family.kind)
def test_lossless_equals_dynamic_cache(family):
    if not available(family):
        pytest.skip("this transformers does not know it")
    model, inputs = build(family), prompt(family)
    if family.auto == "AutoModelForCausalLM":
        inputs["attention_mask"][1, :11] = 0
    expected = generate(model, inputs)
    try:
        generate(model, inputs, cache_implementation="static")
    except (KeyError, ValueError, AttributeError) as error:
        pytest.skip(f"this transformers has no static cache for it: {error!r}")
    assert torch.equal(generate(model, inputs, **turboquant(static=True, attention="keep")), expected)
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # the SDPA of early versions drops the soft-cap
        expected = generate(model, inputs)
        model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, inputs, **turboquant(static=True)), expected)
    latent = hasattr(model.config, "kv_lora_rank")  # needs dense tensors: another attention gains nothing
    if model._can_set_attn_implementation() and not latent:
        assert model.config.get_text_config(decoder=True)._attn_implementation == "turboquant"


MODES = {
    "sampling": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.3},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "chunked-prefill": {"prefill_chunk_size": 20},
    "short-chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [0, 19])
def test_modes(llama, mode, padding):
    inputs = inputs_of(padding=padding)
    expected = generate(llama, inputs, **MODES[mode])
    assert torch.equal(generate(llama, inputs, **MODES[mode], **turboquant(static=True)), expected)


@pytest.mark.parametrize("length", [3, 17, 64])
def test_long_answers_from_short_prompts(llama, length):
    """The first encode, and several tiles, are crossed while tokens come one by one."""
    inputs = inputs_of(length=length, padding=length // 3)
    expected = generate(llama, inputs, new=90)
    assert torch.equal(generate(llama, inputs, new=90, **turboquant(static=True)), expected)


@pytest.mark.parametrize("preset", ["k4v4", "k2v2", "kivi-4", "paper-prod-4", "polar-4"])
@pytest.mark.parametrize("length", [5, 60])
def test_quantized_equals_the_dynamic_cache(small_llama, preset, length):
    """Statistics and codes are equal, except for a few codes that another order of sums moves over a threshold."""
    model = small_llama(head_dim=32)
    inputs = inputs_of(length=length, padding=length // 3)
    sizes = {"tile": 32, "recent_window": 16, "min_statistics": 48, "attention": "auto"}
    runs = {}
    for name in ("turboquant", "turboquant_static"):
        config = {"preset": preset, **sizes}
        options = {"cache_implementation": name, "cache_config": config}
        runs[name] = generate(model, inputs, new=70, **LOGITS, **options)
    dynamic, ours = runs["turboquant"], runs["turboquant_static"]
    assert torch.equal(dynamic.sequences, ours.sequences)
    raw = generate(model, inputs, new=70, **LOGITS)
    raw, dynamic, ours = (torch.stack(run.logits) for run in (raw, dynamic, ours))
    assert (ours - dynamic).abs().median() < 1e-4 and (ours - dynamic).abs().mean() < 2e-3
    assert (raw - ours).abs().mean() > 0.02, "something was packed"


def test_a_padded_batch_equals_single_prompts(small_llama):
    model = small_llama(head_dim=32)
    lossy = turboquant(
        "k4v4", static=True, tile=32, recent_window=16, min_statistics=300
    )  # beyond this: statistics are batch-wide
    inputs = inputs_of(length=60, padding=25)
    both = generate(model, inputs, **turboquant(static=True))
    for row, start in ((0, 0), (1, 25)):
        one = {name: x[row : row + 1, start:] for name, x in inputs.items()}
        assert torch.equal(generate(model, one, **turboquant(static=True))[0, -24:], both[row, -24:])
    assert generate(model, inputs, **lossy).shape == both.shape


def test_assisted_decoding_and_prompt_lookup(llama, small_llama):
    inputs = {name: x[:1] for name, x in inputs_of(padding=0).items()}
    length = {"new": 40, "min_new_tokens": 0, "eos_token_id": 198}
    expected = generate(llama, inputs, **length)
    assistant = small_llama(num_hidden_layers=1)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 20}):
        assert torch.equal(generate(llama, inputs, **length, **options, **turboquant(static=True)), expected)


def test_turns_with_one_cache(llama):
    llama.set_attn_implementation("turboquant")
    inputs = inputs_of(padding=0)
    cache = TurboQuantStaticCache(llama.config, 160, "lossless", **TILES)
    first = generate(llama, inputs, past_key_values=cache)
    more = torch.cat([first, torch.randint(3, 199, (2, 30), generator=torch.Generator().manual_seed(3))], dim=1)
    second = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    assert torch.equal(generate(llama, second, past_key_values=cache), generate(llama, second))
    cache.reset()
    assert torch.equal(generate(llama, inputs, past_key_values=cache), first)


def test_unsupported_calls_of_a_static_cache_are_named_in_the_error(llama, tmp_path):
    cache = TurboQuantStaticCache(llama.config, max_cache_len=40)
    with pytest.raises(NotImplementedError, match="cannot be saved; prefill and save a TurboQuantCache"):
        cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match="offloading is not supported by a static cache"):
        TurboQuantStaticCache(llama.config, max_cache_len=40, offloading=True)


def test_too_many_tokens_are_refused_before_anything_runs(llama):
    llama.set_attn_implementation("turboquant")
    inputs = inputs_of(padding=19)
    cache = TurboQuantStaticCache(llama.config, 60, "lossless", **TILES)
    with pytest.raises(ValueError, match="max_cache_len=60 of the given cache is not enough.*68 and more"):
        generate(llama, inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="max_cache_len=40 is not enough: 0 tokens are held and 45 more came"):
        llama(**inputs, past_key_values=TurboQuantStaticCache(llama.config, 40, "lossless", **TILES))
    with pytest.raises(ValueError, match="max_cache_len=0 is not supported"):
        TurboQuantStaticCache(llama.config, 0)
    with pytest.raises(ValueError, match="encode_first=True is not supported by a static cache"):
        generate(llama, inputs, **turboquant(static=True, encode_first=True))


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def teacher_forced(model, forward, tokens, cache, steps):
    """Logits [B, steps, V] of feeding `tokens` one by one behind a prefill of the first 20."""
    with torch.no_grad():
        model(input_ids=tokens[:, :20], past_key_values=cache)
        new = [forward(input_ids=tokens[:, n : n + 1], past_key_values=cache).logits for n in range(20, 20 + steps)]
    return torch.cat(new, dim=1)


@pytest.mark.parametrize(
    "kind, backend, preset",
    [
        ("llama", "eager", "lossless"),
        *((kind, "aot_eager", "k4v4") for kind in COMPILED),
        pytest.param("llama", "inductor", "k4v4", marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_every_step(compiler, kind, backend, preset):
    """No graph break and no second graph, across the first encode and several tiles, and for a second cache."""
    model = build(family_named(kind), head_dim=32)
    model.set_attn_implementation("turboquant")
    tokens = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(0))
    steps = 11 if kind == "gpt_oss" else 40  # its other layers are upstream's, which change graphs at the window
    options = {"tile": 8, "recent_window": 8, "min_statistics": 24}

    def cache():
        return TurboQuantStaticCache(model.config, 64, preset, **options)

    expected = teacher_forced(model, model, tokens, cache(), steps)
    with torch._dynamo.config.patch(error_on_recompile=kind == "llama"):
        compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
        for _ in range(2):
            result = teacher_forced(model, compiled, tokens, cache(), steps)
            # Another order of sums may move a code over its threshold. A few logits then change slightly.
            apart = ~torch.isclose(result, expected, rtol=1e-4, atol=1e-4)
            assert apart.float().mean() <= (0.01 if backend == "inductor" else 0.0)
            torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
    assert not counters["graph_break"]
    if kind == "llama":
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("early", [False, True])
def test_a_compiled_prefill(compiler, llama, early):
    llama.set_attn_implementation("turboquant")
    inputs = {name: x for name, x in inputs_of(padding=0).items() if name == "input_ids"}
    compiled = torch.compile(llama.forward, fullgraph=True, backend="aot_eager")
    cache = TurboQuantStaticCache(llama.config, 80, "lossless", **TILES)
    if early:
        cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        result = compiled(**inputs, past_key_values=cache).logits
        torch.testing.assert_close(result, llama(**inputs).logits, rtol=1e-4, atol=1e-4)
    layer = cache.packed_layers[0]
    assert (layer.tiles[0].count, layer.get_seq_length()) == (4, 45)


def test_generate_compiles_by_itself(compiler, llama):
    """If transformers compiles (here it is told to, on a CPU), the result does not change."""
    from transformers import CompileConfig

    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    inputs = inputs_of(padding=19)
    expected = generate(llama, inputs)
    assert torch.equal(generate(llama, inputs, compile_config=config, **turboquant(static=True)), expected)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


def test_code_around_the_growing_cache_may_be_compiled(compiler, llama):
    """The cache's state is in Python, so graphs break there. Nothing crashes, and the result does not change."""
    llama.set_attn_implementation("turboquant")
    tokens = torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(0))

    def cache():
        return TurboQuantCache(llama.config, "k4v4", tile=8, recent_window=8, min_statistics=24)

    expected = teacher_forced(llama, llama, tokens, cache(), 12)
    compiled = torch.compile(llama.forward, backend="aot_eager")
    torch.testing.assert_close(teacher_forced(llama, compiled, tokens, cache(), 12), expected, rtol=1e-4, atol=1e-4)
