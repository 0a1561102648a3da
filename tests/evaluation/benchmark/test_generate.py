"""The levels of whole calls and of capacity at toy sizes, and that a wrong result has no speed."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from turboquant_hf.evaluation.benchmark import calls, capacity, check_calls, generate, model, rows, settings, table
from turboquant_hf.generation.recorders import RECORDERS, Repeat

CPU = torch.device("cpu")
TOY = settings.Shape("toy", hidden=64, heads=4, kv_heads=2, head_dim=32, intermediate=96, vocab=50)
ALL = ("dynamic", "eager", "graph", "static")
FAMILIES = {
    "qwen3": {}, "mistral": {"sliding_window": None},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def toy(**options) -> settings.Group:
    defaults = {"shape": TOY, "dtype": "float32", "layers": 2, "caches": ALL, "cells": ((2, 500),)}
    return settings.Group(**{**defaults, **options})


def shape(family: str) -> settings.Shape:
    return settings.Shape(family, 64, 4, 2, 32, 96, 50, family, FAMILIES[family])


WARM_UP = generate.warm_up


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """Without the calls that load a process's libraries: only times depend on them."""
    monkeypatch.setattr(generate, "warm_up", lambda model, group: None)


@pytest.fixture
def replays(monkeypatch) -> list[float]:
    """Recorded steps on a CPU; their logits are multiplied by the last number in the list, if there is one."""
    factor: list[float] = []

    class Spoiled(Repeat):
        def __init__(self, call, *args):
            def replay():
                output = call()
                output.logits = output.logits * (factor[-1] if factor else 1.0)
                return output

            super().__init__(replay, *args)

    monkeypatch.setitem(RECORDERS, "cpu", Spoiled)
    return factor


def run(group, recorder, compiles=True):
    with torch.no_grad():
        generate.run_group(group, CPU, 1e10, 6, compiles, recorder)
    return recorder.rows


def test_whole_calls_beside_dynamic_cache(recorder, replays, monkeypatch):
    monkeypatch.setattr(generate, "warm_up", WARM_UP)
    found = run(toy(static_cells=((2, 500),)), recorder)
    names = ["DynamicCache", "StaticCache", "turboquant graph=False", "turboquant", "turboquant_static"]
    assert [row["cache"] for row in found] == names and not any(row.get("reason") for row in found)
    dynamic, static, eager, graph, fixed = found
    assert all(row["ms"] > 0 and row["first_token_s"] > 0 and row["error"] < 1e-4 for row in found)
    assert graph["check"] == fixed["check"] == "the first cache of the preset" and 0 < graph["distance_from_fp16"] < 0.3
    assert graph["in_turns"] and "in_turns" not in fixed and static["mode"] == "compiled"
    assert eager["speedup_to_eager"] == 1 and dynamic["speedup"] == 1
    assert graph["ratio_to_floor"] == pytest.approx(graph["ms"] / graph["floor_ms"])
    # 500 prompt tokens and all but the newest new one, keys and values, 2 sequences, heads and layers, float32
    assert dynamic["held_bytes"] % (2 * 2 * 2 * 2 * 32 * 4) == 0
    assert dynamic["held_bytes"] // (2 * 2 * 2 * 2 * 32 * 4) in range(500, 512)
    text = table.to_markdown(found)
    assert "**toy, 2 layers, float32: whole calls of generate**" in text and "| 2 x 500 | turboquant k4v4 |" in text
    assert "x DynamicCache" in text and "x floor" in text and "held GiB" in text


def test_compiled_rivals_can_be_left_out(recorder):
    found = run(toy(caches=("dynamic",), static_cells=((2, 500),)), recorder, compiles=False)
    assert [row["cache"] for row in found] == ["DynamicCache"]


def test_unknown_variant():
    with pytest.raises(ValueError, match="dynamic, compiled, eager, graph, static"):
        generate.variants(toy(caches=("grap",)), (1, 500))


@pytest.mark.parametrize("caches", [ALL, ("dynamic", "graph")], ids=["beside eager", "alone"])
def test_wrong_replays_have_no_speed(recorder, replays, caches):
    replays.append(1.1)
    found = run(toy(caches=caches), recorder)
    bad = [row for row in found if row["cache"] in ("turboquant", "turboquant_static")]
    assert bad and all(row["ms"] is None and "relative error" in row["reason"] for row in bad)
    assert not any(key in row for row in bad for key in ("speedup", "ratio_to_floor"))
    assert all(row["ms"] for row in found if row not in bad)


def test_steps_that_were_not_recorded_do_not_pass_for_graphs(recorder, replays, monkeypatch):
    monkeypatch.setattr("turboquant_hf.generation.hook.why_not", lambda *_: "a reason")
    _, eager, graph, _ = run(toy(), recorder)
    assert eager["ms"] > 0 and graph["ms"] is None and "not recorded" in graph["reason"]


def test_wrong_attention_has_no_speed(recorder, monkeypatch):
    from turboquant_hf.attention import packed

    right = packed.packed_attention

    def wrong(*args, **options):
        output = right(*args, **options)
        return None if output is None else output * 1.1

    monkeypatch.setattr(packed, "packed_attention", wrong)
    dynamic, eager = run(toy(caches=("dynamic", "eager")), recorder)
    assert dynamic["ms"] > 0 and eager["ms"] is None and "relative error" in eager["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families_at_their_own_attention(recorder, replays, family):
    found = run(toy(shape=shape(family), caches=("dynamic", "graph", "eager"), cells=((1, 500),)), recorder)
    assert [row.get("reason") for row in found] == [None] * 3
    dynamic, eager, graph = found
    assert all(row["ms"] > 0 for row in found) and graph["error"] < 1e-4 and graph["speedup_to_eager"] > 0
    slides = "sliding_window" in FAMILIES[family] and FAMILIES[family]["sliding_window"]
    assert eager["check"].startswith("DynamicCache" if slides else "the same cache")
    assert (eager["bound"] == check_calls.QUANTIZED) == bool(slides)


def test_all_calls_have_the_same_tokens_and_end_without_encoding():
    group = toy()
    shared = model.build_model(group, CPU)
    ids = calls.random_prompt(1, 500, TOY.vocab, CPU)
    for length in range(500, 512):
        new = calls.answer(length, 7, ("k4v4",), TOY.vocab, CPU)
        assert len(new) in (7, 8) and (length + len(new) - 1 - 128) % 128
    assert len(calls.answer(506, 7, ("k4v4",), TOY.vocab, CPU)) == 8
    new = calls.answer(500, 7, ("k4v4",), TOY.vocab, CPU)
    for variant, preset in generate.variants(group, (1, 500)):
        made = calls.call(shared, ids, new, 1, **variant.arguments(preset))
        calls.undo(shared)
        assert made.sequences.tolist() == [ids[0].tolist() + new.tolist()]
        assert len(made.logits) == calls.KEPT and made.held_bytes > 0
        assert shared.config._attn_implementation == "sdpa"
    assert "prepare_inputs_for_generation" not in vars(shared)


def test_turns_keep_a_host_that_slows_down_out_of_the_ratio(recorder, monkeypatch):
    """Every call takes twice as long per token as the one before its round; a packed cache half of DynamicCache's."""
    real, turn = calls.call, {}

    def timed(shared, ids, tokens, warmup, cache=None, **arguments):
        made = real(shared, ids, tokens, warmup, cache, **arguments)
        if cache is not None:
            name = type(cache).__name__
            turn[name] = turn.get(name, 0) + 1
            made.ms = (1.0 if name == "DynamicCache" else 0.5) * 2 ** turn[name]
        return made

    monkeypatch.setattr(generate, "call", timed)
    dynamic, graph = run(toy(caches=("dynamic", "graph")), recorder)
    assert turn == {"DynamicCache": generate.ROUNDS, "TurboQuantCache": generate.ROUNDS}
    assert graph["speedup"] == 2 and dynamic["ms"] == 2 * graph["ms"] == 8


def test_lengths_report_what_a_new_length_costs(recorder, monkeypatch):
    seen, real = [], calls.call
    monkeypatch.setattr(generate, "CALLS", 4)

    def timed(shared, ids, *args, **arguments):
        made = real(shared, ids, *args, **arguments)
        seen.append(ids.shape[1])
        made.total_s = 1.0 if ids.shape[1] == 600 else 1.25
        return made

    monkeypatch.setattr(generate, "call", timed)
    dynamic, graph = run(toy(what="lengths", caches=("dynamic", "graph"), cells=((1, 600),)), recorder)
    assert dynamic["call_s"] == pytest.approx(1.0) and graph["overhead_s"] == pytest.approx(0.25)
    different = [length for length in seen[-2 * generate.CALLS :] if length != 600]
    assert len(set(different)) == generate.CALLS and sum(different) == 600 * generate.CALLS


def test_chunks_beside_one_piece(recorder):
    found = run(toy(what="chunks", chunk=300, caches=("dynamic", "graph"), cells=((1, 900),)), recorder)
    assert [(row["cache"], row["chunk"]) for row in found] == [
        ("DynamicCache", None), ("DynamicCache", 300), ("turboquant", None), ("turboquant", 300)
    ]  # fmt: skip
    assert not any(row.get("reason") for row in found)
    whole, pieces = found[2:]
    assert pieces["ratio_to_whole"] == pytest.approx(pieces["first_token_s"] / whole["first_token_s"])
    assert pieces["prefill_speedup"] == pytest.approx(found[1]["first_token_s"] / pieces["first_token_s"])
    assert whole["error"] < 1e-4 and pieces["error"] < 1e-4 < pieces["distance_from_fp16"] < check_calls.QUANTIZED
    assert pieces["check"].startswith("preset lossless")
    assert "| 1 x 900 by 300 | turboquant k4v4 |" in table.to_markdown(found)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_prompts_logits_are_judged(quantized):
    """If the preset quantizes, the logits of the lossless preset are judged."""
    shared, exact = model.build_model(toy(), CPU), torch.ones(1, 50)

    def judged(factor, reference=exact):
        logits = factor * exact
        return check_calls.check_first(shared, *((2 * exact, reference, logits) if quantized else (logits, reference)))

    assert "reason" not in judged(1 + 0.99 * 2e-3) and "above" in judged(1 + 1.01 * 2e-3)["reason"]
    assert "nothing" in judged(1.0, None)["reason"]
    assert (judged(1.0).get("distance_from_fp16") == 1.0) == quantized


def fill_up(recorder, replays):
    group = toy(caches=(), presets=("k3v3",), cells=((1, 1200),))
    with torch.no_grad():
        capacity.run_group(group, CPU, 1e10, 3, recorder)
    return recorder.rows


def test_capacity(recorder, replays):
    eager, graph = fill_up(recorder, replays)
    assert [row["cache"] for row in (eager, graph)] == ["TurboQuantCache graph=False", "TurboQuantCache"]
    assert all(row["ms"] > 0 and row["error"] < 1e-4 and row["held_bytes"] for row in (eager, graph))
    assert graph["ratio_to_floor"] == pytest.approx(graph["ms"] / graph["floor_ms"]) and graph["fill_s"] > 0
    assert "filled directly" in table.to_markdown([eager, graph])


def test_capacity_with_wrong_replays_has_no_speed(recorder, replays):
    replays.append(1.1)
    eager, graph = fill_up(recorder, replays)
    assert eager["ms"] > 0 and graph["ms"] is None and "relative error" in graph["reason"]


def test_a_killed_run_goes_on_behind_its_complete_cells(tmp_path):
    group = toy(caches=("dynamic",), cells=((1, 400), (2, 400)))
    first = rows.Recorder(tmp_path)
    done = json.dumps(run(group, first)[0], sort_keys=True)
    partial = json.loads((tmp_path / rows.PARTIAL).read_text())
    del partial[1]["complete"]
    partial[1]["ms"] = -1
    (tmp_path / rows.PARTIAL).write_text(json.dumps(partial))
    again = run(group, rows.Recorder(tmp_path))
    assert json.dumps(again[0], sort_keys=True) == done and len(again) == 2 and again[1]["ms"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "build_model", lambda *_: pytest.fail("nothing is left to measure"))
        assert len(run(group, rows.Recorder(tmp_path))) == 2


def test_weights_that_a_step_reads():
    def read(family):
        group = toy(shape=shape(family))
        config = model.model_config(group.shape, 2, 100)
        made = AutoModelForCausalLM.from_config(config)
        return model.read_nbytes(made), sum(p.numel() * 4 for p in made.parameters()), made

    own, total, made = read("qwen3")
    assert own == total - made.get_input_embeddings().weight.numel() * 4
    own, total, made = read("gemma3_text")  # its head is the table
    assert own == total
    own, total, made = read("gpt_oss")
    experts = sum(p.numel() * 4 for name, p in made.named_parameters() if ".experts." in name)
    assert own == total - made.get_input_embeddings().weight.numel() * 4 - experts // 2
