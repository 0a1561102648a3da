"""Prepared decode steps, the reference in the kernel's place: what was looked up stays true, and is looked up once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turboquant_hf import TurboQuantCache
from turboquant_hf.attention import packed
from turboquant_hf.attention import step as step_module
from turboquant_hf.kernels.decode import RawTokens, reference

OPTIONS = {"tile": 32, "recent_window": 32, "sinks": 4, "min_statistics": 32}
LAYERS, PROMPT, STEPS = 2, 90, 40


class ReferenceStep:
    """`decode.cuda.Step`: arrays with room to spare, and a new token that the call itself writes to the tail."""

    def __init__(self, query, keys, values, sinks, tail, starts, *, masked, **options) -> None:
        self.sides, self.sinks, self.tail, self.starts, self.options = (keys, values), sinks, tail, starts, options
        self.masked = masked

    def __call__(self, query, tiles, tail, mask=None, new=None):
        assert (mask is not None) == self.masked
        if new is not None:
            for array, x in zip((self.tail.keys, self.tail.values), new, strict=True):
                array[:, :, tail - x.shape[2] : tail] = x
        arrays = ("codes", "scale", "mean")
        sides = [
            replace(side, **{name: x[:, :, :tiles] for name in arrays if (x := getattr(side, name)) is not None})
            for side in self.sides
        ]
        recent = RawTokens(self.tail.keys[:, :, :tail], self.tail.values[:, :, :tail])
        return reference.decode_attention(query, *sides, self.sinks, recent, self.starts, mask=mask, **self.options)


@pytest.fixture
def steps(monkeypatch):
    """[how many were prepared, how many taken], counted as a model runs."""
    counts = [0, 0]

    class Counted(ReferenceStep):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            counts[0] += 1

        def __call__(self, *args, **options):
            counts[1] += 1
            return super().__call__(*args, **options)

    monkeypatch.setattr(step_module, "prepared_decode", Counted)
    monkeypatch.setattr(packed, "backend", lambda device: "cuda")
    return counts


def logits_of(model, ids, mask=None, change=lambda cache, number: None):
    """Logits of STEPS single tokens behind a prompt, and the cache."""
    cache = TurboQuantCache(model.config, "k4v4", **OPTIONS)
    mask = torch.ones_like(ids) if mask is None else mask
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


CHANGES = {
    "none": lambda cache, number: None,
    "crop": lambda cache, number: cache.crop(-1) if number in (11, 12, 35) else None,
    "crop-into-tiles": lambda cache, number: cache.crop(40) if number == 30 else None,
    "reorder": lambda cache, number: cache.reorder_cache(torch.tensor([1, 0])) if number == 20 else None,
}


@torch.no_grad()
@pytest.mark.parametrize(("change", "padded"), [(change, change != "crop") for change in CHANGES])
def test_prepared_steps_equal_general_ones(model, ids, steps, change, padded, monkeypatch):
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :37] = 0
    found, cache = logits_of(model, ids, mask, CHANGES[change])
    assert steps[1] > STEPS
    monkeypatch.setattr(step_module, "prepared_decode", lambda *args, **options: None)
    expected, other = logits_of(model, ids, mask, CHANGES[change])
    torch.testing.assert_close(found, expected)
    assert [layer.tiles[0].count for layer in cache.layers] == [layer.tiles[0].count for layer in other.layers]


@torch.no_grad()
def test_a_step_is_prepared_once_for_every_tile(model, ids, steps):
    """Arrays are replaced when a tile is encoded; between that, every layer's step is one call."""
    _, cache = logits_of(model, ids)
    tiles = cache.layers[0].tiles[0].count - (PROMPT - 32) // 32
    assert steps == [LAYERS * (1 + tiles), LAYERS * STEPS]
