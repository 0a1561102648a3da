"""What every quantizer of the table promises, whatever its method."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.quantizers import CASES, TILE, fit, id_of, make, query_rms_of, round_trip, tiles_of
from turboquant_hf.config import load_preset
from turboquant_hf.primitives import hadamard_matrix
from turboquant_hf.quantizers import QUANTIZERS
from turboquant_hf.quantizers.data import quantizer_from
from turboquant_hf.quantizers.rotated import RotatedQuantizer

HEAD_DIMS = (64, 80, 65)
"""A power of two, blocks of 16, and an odd number."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VALUES = (0.0, 1.0, -1000.3, 1e-30, 1e10)


def serves(name, options, head_dim):
    """By the documentation, not by `validate`: polar needs whole blocks of 16, others no block of 1 channel."""
    return head_dim % 16 == 0 if name == "polar" else head_dim % options.get("block", head_dim) != 1


SERVED = [
    (case, head_dim, DTYPES[(number + place) % len(DTYPES)])
    for number, case in enumerate(CASES)
    for place, head_dim in enumerate(HEAD_DIMS)
    if serves(*case, head_dim)
]
"""(case, head dim, dtype): head dims and dtypes in pairs, so that a case meets all of both."""
HALF = [served for served in SERVED if served[2] != torch.float32 and served[0][0] != "lossless"]


def id_of_served(served):
    case, head_dim, dtype = served
    return f"{id_of(case)}-d{head_dim}-{str(dtype).removeprefix('torch.')}"


@pytest.fixture(params=SERVED, ids=id_of_served)
def served(request):
    (name, options), head_dim, dtype = request.param
    quantizer = make(name, options)
    quantizer.validate(head_dim, TILE)
    return quantizer, head_dim, dtype


@pytest.fixture
def quantizer(served):
    return served[0]


@pytest.fixture
def head_dim(served):
    return served[1]


@pytest.fixture
def dtype(served):
    return served[2]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_every_quantizer_of_the_table_is_covered():
    assert {name for name, _ in CASES} == set(QUANTIZERS)
    assert all(kind.name == name for name, kind in QUANTIZERS.items())


def test_layout_is_what_encode_returns(quantizer, head_dim, dtype):
    x, weight = tiles_of(head_dim, dtype=dtype)
    packed = quantizer.encode(x, fit(quantizer, x, weight), weight)
    layout = quantizer.layout(head_dim, TILE, dtype)
    assert packed.keys() == layout.keys()
    for name, field in layout.items():
        assert packed[name].shape == (*x.shape[:3], *field.shape), name
        assert packed[name].dtype == field.dtype, name
    stored = sum(array.numel() * array.itemsize for array in packed.values())
    assert quantizer.bits_per_channel(head_dim, TILE, dtype) == 8 * stored / x.numel()


def test_decode_returns_the_shape_and_dtype_asked_for(quantizer, head_dim, dtype):
    x, weight = tiles_of(head_dim, dtype=dtype)
    decoded = round_trip(quantizer, x, fit(quantizer, x, weight), weight, dtype)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype
    assert decoded.isfinite().all()


@pytest.mark.parametrize("served", HALF, indirect=True, ids=id_of_served)
def test_arithmetic_is_float32_for_half_inputs(quantizer, head_dim, dtype):
    """Except `lossless`, whose bytes are those of its input."""
    x, weight = tiles_of(head_dim, dtype=dtype)
    state = fit(quantizer, x, weight)
    assert_same(state, fit(quantizer, x.float(), weight))
    assert_same(quantizer.encode(x, state, weight), quantizer.encode(x.float(), state, weight))


def test_decode_is_near_the_input(quantizer, head_dim):
    """A loose bound: it fails where a rotation, order or group is mixed up. Theory is tested elsewhere."""
    x, weight = tiles_of(head_dim)
    state = fit(quantizer, x, weight)
    error = (round_trip(quantizer, x, state, weight) - x)[:, :, 1:].square().sum() / x[:, :, 1:].square().sum()
    widths = [bits for _, bits in getattr(quantizer, "widths", ())]
    coarse = quantizer.name == "qjl" or min([getattr(quantizer, "bits", 4), *widths]) <= 2
    assert error < (2.0 if quantizer.name == "qjl" else 0.7 if coarse else 0.16)


def test_the_first_axis_of_every_state_is_the_batch(quantizer, head_dim):
    x, weight = tiles_of(head_dim, batch=3)
    for query_rms in (None, query_rms_of(x)):
        for name, tensor in quantizer.fit(x, weight, query_rms).items():
            assert tensor.shape[0] == 3, name


def test_a_batch_of_two_is_two_singles(quantizer, head_dim):
    x, weight = tiles_of(head_dim)
    state = fit(quantizer, x, weight)
    both = round_trip(quantizer, x, state, weight)
    for i in range(2):
        own = {name: tensor[i : i + 1] for name, tensor in state.items()}
        single = round_trip(quantizer, x[i : i + 1], own, weight[i : i + 1])
        torch.testing.assert_close(single[0], both[i])


def test_other_sequences_heads_and_tiles_do_not_matter(quantizer, head_dim):
    x, weight = tiles_of(head_dim)
    state = fit(quantizer, x, weight)
    other = -5 * tiles_of(head_dim, seed=1)[0]
    other[1, 0, 2] = x[1, 0, 2]
    here, there = quantizer.encode(x, state, weight), quantizer.encode(other, state, weight)
    for name in here:
        assert torch.equal(here[name][1, 0, 2], there[name][1, 0, 2]), name


def test_tokens_without_weight_do_not_matter(quantizer, head_dim):
    x, weight = tiles_of(head_dim)
    garbage = x.clone()
    garbage[:, :, 0, :4] = 1000.0
    clean, dirty = (round_trip(quantizer, t, fit(quantizer, t, weight), weight) for t in (x, garbage))
    kept = weight[:, None, :, :, None].bool().expand_as(x)
    torch.testing.assert_close(clean[kept], dirty[kept])


def test_encode_is_deterministic_and_leaves_its_input_alone(quantizer, head_dim):
    x, weight = tiles_of(head_dim)
    before = x.clone()
    state = fit(quantizer, x, weight)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(quantizer)))
    assert twin == quantizer and hash(twin) == hash(quantizer)
    assert_same(state, fit(twin, x, weight))
    assert_same(quantizer.encode(x, state, weight), twin.encode(x, state, weight))
    assert torch.equal(x, before)


def test_encode_takes_strided_tiles(quantizer, head_dim):
    x, weight = tiles_of(head_dim)
    strided = x.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    state = fit(quantizer, x, weight)
    torch.testing.assert_close(round_trip(quantizer, strided, state, weight), round_trip(quantizer, x, state, weight))


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_constant_vectors_stay_finite(case, value):
    """Except numbers that are out of range for the statistics of others (`test_range`)."""
    quantizer, served = make(*case), [head_dim for head_dim in HEAD_DIMS if serves(*case, head_dim)]
    head_dim = served[(CASES.index(case) + VALUES.index(value)) % len(served)]
    x, weight = tiles_of(head_dim)
    constant = torch.full_like(x, value)
    for state in (fit(quantizer, x, weight), fit(quantizer, constant, weight))[value == 1e10 :]:
        decoded = round_trip(quantizer, constant, state, weight)
        assert decoded.isfinite().all()
        if value == 0.0:
            assert not decoded.any()


def test_one_odd_token_stays_finite(quantizer, head_dim):
    x, weight = tiles_of(head_dim)
    state = fit(quantizer, x, weight)
    x[:, :, 1, 5] = 0.0
    x[:, :, 1, 6] = 3e4
    x[:, :, 1, 7] = torch.eye(head_dim)[0]
    decoded = round_trip(quantizer, x, state, weight)
    assert decoded[:, :, :, :6].isfinite().all() and decoded[:, :, :, 7:].isfinite().all()
    odd = decoded[:, :, 1, 6]
    assert odd.isfinite().all() or odd.isnan().any(dim=-1).all(), "1e5 times the size of a weak channel is too much"


@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_options_can_be_replaced_but_not_written(case):
    quantizer = make(*case)
    assert replace(quantizer) == quantizer
    for field in fields(quantizer):
        with pytest.raises(AttributeError):
            setattr(quantizer, field.name, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lossless_keeps_every_bit(dtype):
    x, weight = tiles_of(65, dtype=dtype)
    x[0, 0, 0, 0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-7])
    quantizer = QUANTIZERS["lossless"]()
    decoded = round_trip(quantizer, x, fit(quantizer, x, weight), weight, dtype)
    assert torch.equal(decoded.view(torch.uint8), x.view(torch.uint8))
    assert quantizer.bits_per_channel(65, TILE, dtype) == 8 * dtype.itemsize


ROTATED = [case for case in CASES if issubclass(QUANTIZERS[case[0]], RotatedQuantizer)]


@pytest.mark.parametrize("case", ROTATED, ids=id_of)
def test_both_orders_of_codes_decode_alike(case):
    quantizer = make(*case)
    x, weight = tiles_of(64, count=24) if quantizer.codebook.startswith("trellis") else tiles_of(80)
    state = fit(quantizer, x, weight)
    rows, columns = (round_trip(replace(quantizer, channel_major=major), x, state, weight) for major in (False, True))
    if quantizer.codebook.startswith("trellis"):  # other values make a word: the codes differ, not how good they are
        errors = [(decoded - x)[:, :, 1:].square().mean() for decoded in (rows, columns)]
        torch.testing.assert_close(*errors, rtol=0.03, atol=0)
    else:
        torch.testing.assert_close(rows, columns)


@pytest.mark.parametrize("case", ROTATED, ids=id_of)
def test_inverse_undoes_transform_and_serves_queries(case):
    quantizer = make(*case)
    x, weight = tiles_of(80)
    state = fit(quantizer, x, weight)
    transform, inverse = (f(state, 80, 2, x.device) for f in (quantizer.transform, quantizer.inverse))
    product = inverse @ transform
    torch.testing.assert_close(product, torch.eye(80).expand_as(product), atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"seed": 7}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("preset", ["k4v4", "k3v3", "k3v2", "k8v4"])
def test_signs_and_sylvesters_matrix_are_the_rotation(preset, head_dim, options):
    """Per group: multiply by the signs, then by Sylvester's matrix over the root of the group's size."""
    for quantizer in (replace(side, **options) for side in (load_preset(preset).keys, load_preset(preset).values)):
        x = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(0))
        signs = quantizer.signs_of(head_dim, 3, x.device)
        assert signs.shape == ((1, 3, head_dim) if quantizer.per_head else (head_dim,)) and (signs.abs() == 1).all()
        groups = (x * signs.unsqueeze(-2)).split([size for size, _ in quantizer.group_sizes(head_dim)], dim=-1)
        turned = [group @ hadamard_matrix(group.shape[-1]) / group.shape[-1] ** 0.5 for group in groups]
        expected = x @ quantizer.rotation_of(head_dim, 3, x.device).transpose(-1, -2)
        torch.testing.assert_close(torch.cat(turned, -1), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("options", "head_dim"), [({"rotation": "qr"}, 64), ({"rounds": 2}, 64), ({}, 80)], ids=str)
def test_other_rotations_have_no_signs(options, head_dim):
    quantizer = quantizer_from({"quantizer": "mse", "bits": 4, **options}, "values")
    assert quantizer.signs_of(head_dim, 2, torch.device("cpu")) is None


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["mse", "prod", "qjl", "kivi", "uniform"]),
    bits=st.integers(2, 8),
    head_dim=st.sampled_from([2, 3, 7, 16, 31, 96, 100, 160, 256]),
    tile=st.sampled_from([8, 32, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_width_and_head_dim_round_trips(name, bits, head_dim, tile, dtype):
    quantizer = QUANTIZERS[name](bits=bits, **({"group": 8} if name == "kivi" else {}))
    quantizer.validate(head_dim, tile)
    x, weight = tiles_of(head_dim, batch=1, heads=1, count=1, tile=tile, dtype=dtype)
    packed = quantizer.encode(x, {}, weight)
    layout = quantizer.layout(head_dim, tile, dtype)
    assert {key: (tuple(a.shape[3:]), a.dtype) for key, a in packed.items()} == {
        key: (field.shape, field.dtype) for key, field in layout.items()
    }
    assert quantizer.decode(packed, {}, head_dim, dtype).isfinite().all()
