"""`turboquant_mask`, `CausalMask` and `left_padding` by themselves, against transformers' own mask function."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from turboquant_hf.attention import turboquant_mask
from turboquant_hf.attention.mask import MAX_QUERIES, CausalMask, left_padding


def padding_mask(length, *starts):
    """bool [B, length], False for the positions before each sequence's start."""
    return torch.arange(length) >= torch.tensor(starts)[:, None]


def mask_of(queries, length, padding=None, **options):
    return turboquant_mask(
        2, queries, length, attention_mask=padding, q_offset=length - queries, kv_offset=0, device="cpu", **options
    )


def definition(queries, length, padding=None, rule=causal_mask_function, **options):
    return sdpa_mask(
        batch_size=2, q_length=queries, kv_length=length, q_offset=length - queries, kv_offset=0, mask_function=rule,
        attention_mask=padding, allow_is_causal_skip=False, device="cpu", **options,
    )  # fmt: skip


def test_a_single_query_needs_no_mask_without_padding():
    assert mask_of(1, 40) is None


def test_a_single_query_gets_the_padding_mask_as_a_view():
    padding = padding_mask(40, 0, 7)
    mask = mask_of(1, 40, padding)
    assert mask.shape == (2, 1, 1, 40) and mask.data_ptr() == padding.data_ptr()
    assert torch.equal(mask, definition(1, 40, padding))


@pytest.mark.parametrize("starts", [(0, 0), (0, 7)], ids=["unpadded", "padded"])
@pytest.mark.parametrize("queries", [2, MAX_QUERIES, MAX_QUERIES + 1, 30])
def test_a_chunk_behind_a_history_attends_as_by_definition(queries, starts):
    padding = padding_mask(40, *starts)
    mask = mask_of(queries, 40, padding)
    assert isinstance(mask, CausalMask) == (queries <= MAX_QUERIES or not any(starts))
    assert torch.equal(mask & True, definition(queries, 40, padding).expand(2, -1, -1, -1))


def test_a_whole_prompt_and_other_rules_are_left_to_transformers():
    for queries, options in ((40, {}), (5, {"allow_is_causal_skip": False})):
        assert not isinstance(mask_of(queries, 40, padding_mask(40, 0, 7), **options), CausalMask)
    window = sliding_window_causal_mask_function(8)
    mask = mask_of(5, 40, padding_mask(40, 0, 7), mask_function=window, local_size=8)
    assert not isinstance(mask, CausalMask)
    assert torch.equal(mask, definition(5, 40, padding_mask(40, 0, 7), window, local_size=8))


def test_a_causal_mask_holds_no_memory_until_it_is_read():
    mask = CausalMask(3, 4, 10, "cpu")
    assert mask.shape == (3, 1, 4, 10) and mask.dtype == torch.bool and mask._dense is None
    assert mask.sum() == 3 * (7 + 8 + 9 + 10) and mask._dense is not None
    assert "CausalMask" in repr(mask)


def test_a_moved_causal_mask_stays_one():
    moved = CausalMask(2, 4, 10, "cpu", padding_mask(10, 0, 3)).to("meta")
    assert isinstance(moved, CausalMask) and moved.device.type == moved.keys.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16], ids=str)
def test_left_padding_is_what_no_query_sees(dtype):
    mask = definition(5, 20, padding_mask(20, 0, 7))
    mask[1, :, :, 12] = False  # a hole is no padding
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    assert left_padding(mask).tolist() == [0, 7]


def test_positions_hidden_from_the_newest_queries_alone_are_no_padding():
    mask = torch.ones(1, 1, 5, 20, dtype=torch.bool)
    mask[:, :, 2:, :9] = False
    assert left_padding(mask).tolist() == [0]
    assert left_padding(CausalMask(2, 4, 10, "cpu")).tolist() == [0]
