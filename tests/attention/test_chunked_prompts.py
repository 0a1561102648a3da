"""Models that read a prompt in chunks: the logits of one pass, without a mask tensor or a dense history."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache

from tests.support.families import available, build, family_named, prompt
from tests.support.generating import TILES
from turboquant_hf import TurboQuantCache
from turboquant_hf.attention import chunk, dense, packed
from turboquant_hf.attention.mask import CausalMask
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.cache.sides import SIDES

CHUNKS = [0, 45, 75, 95, 120, 137]


@pytest.fixture
def seen(monkeypatch):
    """Counts what runs: "layer" and "tensors" (chunks by their source), "mask" (a CausalMask made a tensor), "whole" (a
    layer decoded at once)."""
    counts = dict.fromkeys(("layer", "tensors", "mask", "whole"), 0)

    def counted(name, function):
        def count(*args, **kwargs):
            counts[name] += name != "whole" or len(args) == 2  # called with a layer and a side, without positions
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(packed, "chunk_attention", counted("layer", packed.chunk_attention))
    monkeypatch.setattr(dense, "chunk_attention", counted("tensors", dense.chunk_attention))
    monkeypatch.setattr(CausalMask, "dense", counted("mask", CausalMask.dense))
    monkeypatch.setattr(TurboQuantLayer, "held", counted("whole", TurboQuantLayer.held))
    return counts


def ids_of(padding=0, batch=2):
    ids = torch.randint(3, 199, (batch, CHUNKS[-1]), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, :padding] = ids[-1, :padding] = 0
    return ids, mask


@torch.no_grad()
def by_chunks(model, cache, ids, mask=None, edges=CHUNKS):
    """Logits of all tokens, fed chunk by chunk."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    logits = []
    for start, stop in pairwise(edges):
        masked = {} if mask is None else {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        logits.append(model(ids[:, start:stop], past_key_values=cache, **masked).logits)
    return torch.cat(logits, dim=1)


def compare(got, expected, padding=0):
    for x in (got, expected):
        x[-1, :padding] = 0
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


SIZES = {
    "d8": {},
    "d20": {"head_dim": 20},
    "d64": {"head_dim": 64},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize("given", ["nothing", "ones"])
@pytest.mark.parametrize("offloading", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("sizes", SIZES)
def test_chunks_equal_one_pass(small_llama, seen, monkeypatch, sizes, offloading, given):
    monkeypatch.setattr(chunk, "PIECE_NUMBERS", 1)  # a tile at a time
    model = small_llama(**SIZES[sizes])
    ids, ones = ids_of()
    expected = by_chunks(model, DynamicCache(config=model.config), ids, edges=[0, CHUNKS[-1]])
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache(model.config, "lossless", offloading=offloading, **TILES)
    compare(by_chunks(model, cache, ids, ones if given == "ones" else None), expected)
    layers = len(cache.layers)
    assert seen == {"layer": layers * (len(CHUNKS) - 2), "tensors": 0, "mask": 0, "whole": 2 * layers}


@pytest.mark.parametrize("padding", [3, 19])
def test_padded_batches_keep_their_mask(llama, seen, padding):
    ids, mask = ids_of(padding)
    expected = by_chunks(llama, DynamicCache(config=llama.config), ids, mask, edges=[0, CHUNKS[-1]])
    llama.set_attn_implementation("turboquant")
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    compare(by_chunks(llama, cache, ids, mask), expected, padding)
    assert seen["layer"] == seen["tensors"] == 0
    assert cache.layers[0].sinks.first == [0, padding]


def test_encode_first_attends_without_a_mask(llama, seen):
    ids, _ = ids_of()
    expected = by_chunks(llama, DynamicCache(config=llama.config), ids)
    llama.set_attn_implementation("turboquant")
    cache = TurboQuantCache(llama.config, "lossless", encode_first=True, **{**TILES, "recent_window": 0})
    compare(by_chunks(llama, cache, ids), expected)
    assert seen["tensors"] == 2 * (len(CHUNKS) - 2) and seen["layer"] == seen["mask"] == 0


@pytest.mark.parametrize("newest", [20, 70], ids=["in the tail", "partly in tiles"])
@pytest.mark.parametrize("padding", [0, 3, 40])
@pytest.mark.parametrize("preset", ["k4v4", "k2v2", "int8", "kivi-4", "paper-mse-4", "lossless"])
def test_parts_of_a_layer_are_what_it_decodes_to(small_llama, monkeypatch, preset, padding, newest):
    """If layers share keys, the first layer may have encoded part of the chunk before the others read it."""
    model = small_llama(head_dim=16)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache(model.config, preset, **{**TILES, "tile": 32, "min_statistics": 32})
    ids, mask = ids_of(padding)
    cache.note_padding(mask)
    by_chunks(model, cache, ids, mask)
    monkeypatch.setattr(chunk, "PIECE_NUMBERS", 1)
    layer, start = cache.layers[0], CHUNKS[-1] - newest
    (keys, values), *older = chunk.layer_parts(layer, newest)
    assert len(older) == -(-start // 32)
    for index, newer in enumerate((keys, values)):
        got = torch.cat([*(part[index] for part in older), newer], dim=2)
        torch.testing.assert_close(got, layer.dense(SIDES[index]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["k4v4", "lossless"])
@torch.no_grad()
def test_the_dense_history_is_never_whole_in_memory(llama, monkeypatch, preset):
    """Every position is decoded once per layer and chunk. Each piece is freed before the next one is made."""
    llama.set_attn_implementation("turboquant")
    ids = torch.randint(3, 199, (1, 400), generator=torch.Generator().manual_seed(0))
    cache = TurboQuantCache(llama.config, preset, **TILES)
    llama(ids[:, :360], past_key_values=cache)
    monkeypatch.setattr(chunk, "PIECE_NUMBERS", 2 * 2 * 8 * 48)  # 48 tokens of 2 heads with 8 + 8 channels
    decode, decoded, ranges, alive, most = TurboQuantLayer.decode, TurboQuantLayer.held, [], [], []

    def counting(self, side, start, stop):
        ranges.append((side, start, stop))
        return decode(self, side, start, stop)

    def watching(layer, side, start, stop):  # every call names positions
        dense = decoded(layer, side, start, stop)
        held = [x for x in (reference() for reference in alive) if x is not None]
        most.append(sum(x.shape[2] for x in [*held, dense]))
        alive[:] = [weakref.ref(x) for x in [*held, dense]]
        return dense

    monkeypatch.setattr(TurboQuantLayer, "decode", counting)
    monkeypatch.setattr(TurboQuantLayer, "held", watching)
    layer = cache.layers[0]
    tiles = layer.tiles[0].count
    llama(ids[:, 360:], past_key_values=cache)
    assert 8 * tiles >= 340 and max(most) == 2 * 48, "keys and values of one piece"
    for name in SIDES:
        pieces = [(start, stop) for side, start, stop in ranges if side == name]
        assert pieces == 2 * pieces[: len(pieces) // 2], "both layers alike"
        covered = [tile for start, stop in pieces[: len(pieces) // 2] for tile in range(start, stop)]
        assert covered == list(range(tiles))


def test_the_first_chunk_is_plain_flash(llama, monkeypatch):
    llama.set_attn_implementation("turboquant")
    calls, original = [], functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, is_causal=False, **options):
        calls.append((attn_mask, is_causal, key.shape[2]))
        return original(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    ids, mask = ids_of()
    by_chunks(llama, TurboQuantCache(llama.config, "k4v4", **TILES), ids, mask, edges=[0, 45])
    assert calls == [(None, True, 45)] * 2


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3n", "gpt_oss", "diffllama", "deepseek_v3", "granite", "qwen3_next", "falcon_h1", "gpt2"]
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dynamic"])
def test_families_read_prompts_in_chunks(name, packed):
    """Soft-caps, attention sinks, shared keys, several values per key, latents, recurrent states; dense caches too."""
    family = family_named(name)
    if not available(family):
        pytest.skip(f"this transformers has no {family.kind}")
    model = build(family)
    ids = prompt(family, length=100)["input_ids"]
    edges = [0, 41, 61, 100]
    model.set_attn_implementation("eager")
    expected = by_chunks(model, DynamicCache(config=model.config), ids, edges=edges)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache(model.config, "lossless", **TILES) if packed else DynamicCache(config=model.config)
    compare(by_chunks(model, cache, ids, edges=edges), expected)


def test_a_dynamic_cache_needs_no_mask_tensor(llama, seen):
    ids, ones = ids_of()
    expected = by_chunks(llama, DynamicCache(config=llama.config), ids)
    llama.set_attn_implementation("turboquant")
    compare(by_chunks(llama, DynamicCache(config=llama.config), ids, ones), expected)
    assert seen == {"layer": 0, "tensors": 2 * (len(CHUNKS) - 2), "mask": 0, "whole": 0}


def test_generate_in_chunks_and_a_second_turn(llama, seen):
    ids, mask = ids_of()
    options, chunked = {"max_new_tokens": 12, "do_sample": False}, {"prefill_chunk_size": 20}
    first = llama.generate(input_ids=ids[:, :80], attention_mask=mask[:, :80], **options)
    more = torch.cat([first, ids[:, 80:]], dim=1)
    second = llama.generate(input_ids=more, attention_mask=torch.ones_like(more), **options)
    llama.set_attn_implementation("turboquant")
    cache = TurboQuantCache(llama.config, "lossless", **TILES)
    for inputs, expected, extra in ((ids[:, :80], first, chunked), (more, second, {})):
        ones = torch.ones_like(inputs)
        got = llama.generate(input_ids=inputs, attention_mask=ones, past_key_values=cache, **options, **extra)
        assert torch.equal(got, expected)
    assert seen["layer"] == 2 * (3 + 1) and seen["mask"] == 0
