"""Which errors count as rounding, and which rows have no speed."""

import math
from dataclasses import replace

import pytest
import torch

from tests.support.toys import CPU, toy
from turboquant_hf.evaluation.benchmark import caches, check, model
from turboquant_hf.evaluation.benchmark.steps import Stepper
from turboquant_hf.evaluation.benchmark.timing import (
    relative_error,
)


def spoil_packed(monkeypatch, factor: float) -> None:
    """Attention of packed caches on a CPU times `factor`; "sdpa" does not use it."""
    from turboquant_hf.attention import packed as ours

    dense, packed = ours.dense_attention, ours.packed_attention

    def spoiled(*args, **options):
        output = packed(*args, **options)
        return None if output is None else output * factor

    monkeypatch.setattr(ours, "dense_attention", lambda *a, **k: (dense(*a, **k)[0] * factor, None))
    monkeypatch.setattr(ours, "packed_attention", spoiled)


def spoil_math(monkeypatch, factor: float | None) -> None:
    """SDPA by its math backend times `factor`, or without memory from the second layer on."""
    right, calls = torch.nn.functional.scaled_dot_product_attention, []

    def spoiled(*args, **options):
        if torch.backends.cuda.flash_sdp_enabled():
            return right(*args, **options)
        calls.append(1)
        if factor is None and len(calls) % 2 == 0:
            raise torch.OutOfMemoryError("none left")
        return right(*args, **options) * (factor or 1.0)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spoiled)


@pytest.mark.parametrize(
    ("error", "noise", "passes"),
    [(3e-2, 0.0, True), (3.1e-2, 0.0, False), (3.1e-2, 1.6e-2, True), (3.1e-2, 1.5e-2, False), (6.1e-2, 0.5, False)],
)
def test_error_above_the_bound_counts_up_to_twice_the_noise(error, noise, passes):
    """And noise up to the bound."""
    found = check.judge(error, noise, torch.bfloat16)
    assert ("reason" not in found) == passes == (error <= found["bound"]) and 3e-2 <= found["bound"] <= 6e-2


@pytest.mark.parametrize(("factor", "passes"), [(1.07, True), (1.03, False), (None, False)], ids=str)
def test_a_speed_counts_by_the_noise_of_its_cell(recorder, monkeypatch, factor, passes):
    spoil_packed(monkeypatch, 1.1)
    model.run_group(toy(), CPU, 1e10, 3, recorder)
    monkeypatch.setitem(check.ERROR_BOUNDS, torch.float32, 0.6 * recorder.rows[1]["error"])
    spoil_math(monkeypatch, factor)
    recorder.rows.clear()
    model.run_group(toy(), CPU, 1e10, 3, recorder)
    dynamic, packed = recorder.rows
    assert dynamic["ms"] > 0 and (packed["ms"] is not None) == (packed["error"] <= packed["bound"]) == passes
    if factor is None:
        assert packed["noise"] == dynamic["noise"] == 0.0
    elif not passes:
        assert f"above {packed['bound']:.1e} (noise {packed['noise']:.1e})" in packed["reason"]


def test_compiled_and_16_bit_caches_are_checked_with_the_noise_of_their_baseline(monkeypatch):
    """The step of the second cache is wrong by less, then by more, than twice the noise that the first left."""
    group = toy(presets=("k4v4",), caches=("dynamic", "static"))
    dynamic, static, packed = caches.candidates(group, (1, 384))
    shared = model.build_model(group, CPU)
    stepper = Stepper(shared, False)
    ids = stepper.first_ids(1)
    monkeypatch.setitem(check.ERROR_BOUNDS, torch.float32, 0.07)
    for first, second in ((dynamic, static), (packed, replace(packed, compiled=True))):
        baseline = {}
        shared.set_attn_implementation(first.attention)
        filled = [candidate.make(shared.config, 400) for candidate in (first, second)]
        for cache in filled:
            caches.fill(cache, group, 1, 384, CPU, first.attention)
        with torch.no_grad():
            check.check(shared, stepper, filled[0], first, 1, baseline)
            (key,) = baseline
            step = stepper.step(filled[1], ids)
            exact = relative_error(step, baseline[key].logits)
            assert exact < 1e-4
            spoiled = pytest.MonkeyPatch()
            spoiled.setattr(stepper, "step", lambda *_, step=step: step * 1.1)
            for noise, passes in ((0.06, True), (0.04, False)):
                baseline[key] = replace(baseline[key], noise=noise)
                row = check.check(shared, stepper, filled[1], second, 1, baseline)
                assert row["noise"] == noise and ("reason" not in row) == passes
            row = check.check(shared, stepper, filled[1], replace(second, approximate=True), 1, baseline)
            assert row["error"] > 2 * row["noise"] and "reason" not in row and "bound" not in row
        spoiled.undo()


@pytest.mark.parametrize("factor", [1.1, None, math.nan], ids=["wrong", "out of memory", "not finite"])
@pytest.mark.parametrize("name", ["dynamic", "packed"])
def test_rounding_noise_leaves_the_cache(monkeypatch, name, factor):
    group = toy(presets=("k4v4",), caches=("dynamic",))
    candidate = list(caches.candidates(group, (1, 384)))[name == "packed"]
    shared = model.build_model(group, CPU)
    shared.set_attn_implementation(candidate.attention)
    cache, stepper = candidate.make(shared.config, 400), Stepper(shared, False)
    caches.fill(cache, group, 1, 384, CPU, candidate.attention)
    shared.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = stepper.step(cache, stepper.first_ids(1))
        before = [(layer.keys, layer.values) for layer in cache.layers]
        spoil_math(monkeypatch, factor)
        noise = check.rounding_noise(stepper, cache, stepper.first_ids(1), logits)
    assert noise > 1e-3 if factor == 1.1 else noise == 0.0
    assert torch.backends.cuda.flash_sdp_enabled()
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :-1], keys[:, :, :-1]) and layer.keys.shape == keys.shape
        assert torch.equal(layer.values[:, :, :-1], values[:, :, :-1]) and layer.values.shape == values.shape


def test_rounding_noise_is_that_of_the_dtype():
    found = {}
    for dtype in ("float32", "float16", "bfloat16"):
        group = toy(dtype=dtype)
        shared = model.build_model(group, CPU)
        cache, stepper = caches.RIVALS["dynamic"].make(shared.config, 400), Stepper(shared, False)
        caches.fill(cache, group, 1, 384, CPU)
        with torch.no_grad():
            logits = stepper.step(cache, stepper.first_ids(1)).float()
            found[dtype] = check.rounding_noise(stepper, cache, stepper.first_ids(1), logits)
    assert found["float32"] < 1e-5 < found["float16"] < 5e-3
    assert 2 * found["float16"] < found["bfloat16"] < 3e-2


def test_check_waits_for_a_step_that_encodes_nothing(recorder):
    """At 4 x 128 - 1 tokens the checked step fills a tile: a dense read after it would see other bytes."""
    model.run_group(toy(cells=((1, 511),), presets=("k2v2",)), CPU, 1e10, 3, recorder)
    assert recorder.rows[-1]["error"] < 1e-4


def test_model_with_wrong_attention_has_no_speed(recorder, monkeypatch):
    spoil_packed(monkeypatch, 1.1)
    model.run_group(toy(), CPU, 1e10, 3, recorder)
    dynamic, packed = recorder.rows
    assert dynamic["ms"] > 0
    assert packed["ms"] is None and packed["error"] > 1e-3 and "relative error" in packed["reason"]
    assert "ratio_to_fp16" not in packed
