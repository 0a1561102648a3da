"""`decode_attention` of Triton: at most twice the error that plain torch makes in the same dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.accuracy import DTYPES, check
from tests.support.cases import (
    CHANNEL_GROUPS,
    PLACES,
    SHAPES,
    attend,
    attention_inputs,
    groups_of,
    moved,
    starting_at,
    with_a_nan,
)  # fmt: skip
from turboquant_hf.kernels.decode import reference


@pytest.fixture
def kernel(device):
    from turboquant_hf.kernels.decode import triton

    return triton.decode_attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_width(kernel, device, bits, dtype):
    groups = groups_of((64, bits))
    check(kernel, device, DTYPES[dtype], attention_inputs(heads=1, keys=groups, values=groups, tiles=2))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("group", "queries"), [(1, 1), (1, 5), (3, 1), (3, 2), (4, 1), (4, 5), (16, 1), (16, 5)], ids=lambda x: str(x)
)
def test_query_heads_and_tokens(kernel, device, group, queries, dtype):
    check(kernel, device, DTYPES[dtype], attention_inputs(heads=1, group=group, queries=queries, tiles=2))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CHANNEL_GROUPS)
def test_channel_groups(kernel, device, case, dtype):
    dim, keys, values = CHANNEL_GROUPS[case]
    check(kernel, device, DTYPES[dtype], attention_inputs(heads=1, dim=dim, keys=keys, values=values, tiles=2))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", SHAPES)
def test_segments_and_layouts(kernel, device, case, dtype):
    check(kernel, device, DTYPES[dtype], attention_inputs(**{"batch": 2, "heads": 1, **SHAPES[case]}))


@pytest.mark.parametrize("queries", [1, 5])
def test_padding_and_holes(kernel, device, queries):
    arguments = attention_inputs(batch=3, heads=1, queries=queries)
    arguments = starting_at(arguments, [0, 37, 95])  # the last one's sinks straddle the tiles' end
    mask = torch.rand(3, 3 * 32 + 21, generator=torch.Generator().manual_seed(1)) > 0.3
    check(kernel, device, torch.float32, arguments)
    check(kernel, device, torch.float32, arguments, options={"mask": mask})


def test_rows_that_see_no_token_are_zero(kernel, device):
    arguments = attention_inputs(batch=2, heads=1)
    mask = torch.ones(2, 3 * 32 + 21, dtype=torch.bool)
    mask[1] = False
    out = attend(kernel, moved(arguments, device, torch.float32), scaling=0.125, mask=mask.to(device))
    assert out[1].abs().max() == 0 and out.isfinite().all()


@pytest.mark.parametrize("place", PLACES)
def test_a_stored_nan_shows_in_the_result(kernel, device, place):
    """A NaN that is stored anywhere for a head shows in everything that the head's queries read."""
    given = with_a_nan(place)
    for decode, where in ((reference.decode_attention, "cpu"), (kernel, device)):
        out = attend(decode, moved(given, where, torch.float32))
        bad = out.isnan().any(dim=-1) if place == "tail.values" else out.isnan().all(dim=-1)
        assert bad[..., 0].tolist() == [[True, True, False, False]] and out[:, 2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_sink_logits(kernel, device, dtype):
    options = {"softcap": 5.0, "s_aux": torch.randn(4, generator=torch.Generator().manual_seed(2))}
    check(kernel, device, DTYPES[dtype], attention_inputs(queries=2), options=options)


@pytest.mark.parametrize("splits", [1, 2, 5, 100])
def test_any_number_of_splits(kernel, device, splits):
    check(kernel, device, torch.float32, attention_inputs(heads=1, tiles=5), sparse={"num_splits": splits})


def test_sparse_values_skip_only_below_the_threshold(kernel, device):
    arguments = attention_inputs(heads=1)
    check(kernel, device, torch.float32, arguments, sparse={"sparse_v_threshold": 1e-12})
    query, history = moved(arguments, device, torch.float32)
    values = history.values
    # Every probability is at most 1: a threshold above it reads no packed value at all.
    nothing = replace(values, codes=torch.zeros_like(values.codes), scale=torch.zeros_like(values.scale))
    skipped = attend(kernel, (query, history), sparse_v_threshold=1.5)
    expected = attend(kernel, (query, replace(history, values=nothing)))
    torch.testing.assert_close(skipped, expected)


def test_the_reference_leaves_out_the_values_of_unlikely_tiles():
    """One of three tiles is far from the queries of one head: its values do not count, and all others do."""
    query, history = attention_inputs(heads=2, group=2, conditioned=False)
    one = query[:, 2:3].clone()  # both query heads of head 1
    query[:, 2:] = one
    history.keys.mean[:, 1, 1] = (-one[:, :, 0] * (14 / (0.125 * one.square().sum()))).half()[0]
    scale = history.values.scale.clone()
    scale[:, 1, 1] = 0
    without = replace(history, values=replace(history.values, scale=scale))
    exact = attend(reference.decode_attention, (query, without))
    found = attend(reference.decode_attention, (query, history), sparse_v_threshold=1e-4)
    torch.testing.assert_close(found, exact)
    dense = attend(reference.decode_attention, (query, history))
    assert not torch.equal(found[:, 2:], dense[:, 2:]) and torch.equal(found[:, :2], dense[:, :2])
