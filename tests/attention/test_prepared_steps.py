"""Prepared decode steps, with the reference as kernel: they stay valid, and are prepared only once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turboquant_hf import TurboQuantCache
from turboquant_hf.attention import packed, step
from turboquant_hf.kernels.decode import History, RawTokens, reference

OPTIONS = {"tile": 32, "recent_window": 32, "sinks": 4, "min_statistics": 32}
LAYERS, PROMPT, STEPS = 2, 90, 40
ARRAYS = ("codes", "scale", "mean")


@pytest.fixture
def steps(monkeypatch):
    """{"prepared": count, "taken": count} while a model runs.

    The reference replaces `decode.cuda.Step`. Its arrays have spare room.
    """
    counts = {"prepared": 0, "taken": 0}

    def prepared_decode(prepared_for, history, scoring, *, masked):
        counts["prepared"] += 1

        def call(query, tiles, length, mask=None):
            counts["taken"] += 1
            assert (mask is not None) == masked
            tail = history.tail
            sides = [
                replace(side, **{name: x[:, :, :tiles] for name in ARRAYS if (x := getattr(side, name)) is not None})
                for side in (history.keys, history.values)
            ]
            recent = RawTokens(tail.keys[:, :, :length], tail.values[:, :, :length])
            filled = History(*sides, history.sinks, recent, history.starts)
            return reference.decode_attention(query, filled, scoring, mask=mask)

        return call

    monkeypatch.setattr(step, "prepared_decode", prepared_decode)
    monkeypatch.setattr(packed, "backend", lambda device: "cuda")
    monkeypatch.setattr(packed, "decode_attention", reference.decode_attention)
    return counts


def logits_of(model, ids, padding=0, change=lambda cache, number: None):
    """Logits of STEPS single tokens behind a prompt whose second row is padded on the left, and the cache."""
    cache = TurboQuantCache(model.config, "k4v4", **OPTIONS)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = {"past_key_values": cache, "logits_to_keep": 1}
    model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], **options)
    found = []
    for number in range(STEPS):
        change(cache, number)
        stop = cache.get_seq_length() + 1
        found.append(model(ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], **options).logits)
    return torch.stack(found), cache


@pytest.fixture
def model(small_llama):
    model = small_llama(head_dim=64)
    model.set_attn_implementation("turboquant")
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 199, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))


def read_fewer_values(cache, number):
    if number == 20:
        for layer in cache.layers:
            layer.preset = replace(layer.preset, sparse_v_threshold=0.9)


CHANGES = {
    "none": lambda cache, number: None,
    "crop": lambda cache, number: cache.crop(-1) if number in (11, 12, 35) else None,
    "crop-into-tiles": lambda cache, number: cache.crop(40) if number == 30 else None,
    "reorder": lambda cache, number: cache.reorder_cache(torch.tensor([1, 0])) if number == 20 else None,
    "sparse-v": read_fewer_values,
}


@torch.no_grad()
@pytest.mark.parametrize(("change", "padding"), [(change, 0 if change == "crop" else 37) for change in CHANGES])
def test_prepared_steps_equal_general_ones(model, ids, steps, change, padding, monkeypatch):
    found, cache = logits_of(model, ids, padding, CHANGES[change])
    assert steps["taken"] > STEPS
    monkeypatch.setattr(step, "prepared_decode", lambda *args, **options: None)
    expected, other = logits_of(model, ids, padding, CHANGES[change])
    torch.testing.assert_close(found, expected)
    assert [layer.tiles[0].count for layer in cache.layers] == [layer.tiles[0].count for layer in other.layers]


@torch.no_grad()
def test_a_step_is_prepared_once_for_every_tile(model, ids, steps):
    """Arrays are replaced when a tile is encoded. Between two encodes, every layer uses one prepared step."""
    _, cache = logits_of(model, ids)
    tiles = cache.layers[0].tiles[0].count - (PROMPT - 32) // 32
    assert steps == {"prepared": LAYERS * (1 + tiles), "taken": LAYERS * STEPS}
