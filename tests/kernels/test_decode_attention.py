"""`decode_attention` of Triton: at most twice the error that plain torch makes in the same dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.cases import PLACES, attend, attention_inputs, groups_of, moved, starting_at, uniform, with_a_nan
from turboquant_hf.kernels.decode import reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def kernel(device):
    from turboquant_hf.kernels.decode import triton

    return triton.decode_attention


def same_dtype_error(arguments, expected, dtype, options) -> float:
    """RMS error of plain torch whose decoded keys, values, rotated queries and probabilities are held in `dtype`."""
    query, held_tokens = arguments
    keys, values, sinks, tail = held_tokens.keys, held_tokens.values, held_tokens.sinks, held_tokens.tail
    batch, query_heads, count, dim = query.shape
    heads = keys.codes.shape[1]
    rows = query.reshape(batch, heads, -1, dim)

    def held(x):
        return x.to(dtype).double()

    k = keys.rotated(False)
    scores = held(keys.rotate_query(rows)) @ held(k).transpose(-1, -2)
    if keys.mean is not None:
        means = rows.double() @ keys.mean.double().transpose(-1, -2)
        scores = scores + means.repeat_interleave(keys.scale.shape[-1], dim=-1)
    raw = torch.cat([sinks.keys, tail.keys], dim=2)
    scores = torch.cat([scores, held(rows) @ held(raw).transpose(-1, -2)], dim=-1).unflatten(2, (-1, count))
    scores = scores * options["scaling"]
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    packed = k.shape[2]
    length = packed + tail.keys.shape[2]
    visible = reference._visible(held_tokens.starts, packed, length, sinks.keys.shape[2], count, options.get("mask"))
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if options.get("s_aux") is not None:
        extra = options["s_aux"].double().reshape(1, heads, -1, 1, 1).expand(batch, -1, -1, count, 1)
        scores = torch.cat([scores, extra], dim=-1)
    p = held(scores.softmax(dim=-1).nan_to_num(0.0).flatten(2, 3))
    values_y = held(values.rotated(True))
    out = values.unrotate((p[..., :packed] @ values_y).float()).double()
    if values.mean is not None:
        out = out + p[..., :packed].unflatten(-1, (values.codes.shape[2], -1)).sum(-1) @ values.mean.double()
    raw_p = p[..., packed : packed + raw.shape[2]]
    out = out + raw_p @ held(torch.cat([sinks.values, tail.values], dim=2))
    out = out.reshape(expected.shape).to(dtype).double()
    return (out - expected).square().mean().sqrt().item()


def check(kernel, device, dtype, arguments, *, options=None, sparse=None):
    options = {"scaling": arguments[0].shape[-1] ** -0.5, **(options or {})}
    cast = moved(arguments, device, dtype)
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out = attend(kernel, cast, **on_device, **(sparse or {}))
    assert out.dtype == dtype and out.shape == arguments[0].shape
    wide = moved(cast, "cpu", torch.float32)
    expected = attend(reference.decode_attention, wide, **options).double()
    error = (out.cpu().double() - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    allowed = 2 * same_dtype_error(wide, expected, dtype, options)
    assert error <= max(allowed, 2e-6 * scale), f"error {error:.3g}, allowed {allowed:.3g}, output {scale:.3g}"


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


CHANNEL_GROUPS = {
    "d80-4-2-1": (80, groups_of((10, 4), (50, 2), (20, 1)), groups_of((80, 3))),
    "d96-5-3": (96, groups_of((48, 5), (48, 3)), groups_of((24, 3), (72, 2))),
    "d128-4-2": (128, groups_of((64, 4), (64, 2)), groups_of((128, 2))),
    "d64-uniform8": (64, groups_of((64, 8), make=uniform), groups_of((32, 4), (32, 4))),
    "d16": (16, groups_of((16, 4)), groups_of((16, 4))),
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CHANNEL_GROUPS)
def test_channel_groups(kernel, device, case, dtype):
    dim, keys, values = CHANNEL_GROUPS[case]
    check(kernel, device, DTYPES[dtype], attention_inputs(heads=1, dim=dim, keys=keys, values=values, tiles=2))


SHAPES = {
    "no-tiles": {"tiles": 0},
    "no-tail": {"tail": 0, "queries": 2},
    "no-sinks": {"sinks": 0},
    "tiles-only": {"tail": 0, "sinks": 0},
    "long-tail": {"tail": 290, "tiles": 1},
    "many-sinks": {"sinks": 40, "tiles": 2},
    "tile-16": {"tile": 16, "tiles": 7},
    "tile-24": {"tile": 24, "tiles": 2},
    "tile-128": {"tile": 128, "tiles": 1, "keys": groups_of((64, 3)), "values": groups_of((64, 3))},
    "strided": {"spare": 3},
    "value-mean": {"value_mean": True},
    "one-byte-scales": {"scale_format": "e4m4"},
    "fine-one-byte-scales": {"scale_format": "e3m5", "conditioned": False},
}


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


def test_rows_that_see_nothing_are_zero(kernel, device):
    arguments = attention_inputs(batch=2, heads=1)
    mask = torch.ones(2, 3 * 32 + 21, dtype=torch.bool)
    mask[1] = False
    out = attend(kernel, moved(arguments, device, torch.float32), scaling=0.125, mask=mask.to(device))
    assert out[1].abs().max() == 0 and out.isfinite().all()


@pytest.mark.parametrize("place", PLACES)
def test_no_number_comes_out_of_what_is_none(kernel, device, place):
    """A NaN stored for a head, wherever it stands, is seen in all that the head's queries read."""
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
    """One tile of three, far from the queries of one head: its values do not count, and everything else does."""
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
