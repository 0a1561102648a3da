"""The mask of a chunk behind a history: a `CausalMask`, which is made a tensor only for other readers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from tests.support.attending import by_definition, draw, error
from turboquant_hf.attention import turboquant_mask
from turboquant_hf.attention.mask import CausalMask


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
