"""Caches in other people's code: autocast, inference mode, masks, flash attention, state of earlier calls."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    StaticCache,
)
from transformers.masking_utils import flash_attention_mask

from tests.support.generating import generate, turboquant
from tests.support.presets import KINDS, ROOM
from turboquant_hf.config import preset_names


@pytest.fixture(params=KINDS)
def make_cache(request):
    return KINDS[request.param]


@pytest.fixture(params=["sdpa", "turboquant"])
def model(request, llama):
    llama.set_attn_implementation(request.param)
    return llama


@pytest.fixture
def ids():
    return torch.randint(3, 199, (2, 60), generator=torch.Generator().manual_seed(0))


def test_autocast(model, ids, make_cache):
    """Rotary embeddings leave keys in float32 while values are narrow. Both are read narrow, as by SDPA."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, ids)
        cache = make_cache(model.config)
        assert torch.equal(generate(model, ids, cache), expected)
    assert cache.packed_layers[0].dtype == torch.bfloat16


@torch.no_grad()
def test_a_prompt_read_in_inference_mode_is_continued_outside(model, ids):
    """Continued at once, after a change of the batch, and after a crop; also in the opposite order of modes."""
    expected = generate(model, ids)
    for change in (lambda cache: None, lambda cache: cache.reorder_cache(torch.tensor([0, 1])), lambda c: c.crop(-1)):
        for make in KINDS.values():
            cache = make(model.config)
            with torch.inference_mode():
                model(ids[:, :40], past_key_values=cache)
                model(ids[:, 40:50], past_key_values=cache)
            change(cache)
            assert torch.equal(generate(model, ids, cache), expected)
            with torch.inference_mode():
                model(expected[:, -1:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_the_newest_queries_do_not_see_is_not_padding(llama, ids, make):
    """The user's mask hides the oldest positions from the newest queries of a prompt. Later queries see them."""
    mask = torch.ones(60, 60, dtype=torch.bool).tril()[None, None].clone()
    mask[:, :, -9:, :15] = False
    room = torch.arange(ROOM)[None, None, None] < torch.arange(61, 64)[:, None, None, None, None]

    def run(cache, width):
        out = []
        llama(ids, attention_mask=mask, past_key_values=cache, position_ids=torch.arange(60)[None])
        for step in range(3):
            seen = room[step][..., : width or 61 + step].expand(2, -1, -1, -1)
            positions = torch.tensor([[60 + step]])
            token = ids[:, step : step + 1]
            out.append(llama(token, attention_mask=seen, past_key_values=cache, position_ids=positions).logits)
        return torch.cat(out, dim=1)

    expected = run(DynamicCache(config=llama.config), None)
    llama.set_attn_implementation("turboquant")
    cache = make(llama.config)
    torch.testing.assert_close(run(cache, ROOM if isinstance(cache, StaticCache) else None), expected)
    layer = cache.packed_layers[0]
    assert layer.sinks.first == [0, 0]


@pytest.fixture
def flash(llama):
    """Attention with flash's rule: causal, aligned to the newest token; a mask [B, T] leaves tokens out."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x if isinstance(x, torch.Tensor) else x.dense() for x in (key, value))
        if attention_mask is not None:
            kept = attention_mask[0].bool().nonzero()[:, 0]
            key, value = key[:, :, kept], value[:, :, kept]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("flash_test", attend)
    AttentionMaskInterface.register("flash_test", flash_attention_mask)
    llama.config._attn_implementation_internal = "flash_test"
    return llama


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["turboquant", "turboquant_static"])
def test_flash_attention_sees_no_empty_slots(flash, ids, name, options):
    expected = generate(flash, ids, **options)
    static = name == "turboquant_static"
    if static and not torch.equal(generate(flash, ids, cache_implementation="static", **options), expected):
        pytest.skip("this transformers' own static cache does not serve a flash attention like this one")
    assert torch.equal(generate(flash, ids, **turboquant(static=static), **options), expected)


def test_padding_is_forgotten_with_the_tokens(model, ids, make_cache):
    """After a reset, or after a failed first call, a cache has no padding of the earlier batch."""
    mask = torch.ones_like(ids)
    mask[0, :22] = 0
    padded, broken = ({"input_ids": x, "attention_mask": mask} for x in (ids, torch.full_like(ids, 999)))
    expected = [generate(model, ids, make_cache(model.config, "k8v4"), new=n) for n in (24, 21)]
    cache = make_cache(model.config, "k8v4")
    generate(model, padded, cache)
    cache.crop(-int(cache.get_seq_length()))
    assert torch.equal(generate(model, ids, cache), expected[0])
    cache.reset()
    with pytest.raises(IndexError):
        generate(model, broken, cache)
    assert torch.equal(generate(model, ids, cache, new=21), expected[1])
    cache.reset()
    with pytest.raises(IndexError):
        generate(model, broken, cache)
    assert torch.equal(generate(model, ids[:1], cache), generate(model, ids[:1], make_cache(model.config, "k8v4")))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_static_cache_in_another_process(model, ids, copied, monkeypatch):
    """The tokens that name layers are valid in one process only."""
    from turboquant_hf.cache import traced

    cache = KINDS["static"](model.config)
    first = generate(model, ids, cache, new=5)
    for name in list(traced._LAYERS):
        monkeypatch.delitem(traced._LAYERS, name)
    other = copied(cache)
    assert all(traced.layer_of(layer.number) is layer for layer in other.packed_layers)
    expected = generate(model, first)
    assert torch.equal(generate(model, first, other), expected)


@torch.no_grad()
def test_no_step_outlives_the_arrays_it_reads(llama, ids):
    """A prepared step would keep a second copy of a layer's tiles alive."""
    llama.set_attn_implementation("turboquant")
    cache = KINDS["growing"](llama.config, "k4v4")
    llama(ids, past_key_values=cache)
    layer = cache.packed_layers[0]
    for change in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0, 1])),
        lambda: layer.offload(),
        lambda: [layer.update(*(torch.randn(2, 2, 8, 8) for _ in range(2))), layer.commit()],
    ):
        layer.step = object()
        change()
        assert layer.step is None


@pytest.mark.slow
def test_torchs_default_dtype_changes_nothing(tmp_path):
    root = Path(__file__).parents[2]
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-m", "tests.support.presets", dtype, str(tmp_path / dtype)]
        subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    plain, other = (torch.load(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert plain.keys() == other.keys() and len(plain) > len(preset_names())
    assert [name for name in plain if not torch.equal(plain[name], other[name])] == []
