"""Chunks behind a history: causal attention of the newest tokens without a mask tensor or a dense history."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from tests.support.families import FAMILIES, available, build, prompt
from tests.support.generating import TILES
from turboquant_hf import TurboQuantCache
from turboquant_hf.attention import chunk, dense, packed, turboquant_mask
from turboquant_hf.attention.chunk import attend, chunk_attention, merge, plain_attend, tensor_parts
from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.attention.mask import CausalMask
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.cache.sides import SIDES

CHUNKS = [0, 45, 75, 95, 120, 137]


def draw(queries, tokens, heads=(4, 2), dims=(16, 16), dtype=torch.float32, device="cpu", seed=0):
    """query [2, Hq, queries, D], key [2, H, tokens, D], value [2, H, tokens, Dv]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads[0], queries, dims[0]), (heads[1], tokens, dims[0]), (heads[1], tokens, dims[1])
    return [torch.randn(2, *shape, generator=generator).to(device, dtype) for shape in shapes]


def by_definition(query, key, value, scaling, causal):
    """Output and log-sum-exp in float64, aligned to the newest key."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)


def error(got, expected):
    """Relative RMS error."""
    return ((got.double() - expected).norm() / expected.norm()).item()


DIMS = [(8, 8), (20, 20), (9, 9), (24, 16), (16, 24), (64, 64), (128, 128), (256, 256)]
WITHIN = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_attend(device, dtype, dims, heads, causal):
    tensors = draw(37, 37 if causal else 61, heads, dims, dtype, device)
    expected = by_definition(*tensors, 0.3, causal)
    for function in (attend, plain_attend):
        output, lse = function(*tensors, 0.3, causal)
        assert output.dtype == dtype and lse.dtype == torch.float32
        assert output.shape == (2, heads[0], 37, dims[1]) and lse.shape == (2, heads[0], 37)
        assert error(output, expected[0]) < WITHIN[dtype] and error(lse, expected[1]) < 1e-3


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_plain_torch_takes_some_queries_at_a_time(monkeypatch, causal):
    tensors = draw(37, 37)
    whole = plain_attend(*tensors, 0.3, causal)
    monkeypatch.setattr(chunk, "BLOCK_SCORES", 2 * 4 * 37 * 5)
    for got, expected in zip(plain_attend(*tensors, 0.3, causal), whole, strict=True):
        torch.testing.assert_close(got, expected)


def test_users_may_turn_flash_off():
    tensors = draw(20, 20)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got = attend(*tensors, 0.3, True)
    for x, expected in zip(got, plain_attend(*tensors, 0.3, True), strict=True):
        assert torch.equal(x, expected)


@pytest.mark.parametrize("history", [0, 1, 63, 200])
@pytest.mark.parametrize("cuts", [(), (17,), (1, 2, 60)], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_attention_over_parts_equals_attention_over_the_whole(device, history, cuts):
    query, key, value = draw(33, history + 33, device=device)
    edges = [0, *(cut for cut in cuts if cut < history), history]
    parts = [(key[:, :, history:], value[:, :, history:])]
    parts += [(key[:, :, a:b], value[:, :, a:b]) for a, b in pairwise(edges) if a < b]
    expected = by_definition(query, key, value, 16**-0.5, True)[0].transpose(1, 2)
    assert error(chunk_attention(query, iter(parts)), expected) < 1e-5
    assert error(chunk_attention(query, tensor_parts(33, key, value)), expected) < 1e-5


@pytest.mark.parametrize("distance", [-100.0, -20.0, 0.0, 20.0, 100.0])
def test_merging_parts_of_any_weight(distance):
    query, key, value = draw(5, 40)
    key[:, :, :20, 0] += distance
    query[..., 0] = 1.0
    parts = [plain_attend(query, key[:, :, a:b], value[:, :, a:b], 1.0, False) for a, b in ((0, 20), (20, 40))]
    got = merge(*parts[0], *parts[1])
    for x, expected in zip(got, by_definition(query, key, value, 1.0, False), strict=True):
        assert error(x, expected) < 1e-5


@pytest.mark.parametrize("where", [3, 50], ids=["history", "chunk"])
@pytest.mark.parametrize("side", [1, 2], ids=["key", "value"])
def test_a_nan_reaches_every_query_that_sees_it(where, side):
    tensors = draw(20, 60, heads=(2, 2))
    tensors[side][0, 0, where] = torch.nan
    output = chunk_attention(tensors[0], tensor_parts(20, *tensors[1:])).transpose(1, 2)
    assert output[0, 0, max(where - 40, 0) :].isnan().all()
    assert not output[1].isnan().any() and not output[0, 1].isnan().any()
    assert side == 2 or not output[0, 0, : max(where - 40, 0)].isnan().any()


# ---------------------------------------------------------------------- the mask


def mask_of(q_length, kv_length, q_offset, attention_mask=None, function=turboquant_mask, **options):
    options = {"kv_offset": 0, "mask_function": causal_mask_function, "device": "cpu", **options}
    sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    return function(batch_size=2, attention_mask=attention_mask, **sizes, **options)


ONES = torch.ones(2, 60, dtype=torch.bool)


def hidden(column):
    mask = ONES.clone()
    mask[1, column] = False
    return mask


@pytest.mark.parametrize("padding", [None, ONES, torch.ones(2, 70, dtype=torch.bool)], ids=["none", "ones", "wider"])
def test_a_chunk_of_a_growing_cache_gets_no_mask_tensor(padding):
    mask = mask_of(20, 60, 40, padding)
    assert type(mask) is CausalMask and mask.shape == (2, 1, 20, 60) and mask.dtype == torch.bool
    assert mask._dense is None
    assert torch.equal(mask.dense(), sdpa_mask(2, 20, 60, q_offset=40).expand(2, -1, -1, -1))


@pytest.mark.parametrize("padding", [None, ONES, hidden(0), hidden(31)], ids=["none", "ones", "left", "hole"])
@pytest.mark.parametrize("queries", [2, 16])
def test_a_few_queries_of_a_growing_cache_get_no_mask_tensor_whatever_is_padding(queries, padding):
    mask = mask_of(queries, 60, 60 - queries, padding)
    assert type(mask) is CausalMask and mask.keys is None or torch.equal(mask.keys, padding)
    expected = mask_of(queries, 60, 60 - queries, padding, function=sdpa_mask)
    assert torch.equal(mask.dense(), expected.expand(2, -1, -1, -1))


REFUSED = {
    "left padding": {"attention_mask": hidden(0)},
    "a hole": {"attention_mask": hidden(31)},
    "a mask that says nothing of the newest": {"attention_mask": ONES[:, :50]},
    "the first chunk": {"kv_length": 20, "q_offset": 0},
    "a padded first chunk": {"kv_length": 20, "q_offset": 0, "attention_mask": hidden(0)[:, :20]},
    "an empty static cache": {"q_offset": 0},
    "a filled static cache": {"q_offset": torch.tensor(20)},
    "a full static cache": {"q_offset": torch.tensor(40)},
    "free slots": {"q_offset": 30},
    "a sliding window": {"local_size": 16, "mask_function": sliding_window_causal_mask_function(16)},
    "keys that begin later": {"kv_offset": 3, "q_offset": 43},
    "a model that needs the tensor": {"allow_is_causal_skip": False},
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_other_masks_are_those_of_sdpa(case):
    options = {"q_length": 20, "kv_length": 60, "q_offset": 40, **REFUSED[case]}
    got, expected = mask_of(**options), mask_of(**options, function=sdpa_mask)
    assert type(got) is type(expected)
    assert got is None or torch.equal(got, expected)


def test_other_readers_of_the_mask_get_a_tensor_that_is_made_once():
    mask = CausalMask(2, 5, 9, "cpu")
    expected = torch.ones(5, 9, dtype=torch.bool).tril(4).expand(2, 1, 5, 9)
    assert torch.equal(mask[:, :, 1:, :7], expected[:, :, 1:, :7]) and type(mask[:, :, :1]) is torch.Tensor
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(expected, 0.0, -1.0))
    assert torch.equal(mask.to(torch.float32), expected.float()) and torch.equal(~mask, ~expected)
    assert mask.dense() is mask.dense() and isinstance(mask, torch.Tensor)
    query, key, value = draw(5, 9)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert error(attended, by_definition(query, key, value, 16**-0.5, True)[0]) < 1e-5


def test_the_mask_moves_to_another_device_as_it_is():
    mask = CausalMask(2, 5, 9, "cpu")
    moved = mask.to("meta", non_blocking=True)
    assert type(moved) is CausalMask and moved.device.type == "meta" and moved.shape == mask.shape
    assert mask._dense is None and mask.to("cpu") is mask


# ---------------------------------------------------------------------- models


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
    family = next(family for family in FAMILIES if family.name == name)
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


@pytest.mark.parametrize("history", [0, 40])
def test_gradients_take_the_mask(history):
    """The log-sum-exp of fused kernels has no gradient, so tensors with gradients use SDPA with a mask."""
    tensors = [x.requires_grad_() for x in draw(20, history + 20)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    output, _ = dense_attention(module, *tensors, CausalMask(2, 20, history + 20, "cpu"))
    expected = by_definition(*tensors, 16**-0.5, True)[0].transpose(1, 2)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((output * weight).sum(), tensors)
    for x, y in zip(got, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
