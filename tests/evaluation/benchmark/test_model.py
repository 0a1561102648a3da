"""The level of decode steps at toy sizes, and the caches that it compares."""

import pytest
import torch

from tests.support.toys import CPU, PRESET, TOY, toy
from turboquant_hf.evaluation.benchmark import caches, model, turns


def test_model_level(recorder):
    group = toy(caches=("static", "dynamic"), presets=(PRESET, "k4v4"), cells=((2, 400),))
    model.run_group(group, CPU, 1e10, 3, recorder)
    names = [(row["cache"], row["preset"]) for row in recorder.rows]
    assert names == [
        ("DynamicCache", None), ("StaticCache", None), ("TurboQuantCache", PRESET), ("TurboQuantCache", "k4v4")
    ]  # fmt: skip
    dynamic, static, packed, conditioned = recorder.rows
    assert all(row["ms"] > 0 and row["error"] < 1e-4 for row in recorder.rows)
    assert dynamic["bytes"] == 2 * 2 * 2 * 2 * 400 * 32 * 4
    assert packed["bytes"] < dynamic["bytes"] / 2 and packed["memory_saved"] > 2
    assert 0 < conditioned["distance_from_fp16"] < 0.2
    best = min(dynamic["ms"], static["ms"])
    assert packed["ratio_to_best_fp16"] == pytest.approx(packed["ms"] / best)
    assert packed["in_turns"] and packed["ratio_to_fp16"] == pytest.approx(1 / packed["speedup"])
    assert packed["check"] == "the same cache read densely"
    assert all(row["noise"] < 1e-5 and row["bound"] == 1e-3 for row in recorder.rows)
    assert static["noise"] == dynamic["noise"]


def test_turns_keep_a_host_that_slows_down_out_of_the_ratio(monkeypatch):
    """Every round takes twice as long as the one before; the packed cache takes half of what the fastest other does."""
    alone = {"TurboQuantCache": 0.5, "DynamicCache": 1.0, "StaticCache": 3.0}
    seen = []

    class Clock:
        def __init__(self, stepper, cache, batch):
            self.name, self.turn = type(cache).__name__, 0

        def take(self, steps):
            seen.append((self.name, shared.config._attn_implementation))
            self.turn += 1
            return [alone[self.name] * 2**self.turn] * steps

    monkeypatch.setattr(turns, "Clock", Clock)
    group = toy(presets=("k4v4",), caches=("dynamic", "static"))
    *others, own = caches.candidates(group, (1, 384))
    shared = model.build_model(group, CPU)
    assert turns.time_in_turns(shared, group, (1, 384), own, others, 3 * turns.TURN) == 0.5
    assert seen[:3] == [("TurboQuantCache", "turboquant"), ("DynamicCache", "sdpa"), ("StaticCache", "sdpa")]
    assert len(seen) == 9 and shared.config._attn_implementation == "sdpa"


def test_caches_get_the_same_prompt():
    group = toy(cells=((2, 300),))
    config = model.model_config(TOY, group.layers, 300)
    filled = []
    for candidate in (caches.RIVALS["dynamic"], caches.RIVALS["static"]):
        cache = candidate.make(config, 310)
        caches.fill(cache, group, 2, 300, CPU)
        filled.append([layer.keys[:, :, :300] for layer in cache.layers])
    config._attn_implementation = caches.ATTENTION_NAME
    packed = caches.TurboQuantCache(config, preset="lossless")
    caches.fill(packed, group, 2, 300, CPU, caches.ATTENTION_NAME)
    for dynamic, static, layer in zip(*filled, packed.layers, strict=True):
        assert torch.equal(dynamic, static) and torch.equal(dynamic, layer.keys)
    assert not torch.equal(filled[0][0], filled[0][1])


def test_unknown_rival():
    with pytest.raises(ValueError, match="dynamic, static"):
        list(caches.candidates(toy(caches=("dinamic",)), (1, 384)))
