"""Whole steps of a preallocated layer by Triton kernels, beside plain torch that asks for its counts."""

from __future__ import annotations

import pytest
import torch

from turboquant_hf.cache import static_due, static_ops
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.config import load_preset

SIZES = {"tile": 16, "recent_window": 16, "sinks": 4, "min_statistics": 32}


@pytest.fixture
def triton_backend(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setenv("TURBOQUANT_BACKEND", "triton")
    return device


def make_layer(preset, new, starts):
    preset = load_preset(preset, **SIZES)
    layer = TurboQuantStaticLayer(preset, *preset.layer_quantizers(0, 1), 112)
    layer.note_padding(starts)
    layer.lazy_initialization(new, new)
    return layer


@pytest.mark.parametrize(
    ("preset", "starts"),
    [("k4v4", [0, 21]), pytest.param("k3v3", [47, 44], marks=pytest.mark.gpu)],
    ids=["padded", "mostly-padding"],
)
def test_steps_of_kernels_equal_plain_torch(triton_backend, monkeypatch, preset, starts):
    device = triton_backend
    generator = torch.Generator().manual_seed(0)
    steps = 52 if device == "cpu" else 68
    keys, values = torch.randn(2, steps, 2, 1, 1, 32, generator=generator)
    queries = torch.randn(steps, 2, 2, 1, 32, generator=generator)
    ours = make_layer(preset, keys[0].to(device), starts)
    monkeypatch.setenv("TURBOQUANT_BACKEND", "torch")
    plain = make_layer(preset, keys[0], starts)
    for n in range(steps):
        results = []
        for layer, backend in ((plain, "torch"), (ours, "triton")):
            monkeypatch.setenv("TURBOQUANT_BACKEND", backend)
            new = [x[n].to(layer.arena.device) for x in (keys, values, queries)]
            static_ops.append(*new[:2], layer.arena, layer.counts, layer.plan_name)
            where = layer.arena, layer.counts, layer.workspace, None, None, 0.2, None, layer.plan_name
            results.append(static_ops.attend(new[2], *where).cpu())
        text = f"step {n}"
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3, msg=lambda why, text=text: text + why)
    assert torch.equal(ours.counts.cpu(), plain.counts) and int(plain.counts[0]) == (steps - 16) // 16
    if device == "cpu":
        assert static_due.open_state(ours.plan_name, ours.arena, ours.counts).__class__ is static_due.DueState
