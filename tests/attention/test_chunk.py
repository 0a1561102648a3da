"""Chunks behind a history: causal attention of the newest tokens, part by part."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.support.attending import by_definition, draw, error
from turboquant_hf.attention import chunk
from turboquant_hf.attention.chunk import attend, chunk_attention, merge, plain_attend, tensor_parts
from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.attention.mask import CausalMask

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
