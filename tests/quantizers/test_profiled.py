"""Quantizers with the maps of a profile: what they code, that nothing is learned, and that all readers agree."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.support.profiles import random_maps, random_moment, random_vectors
from turboquant_hf.config import load_preset
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.kernels.decode.cpu import decode_attention
from turboquant_hf.kernels.decode.reference import decode_attention as reference_attention
from turboquant_hf.quantizers import QUANTIZERS
from turboquant_hf.quantizers.profiled import profiled

CPU = torch.device("cpu")
PRESETS = ["k4v4", "k3v3", "k2v2", "k3v3-scalar"]


def quantizers(preset="k4v4", heads=2, dim=64, size=1.0):
    """Keys and values of a preset with random maps for vectors of `size`."""
    maps = random_maps(heads, dim, 0, size), random_maps(heads, dim, 2, size)
    return profiled(load_preset(preset).keys, load_preset(preset).values, maps)


def vectors(seed, heads=2, dim=64, batch=1, size=1.0):
    """Three tiles, [batch, heads, 3, 128, dim], with the moments of `random_maps(heads, dim, seed, size)`."""
    return random_vectors(heads, dim, seed, 384, batch, size).unflatten(2, (3, 128))


def error(quantizer, x, weight):
    """Sum of the errors of x, weighed by `weight` [H, D, D]."""
    state = quantizer.fit(x, torch.ones(len(x), *x.shape[2:4]), None)
    dim = x.shape[-1]
    wrong = (quantizer.decode(quantizer.encode(x, state), state, dim, torch.float32) - x).flatten(2, 3)
    return (wrong @ weight.float() * wrong).sum()


@pytest.mark.parametrize("dim", [64, 80, 96])
@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
def test_coded_groups_have_unit_energy_and_what_is_read_is_what_was_coded(side, dim):
    quantizer, x = quantizers(dim=dim)[side], vectors(2 * side, dim=dim)
    state = quantizer.fit(x, torch.ones(1, *x.shape[2:4]), None)
    forward, inverse = quantizer.transform(state, dim, 2, CPU), quantizer.inverse(state, dim, 2, CPU)
    torch.testing.assert_close(forward @ inverse, torch.eye(dim).expand(1, 2, dim, dim), rtol=0.0, atol=1e-4)
    y = x @ forward.transpose(-1, -2).unsqueeze(2)
    for part in y.split([size for size, _ in quantizer.sizes], dim=-1):
        torch.testing.assert_close(part.square().mean(), torch.tensor(1.0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_error_that_matters_is_less_than_without_maps(preset):
    base, x, queries = load_preset(preset), vectors(0), random_moment(2, 64, 1)
    rms = queries.diagonal(dim1=1, dim2=2).sqrt().float()[None]
    state = base.keys.fit(x, torch.ones(1, *x.shape[2:4]), rms)
    wrong = (base.keys.decode(base.keys.encode(x, state), state, 64, torch.float32) - x).flatten(2, 3)
    plain = (wrong @ queries.float() * wrong).sum()
    assert error(quantizers(preset)[0], x, queries) < 0.9 * plain
    values, weight = vectors(2), random_moment(2, 64, 3)
    assert error(quantizers(preset)[1], values, weight) < 0.9 * error(base.values, values, weight)


def test_nothing_is_learned_from_the_tokens():
    for quantizer in quantizers():
        assert not quantizer.needs_statistics
        states = [
            quantizer.fit(x, torch.ones(2, 3, 128), None) for x in (vectors(0, batch=2), torch.zeros(2, 2, 3, 128, 64))
        ]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(x, states[1][name]) and len(x) == 2 for name, x in states[0].items())


@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_kernels_that_read_packed_tiles_agree_with_decoded_ones(preset, size):
    keys, values = quantizers(preset, size=size)
    x = [vectors(seed, batch=2, size=size) for seed in (0, 2)]
    weight = torch.ones(2, 3, 128)
    states = [q.fit(t, weight, None) for q, t in zip((keys, values), x, strict=True)]
    packed = [q.encode(t, s, weight) for q, t, s in zip((keys, values), x, states, strict=True)]
    dense = [
        q.decode(p, s, 64, torch.float32).flatten(2, 3) for q, p, s in zip((keys, values), packed, states, strict=True)
    ]
    sides = [q.packed_side(p, s, 64) for q, p, s in zip((keys, values), packed, states, strict=True)]
    none = torch.zeros(2, 2, 0, 64)
    tail = torch.randn(2, 2, 1, 64)
    query = torch.randn(2, 6, 1, 64) / size
    history = History(*sides, RawTokens(none, none), RawTokens(tail, tail), torch.zeros(2, dtype=torch.int64))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *(torch.cat([d, tail], dim=2) for d in dense), scale=0.1, enable_gqa=True
    )
    for attend in (reference_attention, decode_attention) if "trellis" not in preset else (reference_attention,):
        torch.testing.assert_close(attend(query, history, Scoring(0.1)), expected, rtol=1e-3, atol=1e-4 * size)


def test_a_copy_and_one_from_another_process_code_alike():
    quantizer, x = quantizers()[0], vectors(0)
    state = quantizer.fit(x, torch.ones(1, 3, 128), None)
    assert copy.deepcopy(quantizer) == quantizer and copy.deepcopy(quantizer).maps is quantizer.maps
    other = pickle.loads(pickle.dumps(quantizer))
    for a, b in zip(quantizer.encode(x, state).values(), other.encode(x, state).values(), strict=True):
        assert torch.equal(a, b)


def test_quantizers_that_have_no_use_for_a_profile_stay_as_they_are():
    maps = random_maps(2, 64), random_maps(2, 64)
    for name in ("kivi", "lossless", "mse", "outlier", "polar"):
        pair = QUANTIZERS[name](), QUANTIZERS["mse"](channel_major=True)
        assert profiled(*pair, maps) == pair
    keyed = QUANTIZERS["conditioned"](balance="key"), QUANTIZERS["mse"]()
    assert profiled(*keyed, maps) == keyed
    keys, values = profiled(QUANTIZERS["conditioned"](), QUANTIZERS["lossless"](), maps)
    assert keys.maps is maps[0] and values == QUANTIZERS["lossless"]()


def test_heads_and_channels_that_the_profile_does_not_have_are_refused():
    keys, _ = quantizers()
    with pytest.raises(ValueError, match="head_dim=32 is not supported; allowed: 64"):
        keys.validate(32, 128)
    with pytest.raises(ValueError, match="4 KV heads are not supported; allowed: 2"):
        keys.encode(vectors(0, heads=4), {})
