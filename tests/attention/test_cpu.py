"""Decode steps on a CPU read the packed tiles. No step decodes all tiles to dense tensors."""

from __future__ import annotations

import pytest
import torch

from tests.support.generating import LOGITS, TILES, assert_same, generate, inputs_of, turboquant
from turboquant_hf import TurboQuantCache
from turboquant_hf.attention import packed
from turboquant_hf.cache import TurboQuantLayer


@pytest.fixture
def decoded(monkeypatch):
    """The number of tiles of each call that decodes tiles."""
    counts, held = [], TurboQuantLayer.held

    def counted(layer, *where):
        counts.append(layer.tiles.keys.count)
        return held(layer, *where)

    monkeypatch.setattr(TurboQuantLayer, "held", counted)
    return counts


@pytest.mark.parametrize("padding", [0, 19])
@pytest.mark.parametrize("preset", ["k4v4", "k3v3", "k2v2", "k8v4", "paper-mse-4"])
def test_no_step_decodes_tiles_and_every_token_is_the_same(small_llama, decoded, monkeypatch, preset, padding):
    llama = small_llama(head_dim=16)
    inputs = inputs_of(padding=padding)
    got = generate(llama, inputs, **LOGITS, **turboquant(preset))
    assert not any(decoded), "tiles were decoded"
    monkeypatch.setattr(packed, "_applies", lambda *arguments: False)
    assert_same(got, generate(llama, inputs, **LOGITS, **turboquant(preset)))
    assert any(decoded), "the other way decodes tiles at every step"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("queries", [1, 7])
def test_a_few_tokens_at_once_in_either_dtype(llama, decoded, monkeypatch, dtype, queries):
    model = llama.to(dtype)
    ids = inputs_of(batch=1, length=70)["input_ids"]
    logits = []
    for reads_packed in (True, False):
        if not reads_packed:
            monkeypatch.setattr(packed, "_applies", lambda *arguments: False)
        cache = TurboQuantCache(model.config, preset="k4v4", **TILES)
        model.set_attn_implementation("turboquant")
        with torch.no_grad():
            model(ids[:, :60], use_cache=True, past_key_values=cache)
            logits.append(model(ids[:, 60 : 60 + queries], use_cache=True, past_key_values=cache).logits.float())
        assert any(decoded) != reads_packed
    error = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)
