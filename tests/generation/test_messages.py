"""Log lines about a model: true, with the model's name and the effect on memory, and only once."""

from __future__ import annotations

import re
from functools import partial

import pytest
from transformers import DynamicCache, StaticCache

from tests.support import generating
from tests.support.families import MLA, Family, available, build, family_named, prompt
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache
from turboquant_hf.cache import messages

INDEXED = {**MLA, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
GROWS = r"nothing is compressed.* 2 (Dynamic|Static)IndexedLayer keep every token uncompressed: memory is what it is"
FIXED = r"nothing is compressed: no layer keeps every token .*Memory is what it is without.* stops growing by itself"
IGNORED = r"(in no cache of generate's|not use the TurboQuant\w*Cache that it was given): nothing is compressed, memory"
LATENT = (
    r"latent attention needs dense keys and values: the cache is compressed in memory, and decoded .* which takes time"
)
OWN_CODE = r"an attention in the model's own code needs dense keys and values: the cache is compressed in memory"
SWITCHED = r'switched from "sdpa" to "turboquant", .*restore_attention\(model\) undoes it'
BETTER = r'attention is "sdpa", .*same memory, but model.set_attn_implementation\("turboquant"\) is faster'
CASES = {
    "sliding": (Family("mistral", {"sliding_window": 12}), FIXED, FIXED),
    "recurrent": (
        Family("mamba", {"state_size": 8}),
        f"{FIXED}|{IGNORED}",
        FIXED,
    ),  # early versions have their own state class
    "glm-5": (Family("glm_moe_dsa", INDEXED), GROWS, GROWS),
    "deepseek-v3.2": (Family("deepseek_v32", INDEXED), GROWS, GROWS),
    "deepseek-v3": (Family("deepseek_v3", MLA), LATENT, LATENT),
    "rwkv": (Family("rwkv", {"attention_hidden_size": 32, "context_length": 256}), IGNORED, IGNORED),
    "xlnet": (Family("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}), IGNORED, IGNORED),
    "bloom": (Family("bloom"), OWN_CODE, OWN_CODE),
    "llama": (Family("llama"), SWITCHED, BETTER),
    "hybrid": (family_named("falcon_h1"), SWITCHED, BETTER),
}
WAYS = {
    "name": ({"cache_implementation": "turboquant"}, {}),
    "own": (TurboQuantCache, lambda config: DynamicCache(config=config)),
    "static-name": ({"cache_implementation": "turboquant_static"}, {"cache_implementation": "static"}),
    "static-own": (lambda config: TurboQuantStaticCache(config, 60), lambda config: StaticCache(config, 60)),
}
"""A name or the user's own cache, and the counterpart in transformers."""


generate = partial(generating.generate, new=3)


@pytest.fixture
def said(monkeypatch):
    """The lines that are logged, as in a process that has not logged anything yet."""
    lines = []
    monkeypatch.setattr(messages.logger, "warning_once", lambda line: lines.append(line) if line not in lines else None)
    return lines


def options_of(way, model):
    return way if isinstance(way, dict) else {"past_key_values": way(model.config)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_every_model_gets_one_true_log_line(case, way, said):
    family, by_name, own = CASES[case]
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    model = build(family)
    if type(TurboQuantCache(model.config).layers[0]).__name__ == "TurboQuantLayer" and case in (
        "glm-5",
        "deepseek-v3.2",
    ):
        by_name = own = LATENT  # early versions keep what the indexer needs in the model itself
    if case == "hybrid" and way.startswith("static"):
        by_name = own = (
            r"nothing is compressed: .* 2 LinearAttentionAndStaticFullAttentionLayer keep every token uncomp"
        )
    ours, upstreams = WAYS[way]
    try:
        generate(model, prompt(family, length=20), **options_of(upstreams, model))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"this transformers' own cache does not serve the model: {error}")
    for _ in range(2):
        generate(model, prompt(family, length=20), **options_of(ours, model))
    assert len(said) == 1, said
    assert said[0].startswith(f"turboquant_hf: {type(model).__name__}: ")
    assert re.search(own if way.endswith("own") else by_name, said[0]), said[0]


def test_a_second_model_of_another_class_gets_a_log_line_too(said):
    for kind, times in (("mistral", 1), ("mistral", 1), ("starcoder2", 2)):
        family = Family(kind, {"sliding_window": 12})
        generate(build(family), prompt(family, length=20), cache_implementation="turboquant")
        assert len(said) == times and all(re.search(FIXED, line) for line in said), said
    assert "MistralForCausalLM" in said[0] and "Starcoder2ForCausalLM" in said[1]


def test_layers_that_stay_uncompressed_beside_packed_ones(llama, said):
    """The layers are of a kind that this package does not know."""
    cache = TurboQuantCache(llama.config)
    cache.layers[1] = type("NewLayer", (type(DynamicCache(config=llama.config).layers[1]),), {})()
    generate(llama, prompt(CASES["llama"][0]), past_key_values=cache)
    assert said[0].endswith("LlamaForCausalLM: 1 layers are compressed; 1 NewLayer keep every token uncompressed.")


def test_a_call_without_a_cache_is_logged(llama, said):
    generate(llama, prompt(CASES["llama"][0]), cache_implementation="turboquant", use_cache=False)
    assert said == [
        "turboquant_hf: LlamaForCausalLM: use_cache=False, so there is no cache to compress; allowed: use_cache=True."
    ]


@pytest.mark.parametrize("way", ["name", "own"])
def test_a_cache_that_is_replaced_is_logged(llama, way, said, monkeypatch):
    """PEFT's prefix tuning does this: it fills its own DynamicCache and passes it to the model."""
    original = llama.prepare_inputs_for_generation

    def swapping(*args, **kwargs):
        inputs = original(*args, **kwargs)
        name = next(name for name in ("cache", "past_key_values") if inputs.get(name) is not None)
        inputs[name] = DynamicCache(config=llama.config) if inputs[name].get_seq_length() == 0 else inputs[name]
        return inputs

    monkeypatch.setattr(llama, "prepare_inputs_for_generation", swapping)
    generate(llama, prompt(CASES["llama"][0]), **options_of(WAYS[way][0], llama))
    pattern = (
        r"LlamaForCausalLM: a DynamicCache replaced the TurboQuant\w*Cache \(PEFT's prefix tuning does this\): nothing"
    )
    assert re.search(pattern, said[-1]), said
    assert not any("reads the packed cache" in line for line in said)


def test_real_prefix_tuning(llama, said):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(llama, config).eval()
    found = generate(model, prompt(CASES["llama"][0]), cache_implementation="turboquant", return_dict_in_generate=True)
    used = found.get("past_key_values", found.get("cache"))
    told = any("nothing is compressed" in line for line in said)
    assert told == (not isinstance(used, TurboQuantCache)), said


def test_the_cost_of_attentions_is_logged(said):
    family = family_named("gpt_oss")
    model = build(family)
    for _ in range(2):
        generate(model, prompt(family), cache_implementation="turboquant", output_attentions=True)
    assert len(said) == 1 and "GptOssForCausalLM: this call asks for attentions, so it runs with" in said[0]
