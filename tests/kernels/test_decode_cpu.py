"""`decode_attention` for a CPU against the reference, which decodes every tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.accuracy import DTYPES
from tests.support.cases import (
    CHANNEL_GROUPS,
    PLACES,
    SHAPES,
    attend,
    attention_inputs,
    groups_of,
    in_buffers,
    moved,
    starting_at,
    uniform,
    with_a_nan,
)  # fmt: skip
from turboquant_hf.config import load_preset
from turboquant_hf.kernels import dispatch
from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.decode import cpu, reference
from turboquant_hf.primitives import Trellis, grid, lloyd_max, trellis_code

PRESETS = ["k8v4", "k4v4", "k3v3", "k2v2", "k4v4-scalar", "k3v3-scalar", "k2v2-scalar", "paper-mse-4", "paper-3.5"]


def check(arguments, dtype=torch.float32, **options):
    """Both versions compute in float32. They differ by its rounding, and by one rounding of the output to `dtype`."""
    arguments = moved(arguments, "cpu", dtype)
    options = {"scaling": arguments[0].shape[-1] ** -0.5, **options}
    out = attend(cpu.decode_attention, arguments, **options)
    expected = attend(reference.decode_attention, arguments, **options)
    assert out.dtype == dtype and out.shape == expected.shape and expected.isfinite().all()
    error = (out.double() - expected.double()).square().mean().sqrt()
    scale = expected.double().square().mean().sqrt()
    assert error <= (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps) * scale, f"{error / scale:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [grid, uniform], ids=["grid", "uniform"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_width(bits, make, dtype):
    groups = groups_of((64, bits), make=make)
    check(attention_inputs(keys=groups, values=groups, tiles=2), DTYPES[dtype])


@pytest.mark.parametrize("size", [16, 48, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_words_beside_rows(bits, size):
    words = groups_of((size, bits), make=trellis_code)
    keys = (*groups_of((24, 3)), *words, *groups_of((16, 8), (32, 2)))
    check(attention_inputs(dim=size + 72, keys=keys, values=(*words, *groups_of((72, 5))), tile=96, tiles=3))


def test_wider_words_are_refused():
    groups = (CodeGroup(16, Trellis(tuple(lloyd_max(7).levels), "wide")),)
    with pytest.raises(ValueError, match="words of 32 codes of 6 bits are not supported"):
        check(attention_inputs(dim=16, keys=groups, values=groups, tile=32))


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, dim):
    loaded = load_preset(preset)
    sides = {"keys": loaded.keys.groups(dim, 128), "values": loaded.values.groups(dim, 128)}
    check(attention_inputs(heads=1, dim=dim, tile=128, tiles=2, scale_format="e4m4", **sides), torch.bfloat16)


@pytest.mark.parametrize("case", CHANNEL_GROUPS)
def test_channel_groups(case):
    dim, keys, values = CHANNEL_GROUPS[case]
    check(attention_inputs(dim=dim, keys=keys, values=values, tiles=2))


@pytest.mark.parametrize("case", SHAPES)
def test_segments_and_layouts(case):
    check(attention_inputs(**{"batch": 2, **SHAPES[case]}))


@pytest.mark.parametrize("queries", [1, 2, 16])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_query_heads_and_tokens(group, queries):
    check(attention_inputs(heads=3, group=group, queries=queries))


@pytest.mark.parametrize("block", [1, 3 * 32 * 64, 1 << 30])
def test_blocks_of_any_size(block, monkeypatch):
    """One tile of all heads at a time, several with a remainder, and all at once."""
    monkeypatch.setattr(cpu, "BLOCK", block)
    check(attention_inputs(heads=1, tiles=8, keys=groups_of((32, 5), (32, 3)), value_mean=True))


@pytest.mark.parametrize("starts", [[0, 37, 95], [50, 50, 50], [94, 94, 94], [110, 110, 110]], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_padding_and_holes(queries, starts):
    arguments = starting_at(attention_inputs(batch=3, queries=queries), starts)  # tiles end at 96
    check(arguments)
    check(arguments, mask=torch.rand(3, 3 * 32 + 21, generator=torch.Generator().manual_seed(1)) > 0.3)


def test_rows_that_see_no_token_are_zero():
    arguments = attention_inputs(batch=2)
    mask = torch.ones(2, 3 * 32 + 21, dtype=torch.bool)
    mask[1] = False
    check(arguments, mask=mask)
    out = attend(cpu.decode_attention, arguments, scaling=0.125, mask=mask)
    assert out[1].abs().max() == 0
    beyond = starting_at(arguments, [3 * 32 + 21] * 2)
    assert attend(cpu.decode_attention, beyond, scaling=0.125).abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_sink_logits(dtype):
    s_aux = torch.randn(4, generator=torch.Generator().manual_seed(2))
    check(attention_inputs(queries=2), DTYPES[dtype], softcap=5.0, s_aux=s_aux)
    check(attention_inputs(), DTYPES[dtype], s_aux=s_aux)


def test_sink_logits_take_all_probability_of_a_row_that_sees_no_token():
    arguments = attention_inputs(heads=1)
    mask = torch.zeros(1, 3 * 32 + 21, dtype=torch.bool)
    assert attend(cpu.decode_attention, arguments, scaling=0.125, mask=mask, s_aux=torch.ones(2)).abs().max() == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_stored_nan_shows_in_the_result(place):
    """A NaN that is stored for a head shows in everything that the head's queries read, and in no other head."""
    given = with_a_nan(place)
    out = attend(cpu.decode_attention, given, scaling=0.125)
    expected = attend(reference.decode_attention, given, scaling=0.125)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out[:, :2].isnan().any() and out[:, 2:].isfinite().all()


@pytest.mark.parametrize("threshold", [1e-12, 3e-3, 1.5])
@pytest.mark.parametrize("queries", [1, 4])
def test_sparse_values(threshold, queries):
    arguments = attention_inputs(tiles=6, queries=queries)
    arguments[0].mul_(4)  # peaks, so that some tiles are likely and some are not
    check(arguments, sparse_v_threshold=threshold)


@pytest.mark.parametrize("queries", [1, 5])
def test_buffers_of_fixed_size(queries):
    arguments = attention_inputs(tiles=2, tail=60, queries=queries)
    out = attend(cpu.decode_attention, in_buffers(arguments, 5), scaling=0.125)
    torch.testing.assert_close(out, attend(reference.decode_attention, arguments, scaling=0.125))


@pytest.mark.parametrize("offset", [1, 2, 4, 6])
def test_codes_at_any_byte_of_a_larger_buffer(offset):
    """A view may start at any byte, so reads of larger words must not assume alignment."""
    query, history = attention_inputs(keys=groups_of((32, 5), (32, 3)))
    keys = history.keys
    buffer = torch.zeros(keys.codes.numel() + offset, dtype=torch.uint8)
    codes = buffer[offset:].view(keys.codes.shape).copy_(keys.codes)
    check((query, replace(history, keys=replace(keys, codes=codes))))


def test_autocast_and_gradients_change_nothing():
    query, history = attention_inputs()
    s_aux = torch.zeros(4)
    expected = attend(cpu.decode_attention, (query, history), s_aux=s_aux)
    with torch.autocast("cpu", torch.bfloat16):
        given = query.requires_grad_(), history
        out = attend(cpu.decode_attention, given, s_aux=s_aux.requires_grad_())
    assert torch.equal(out, expected) and not out.requires_grad


def test_dispatch_gives_a_cpu_this_version(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "decode_attention", lambda *args, **options: calls.append(options))
    for name in ("auto", "torch"):
        monkeypatch.setenv(dispatch.VARIABLE, name)
        attend(dispatch.decode_attention, attention_inputs(), scaling=0.125)
    assert len(calls) == 2
