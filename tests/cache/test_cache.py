"""`TurboQuantCache`: what it packs, its options, and that other code can use it as a DynamicCache."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, LlamaConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from turboquant_hf import CachePreset, TurboQuantCache, TurboQuantStaticCache
from turboquant_hf.cache import PackedHandle, TurboQuantLayer


def make_config(kind=LlamaConfig, **options):
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return kind(**{**sizes, **options})


def test_every_full_layer_is_packed_and_sliding_ones_are_left():
    cache = TurboQuantCache(make_config(Gemma2Config))
    assert isinstance(cache, DynamicCache) and not cache.is_compileable
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, TurboQuantLayer] * 3
    assert cache.packed_layers == cache.layers[1::2]


def test_every_field_is_an_override():
    cache = TurboQuantCache(make_config(), preset="k4v2", recent_window=0, sinks=7, tile=64, boundary_layers=2)
    assert (cache.preset.recent_window, cache.preset.sinks, cache.preset.tile) == (0, 7, 64)
    assert [layer.quantizers[1].bits for layer in cache.layers] == [8, 8, 2, 2, 8, 8]


def test_boundary_layers_count_packed_layers():
    cache = TurboQuantCache(make_config(Gemma2Config), preset="k4v2", boundary_layers=1)
    assert [layer.quantizers[1].bits for layer in cache.packed_layers] == [8, 2, 8]


def test_layers_are_overridden_by_ordinal():
    layers = {1: {"keys": "lossless"}, -1: {"values": {"quantizer": "mse", "bits": 3}}}
    cache = TurboQuantCache(make_config(), boundary_layers=1, layers=layers)
    assert [layer.quantizers[0].name for layer in cache.layers][:3] == ["conditioned", "lossless", "conditioned"]
    assert cache.layers[0].quantizers[1].bits == 8 and cache.layers[-1].quantizers[1].bits == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"preset": "k9v9"}, ("k9v9", "allowed", "k4v4")),
        ({"recent": 3}, ("recent", "allowed", "recent_window")),
        ({"tile": 12}, ("tile=12", "multiples of 8")),
        ({"recent_window": -1}, ("recent_window=-1", "whole numbers from 0")),
        ({"keys": "polar", "preset": "k4v4"}, ("polar", "head_dim=20", "multiples of 16")),
    ],
    ids=str,
)
def test_bad_options_are_named(arguments, parts):
    with pytest.raises(ValueError) as error:
        TurboQuantCache(make_config(head_dim=20), **arguments)
    for part in parts:
        assert part in str(error.value)


def test_a_model_instead_of_its_config_is_named(llama):
    with pytest.raises(ValueError, match="model.config"):
        TurboQuantCache(llama)


def test_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("keys: lossless\nvalues: {quantizer: mse, bits: 2}\ntile: 32\n")
    cache = TurboQuantCache.from_yaml(path, make_config(), sinks=1)
    assert (cache.preset.name, cache.preset.tile, cache.preset.sinks) == ("mine", 32, 1)


def feed(cache, tokens, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    for index in range(len(cache.layers)):
        cache.update(*(torch.randn(batch, 2, tokens, 16, generator=generator) for _ in range(2)), index)
    return cache


def dense(cache):
    return [x.clone() for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("preset", ["lossless", "k4v4"])
def test_deepcopy_and_pickle_are_independent(preset):
    cache = feed(TurboQuantCache(make_config(), preset, tile=16, recent_window=8, min_statistics=16), 100)
    before = dense(cache)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        feed(twin, 60, seed=1)
        twin.crop(-90)
        feed(twin, 30, seed=2)
        assert twin.get_seq_length() == 100
    assert all(torch.equal(a, b) for a, b in zip(before, dense(cache), strict=True))


def test_a_copy_sees_the_attention_of_the_live_model(llama):
    cache = copy.deepcopy(TurboQuantCache(llama.config, "lossless"))
    keys = torch.randn(1, 2, 3, 8)
    assert not isinstance(cache.update(keys, keys, 0)[0], PackedHandle)
    llama.set_attn_implementation("turboquant")
    assert isinstance(cache.update(keys, keys, 0)[0], PackedHandle)
    llama.set_attn_implementation("eager")
    assert not isinstance(cache.update(keys, keys, 0)[0], PackedHandle)


def test_iteration_gives_dense_tensors():
    cache = feed(TurboQuantCache(make_config(), "lossless", tile=8, recent_window=0), 50)
    reference = feed(DynamicCache(config=make_config()), 50)
    for got, expected in zip(cache, reference, strict=True):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 2])),
        lambda cache: cache.crop(-33),
    ],
    ids=["reorder", "repeat", "select", "crop"],
)
def test_operations_equal_those_of_dynamic_cache(operation):
    cache = feed(TurboQuantCache(make_config(), "lossless", tile=8, recent_window=8), 50, batch=3)
    reference = feed(DynamicCache(config=make_config()), 50, batch=3)
    for x in (cache, reference):
        operation(x)
    assert cache.get_seq_length() == reference.get_seq_length()
    for got, expected in zip(cache, reference, strict=True):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_early_initialization():
    cache = TurboQuantCache(make_config(), "lossless")
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    assert feed(cache, 20, batch=2).get_seq_length() == 20


def test_note_padding_takes_a_mask_of_left_padding():
    cache = TurboQuantCache(make_config(), "lossless")
    cache.note_padding(torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]]))
    feed(cache, 4, batch=3)
    assert cache.layers[0].sinks.first == [0, 2, 1]
    cache.note_padding(torch.zeros(3, 4))
    assert cache.layers[0].sinks.first == [0, 2, 1], "too late"


def test_repr_says_what_is_held():
    cache = feed(TurboQuantCache(make_config(), "k4v4"), 50)
    for part in ("k4v4", "tokens=50", "6 packed", f"{cache.nbytes:,}"):
        assert part in repr(cache)
    assert "tokens=50" in repr(cache.layers[0])


def test_a_preset_object_serves_as_it_is():
    preset = CachePreset(name="mine", keys="lossless", values="lossless")
    assert TurboQuantCache(make_config(), preset).preset is preset


@pytest.mark.parametrize("make", [TurboQuantCache, partial(TurboQuantStaticCache, max_cache_len=64)])
def test_an_override_of_a_layer_that_is_not_there_is_named(llama, make):
    for index in (2, -3):
        with pytest.raises(ValueError, match=f"layers: {index} is not supported; allowed: the 2 KV layers"):
            make(llama.config, layers={index: {"values": "lossless"}})
    make(llama.config, layers={1: {"values": "lossless"}, -2: {"values": "lossless"}})
