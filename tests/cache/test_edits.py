"""Edits of `layer.keys` and `layer.values` are refused at every length, because they are decoded copies."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import FalconH1Config, LlamaConfig

from turboquant_hf import TurboQuantCache, TurboQuantStaticCache
from turboquant_hf.cache.copies import DecodedCopy

LENGTHS = (5, 200, 700)
CONFIG = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, hidden_size=64)
HYBRID = FalconH1Config(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=32, hidden_size=64)

EDITS = {
    "add_": lambda layer: layer.keys.add_(1),
    "a slice +=": lambda layer: layer.keys[:, :, -1].__iadd__(1),
    "a slice =": lambda layer: layer.values.__setitem__((0, 0, 0), 0.0),
    "<<=": lambda layer: layer.keys.__ilshift__(1),
    "out": lambda layer: torch.add(torch.zeros(32), 1, out=layer.keys[0, 0, 0]),
    "outs": lambda layer: torch.max(torch.zeros(32, 2), 1, out=(layer.keys[0, 0, 0], torch.zeros(32).long())),
    "copy_": lambda layer: layer.values.copy_(torch.zeros(32)),
    "torch.fill_": lambda layer: torch.fill_(layer.keys, 0),
    "initialiser": lambda layer: torch.nn.init.zeros_(layer.keys),
    "foreach": lambda layer: torch._foreach_mul_([layer.keys], 2),
    "inplace by name": lambda layer: F.relu(layer.keys, inplace=True),
    "inplace by position": lambda layer: F.relu(layer.keys, True),
    "module": lambda layer: torch.nn.ReLU(inplace=True)(layer.keys),
    "detached": lambda layer: layer.keys.detach().zero_(),
    "data": lambda layer: layer.keys.data.zero_(),
    "unbound": lambda layer: next(iter(layer.keys)).zero_(),
    "split": lambda layer: layer.values.split(16, -1)[1].zero_(),
    "transposed": lambda layer: layer.values.mT.zero_(),
    "same dtype": lambda layer: layer.values.to(layer.values.dtype).zero_(),
}


def make_layer(kind, tokens):
    if kind == "preallocated":
        cache = TurboQuantStaticCache(CONFIG, max_cache_len=1024)
    else:
        cache = TurboQuantCache(HYBRID if kind == "hybrid" else CONFIG)
    generator = torch.Generator().manual_seed(0)
    cache.update(*torch.randn(2, 1, 2, tokens, 32, generator=generator), 0)
    return cache.layers[0]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", ["growing", "hybrid", "preallocated"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_refused_and_changes_nothing(kind, tokens, edit):
    layer = make_layer(kind, tokens)
    before = layer.keys.clone(), layer.values.clone()
    with pytest.raises(RuntimeError, match=r"decoded copy.*before `cache\.update"):
        EDITS[edit](layer)
    assert torch.equal(layer.keys, before[0]) and torch.equal(layer.values, before[1])


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", ["growing", "hybrid", "preallocated"])
def test_assigning_says_what_to_do(kind, tokens):
    layer = make_layer(kind, tokens)
    for name in ("keys", "values"):
        with pytest.raises(AttributeError, match=rf"`{name}` of a packed cache.*before `cache\.update"):
            setattr(layer, name, torch.zeros(1))
    with pytest.raises(RuntimeError, match="decoded copy"):
        layer.keys += 1


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(
    "read", [lambda x: x.numpy(), lambda x: x[0].numpy(force=True), np.asarray], ids=["all", "view", "as"]
)
def test_arrays_of_numpy_are_read_only(tokens, read):
    layer = make_layer("growing", tokens)
    before, array = layer.keys.clone(), read(layer.keys)
    assert np.array_equal(array.reshape(-1, 32), before.flatten(0, -2).numpy())
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    assert torch.equal(layer.keys, before)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_reading_gives_ordinary_tensors(tokens, inference):
    layer = make_layer("growing", tokens)
    with torch.inference_mode(inference):
        keys, mine = layer.keys, torch.zeros(1, 2, tokens, 32)
        for made in (keys + 1, keys.clone(), keys.float().sum(), torch.cat([keys, keys]), copy.deepcopy(keys)):
            assert type(made) is torch.Tensor
        for view in (keys[0], keys.mT, keys.detach(), keys.chunk(2, -1)[0]):
            assert type(view) is DecodedCopy
        own = keys.clone()
        own[:, :, -1] += 1
        mine.copy_(keys)
        assert torch.equal(mine[:, :, :-1], own[:, :, :-1]) and not torch.equal(mine, own)
        torch.add(keys, 1, out=mine)
        assert torch.equal(mine, keys + 1)
    assert type(pickle.loads(pickle.dumps(keys))) is torch.Tensor


def test_an_empty_layer_has_none():
    layer = TurboQuantCache(CONFIG).layers[0]
    assert layer.keys is None and layer.values is None
