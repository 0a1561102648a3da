"""Every level of the benchmark at toy sizes, and that a wrong result has no speed."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml

from turboquant_hf import cli
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.benchmark import caches, check, encode, kernels, model, settings, table, turns
from turboquant_hf.evaluation.benchmark.calls import VARIANTS
from turboquant_hf.evaluation.benchmark.data import Source, packed_layer, tile_nbytes
from turboquant_hf.evaluation.benchmark.plot import plot_level
from turboquant_hf.evaluation.benchmark.rows import PARTIAL, Recorder
from turboquant_hf.evaluation.benchmark.steps import Stepper
from turboquant_hf.evaluation.benchmark.timing import (
    Timing,
    copy_bandwidth,
    measure,
    relative_error,
    rotation_count,
    steadiest,
)
from turboquant_hf.evaluation.labels import LEVELS
from turboquant_hf.resources import config_path

CPU = torch.device("cpu")
TOY = settings.Shape("toy", hidden=64, heads=4, kv_heads=2, head_dim=32, intermediate=96, vocab=50)
PRESET = "paper-mse-4"


def toy(**options) -> settings.Group:
    defaults = {"shape": TOY, "dtype": "float32", "presets": (PRESET,), "layers": 2, "cells": ((1, 384),)}
    return settings.Group(**{**defaults, **options})


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# ---------------------------------------------------------------------- settings


def test_shipped_settings_name_only_what_exists():
    data = yaml.safe_load(config_path("eval", "benchmark.yaml").read_text())
    for section in ("full", "quick", "cpu"):
        for level, groups in settings.read_groups(data, section).items():
            assert groups, (section, level)
            for group in groups:
                assert set(group.caches) <= set(VARIANTS if level == "generate" else caches.RIVALS)
                assert set(group.static_cells) <= set(group.cells)
                assert group.shape.heads % group.shape.kv_heads == 0
                for preset in group.presets:
                    load_preset(preset).validate(group.shape.head_dim)
                    assert all(tokens >= load_preset(preset).first_encode for _, tokens in group.cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": [[1, 0]]}, "from 1"),
        ({"cells": [[1, 2, 3]]}, r"\[batch, tokens\]"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"shape": "none"}, "toy"),
        ({"token": 4}, "cells"),
    ],
)
def test_read_groups_names_what_is_wrong(change, message):
    sizes = {name: getattr(TOY, name) for name in list(settings.Shape.__annotations__)[1:]}
    data = {"shapes": {"toy": sizes}, "full": {"kernel": [{"shape": "toy", "cells": [[1, 4]], **change}]}}
    with pytest.raises(ValueError, match=message):
        settings.read_groups(data, "full")


def test_narrow_replaces_and_merges():
    shapes = {"toy": TOY, "other": settings.Shape("other", 8, 1, 1, 8, 8, 8)}
    groups = [toy(cells=((1, 512), (2, 1024)), static_cells=((1, 512),)), toy(cells=((4, 512),))]
    found = settings.narrow(groups, shapes, tokens=[256])
    assert [group.cells for group in found] == [((1, 256), (2, 256)), ((4, 256),)]
    assert found[0].static_cells == found[0].cells and not found[1].static_cells
    merged = settings.narrow(groups, shapes, batch=[1], tokens=[256], presets=["k3v3"], dtype="float16")
    assert {(group.cells, group.presets, group.dtype) for group in merged} == {(((1, 256),), ("k3v3",), "float16")}
    borrowed = settings.narrow(groups, shapes, names=["other"])
    assert [(group.shape.name, group.cells) for group in borrowed] == [("other", groups[0].cells)]
    with pytest.raises(ValueError, match="toy, other"):
        settings.narrow(groups, shapes, names=["absent"])


# ---------------------------------------------------------------------- data and time


def test_source_repeats_itself_and_looks_like_keys():
    def draw(seed):
        source = Source(1, 2, 3, 64, torch.float32, CPU, seed=seed)
        source.queries(5)  # a stream of its own
        return source, *source.keys_and_values(4096)

    (source, keys, values), (_, again, _), (_, other, _) = draw(0), draw(0), draw(1)
    assert torch.equal(keys, again) and not torch.allclose(keys, other)
    spread = keys.std(dim=2)
    assert (spread.amax(-1) > 4 * spread.median(-1).values).all(), "outlier channels"
    assert (keys.mean(dim=2).norm(dim=-1) > keys.std(dim=2).norm(dim=-1)).all(), "a mean that all keys share"
    query = source.queries(256).view(1, 2, 3, 256, 64)
    scores = query @ (keys - keys.mean(dim=2, keepdim=True)).unsqueeze(2).transpose(-1, -2) / 8
    assert 1.5 < scores.std() < 2.5
    assert (values != 0).all() and values.mean().abs() < 0.05


def test_packed_layer_holds_its_tokens():
    layer = packed_layer(load_preset("k4v4"), Source(2, 2, 2, 64, torch.float32, CPU), 640)
    assert layer.get_seq_length() == 640 and layer.tiles[0].count == 4 and layer._fitted
    stored = sum(x.numel() * x.itemsize for store in layer.tiles for x in store.view().values())
    raw = sum(x.numel() * x.itemsize for x in (*layer.tail.view(), *layer.sinks.arrays))
    assert stored + raw <= tile_nbytes(layer) <= stored + raw + 64
    with pytest.raises(ValueError, match="from 256"):
        packed_layer(load_preset("k4v4"), Source(1, 2, 2, 64, torch.float32, CPU), 200)


def test_measure_counts_each_call_once():
    order = []
    timing = measure([lambda: order.append(0), lambda: order.append(1)], CPU, seconds=0.0)
    assert timing.method == "host" and timing.seconds > 0
    assert order[:6] == [0, 1, 0, 1, 0, 1]
    assert rotation_count(1, CPU) == 1
    assert rotation_count(40 * 2**20, torch.device("cuda")) == 4


@pytest.mark.parametrize(
    ("spreads", "kept", "taken"), [((0.01, 0.0), 0, 1), ((0.24, 0.02, 0.01), 1, 2), ((0.4, 0.2, 0.3, 0.01), 1, 3)]
)
def test_disturbed_measurements_are_taken_again(spreads, kept, taken):
    timings = [Timing(1.0 + i, spread, "graph") for i, spread in enumerate(spreads)]
    left = iter(timings)
    assert steadiest(lambda: next(left)) is timings[kept]
    assert len(list(left)) == len(spreads) - taken


def test_copy_bandwidth_is_one_of_memory():
    assert 1e8 < copy_bandwidth(CPU) < 1e13


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_relative_error(bad):
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(exact * 1.01, exact) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(torch.tensor([3.0, bad]), exact) == math.inf


# ---------------------------------------------------------------------- kernel level


def test_kernel_level(recorder):
    kernels.run_group(toy(cells=((2, 384),)), ["torch"], CPU, 1e10, recorder)
    dense, packed = recorder.rows
    assert dense["backend"] == "sdpa default" and dense["speedup"] == 1.0 and dense["error"] < 1e-5
    assert dense["bytes"] == 2 * 2 * 2 * 384 * 32 * 4
    assert packed["preset"] == PRESET and packed["error"] < 1e-5
    assert packed["speedup"] == pytest.approx(dense["us"] / packed["us"])
    assert packed["ratio_to_fp16"] == pytest.approx(1 / packed["speedup"])
    assert packed["gbps"] == pytest.approx(packed["bytes"] / packed["us"] / 1e3)
    assert packed["copy_share"] == pytest.approx(packed["gbps"] / 10)
    assert packed["floor_us"] == pytest.approx(packed["bytes"] / 1e4)


def test_exact_references_agree():
    """The packed reference, a sequence at a time, against attention over the decoded tensors."""
    source = Source(2, 2, 3, 64, torch.float32, CPU)
    layer = packed_layer(load_preset("k3v3"), source, 700)
    inputs = kernels.Inputs.of_layer(layer, source.queries(1))
    dense = torch.cat([kernels._exact_dense(inputs.query[b], layer.keys[b], layer.values[b]) for b in range(2)])
    assert relative_error(inputs.exact(), dense) < 1e-4
    for attend in kernels._ways(inputs.query, 3, 1).values():
        assert relative_error(attend(layer.keys, layer.values), dense) < 1e-4


def test_kernel_that_is_wrong_has_no_speed(recorder, monkeypatch):
    right = kernels.dispatch.decode_attention
    monkeypatch.setattr(kernels.dispatch, "decode_attention", lambda *a, **k: right(*a, **k) * 1.01)
    kernels.run_group(toy(), ["torch"], CPU, 1e10, recorder)
    row = recorder.rows[-1]
    assert row["us"] is None and row["error"] == pytest.approx(0.01, rel=1e-2) and "relative error" in row["reason"]
    assert "speedup" not in row


def test_backends():
    assert kernels.backends(CPU) == ["torch"]
    fast = kernels.backends(torch.device("cuda"))
    assert {"triton", "cuda"} <= set(fast) and not {"auto", "torch"} & set(fast)
    with pytest.raises(ValueError, match="triton"):
        kernels.backends(CPU, ["tritn"])


def test_missing_backend_says_why(recorder, monkeypatch):
    monkeypatch.setenv(kernels.dispatch.VARIABLE, "auto")
    kernels.run_group(toy(), ["cuda", "torch"], CPU, 1e10, recorder)
    _, missing, present = recorder.rows
    assert missing["backend"] == "cuda" and "tensors are on 'cpu'" in missing["reason"]
    assert present["us"] > 0
    assert kernels.os.environ[kernels.dispatch.VARIABLE] == "auto"


# ---------------------------------------------------------------------- encode level


def test_encode_level(recorder):
    encode.run_group(toy(), None, CPU, 1e10, recorder)
    prefill, packed = recorder.rows
    assert prefill["backend"] == "decoder layer" and prefill["ms"] > 0
    assert packed["backend"] == "torch" and packed["error"] == 0.0
    assert packed["share_of_prefill"] == pytest.approx(packed["ms"] / prefill["ms"])


def test_encoder_that_is_wrong_has_no_speed(recorder, monkeypatch):
    def spoil(layer, keys, values):
        for store in layer.tiles:
            store.arrays["codes"][:, :, store.count - 1, :40] ^= 1
        return encode_error(layer, keys, values)

    encode_error = encode.encode_error
    monkeypatch.setattr(encode, "encode_error", spoil)
    made = encode.encode_row(load_preset(PRESET), toy(), 1, 384, CPU, 1e10)
    assert made["ms"] is None and made["error"] > encode.ERROR_BOUND


# ---------------------------------------------------------------------- model level


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


def test_model_with_wrong_attention_has_no_speed(recorder, monkeypatch):
    spoil_packed(monkeypatch, 1.1)
    model.run_group(toy(), CPU, 1e10, 3, recorder)
    dynamic, packed = recorder.rows
    assert dynamic["ms"] > 0
    assert packed["ms"] is None and packed["error"] > 1e-3 and "relative error" in packed["reason"]
    assert "ratio_to_fp16" not in packed


def spoil_packed(monkeypatch, factor: float) -> None:
    """Attention of packed caches on a CPU times `factor`; "sdpa" does not use it."""
    from turboquant_hf.attention import forward

    dense, packed = forward.dense_attention, forward.packed_attention

    def spoiled(*args, **options):
        output = packed(*args, **options)
        return None if output is None else output * factor

    monkeypatch.setattr(forward, "dense_attention", lambda *a, **k: (dense(*a, **k)[0] * factor, None))
    monkeypatch.setattr(forward, "packed_attention", spoiled)


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


@pytest.mark.parametrize(("factor", "passes"), [(1.1, True), (1.07, True), (1.03, False), (None, False)], ids=str)
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


# ---------------------------------------------------------------------- what is written


def test_guard_keeps_the_run_going(tmp_path):
    recorder = Recorder(tmp_path)
    with recorder.guard({"level": "kernel", "backend": "x"}):
        raise torch.OutOfMemoryError("too large\nand more")
    recorder.add({"level": "kernel", "backend": "y", "us": 1.0})
    rows = json.loads((tmp_path / PARTIAL).read_text())
    assert [row.get("reason") for row in rows] == ["OutOfMemoryError: too large", None]
    recorder.finish()
    assert not (tmp_path / PARTIAL).exists()


ROWS = [
    {"level": "kernel", "shape": "toy", "dtype": "float16", "batch": 1, "tokens": tokens, **row}
    for tokens in (4096, 8192)
    for row in (
        {"backend": "sdpa flash", "us": tokens / 100, "floor_us": tokens / 200, "way": "grouped", "error": 1e-3},
        {"backend": "cuda", "preset": "k4v4", "us": tokens / 300, "floor_us": tokens / 800, "speedup": 3.0},
        {"backend": "triton", "preset": "k4v4", "us": None, "reason": "relative | error"},
    )
]


def test_markdown():
    text = table.to_markdown(ROWS, "a card")
    lines = text.splitlines()
    assert lines[0] == "a card" and len([line for line in lines if line.startswith("| toy")]) == 6
    assert "| toy, float16 | 1 x 4,096 | cuda k4v4 | 13.7 | 3.00 |" in text
    assert "triton k4v4 (relative / error) |  |  |" in text
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_plot(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def noted(axis, x, y, *args, **options):
        drawn[options["label"]] = y
        return plot(axis, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    assert plot_level(ROWS, "kernel", tmp_path / "kernel.png")
    assert (tmp_path / "kernel.png").stat().st_size > 5000
    assert drawn.keys() == {"sdpa flash", "k4v4 cuda", "floor, uncompressed (float16)", "floor, k4v4"}
    assert drawn["floor, k4v4"] == (4096 / 800, 8192 / 800)
    assert not plot_level(ROWS, "model", tmp_path / "model.png")


def test_command_line(tmp_path, capsys):
    group = {"shape": "toy", "dtype": "float32", "layers": 1, "cells": [[1, 384]]}
    data = {
        "shapes": {"toy": {name: getattr(TOY, name) for name in list(settings.Shape.__annotations__)[1:]}},
        "cpu": dict.fromkeys(LEVELS, [group]),
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(data))
    output = tmp_path / "run"
    command = ["benchmark", "--settings", str(path), "--preset", PRESET, "--device", "cpu", "--output", str(output)]
    assert cli.main([*command, "--steps", "2"]) == 0
    printed = capsys.readouterr()
    assert "**One decode step" in printed.out and "model toy float32 1 384 DynamicCache" in printed.err
    metrics = json.loads((output / "metrics.json").read_text())
    assert {row["level"] for row in metrics["results"]} == set(LEVELS)
    assert not any(row.get("reason") for row in metrics["results"])
    assert metrics["versions"]["torch"] and metrics["copy_gbps"] > 0 and len(metrics["seconds"]) == len(LEVELS)
    assert {path.name for path in output.iterdir()} == {
        "metrics.json", "config.yaml", "environment.yaml", *(f"{level}.png" for level in LEVELS)
    }  # fmt: skip
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["section"] == "cpu" and config["tool"] == metrics["tool"] == "benchmark"
    assert metrics["recent_windows"] == {PRESET: 0}
    assert cli.main(command) == 2
    assert "finished run" in capsys.readouterr().err


@pytest.mark.gpu
def test_quick_cells_on_a_gpu(tmp_path):
    """Small cells of every level: graphs are captured, SDPA's backends take part, and every check passes."""
    output = tmp_path / "run"
    command = ["benchmark", "--quick", "--shapes", "llama-3.2-1b", "--batch", "1", "--tokens", "4096", "--steps", "4"]
    assert cli.main([*command, "--output", str(output)]) == 0
    rows = json.loads((output / "metrics.json").read_text())["results"]
    packed = [row for row in rows if row.get("preset")]
    assert packed and not [row for row in packed if row.get("reason")]
    assert {row["timing"] for row in rows if row["level"] == "kernel" and row.get("us")} == {"graph"}
    assert any(row.get("backend") == "sdpa flash" and row["us"] for row in rows)
