"""The levels of kernels and of encoding at toy sizes, and that a wrong result has no speed."""

import pytest
import torch

from tests.support.toys import CPU, PRESET, toy
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.benchmark import encode, kernels
from turboquant_hf.evaluation.benchmark.data import Source, packed_layer
from turboquant_hf.evaluation.benchmark.timing import (
    relative_error,
)


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
