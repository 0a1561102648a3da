"""Groups of a trellis: which values make a word, where words lie in a tile, and what encoding promises."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support.accuracy import check
from tests.support.cases import attention_inputs, groups_of
from turboquant_hf.kernels.codes import TileCoding, from_words, group_places, load_scale, tile_bytes, to_words
from turboquant_hf.kernels.encode import reference
from turboquant_hf.primitives import grid, rotation_matrix, trellis_code, unpack_words

from .conftest import INTERPRETED


def encode_tiles(x, transform, groups, *, weight=None, **options):
    return reference.encode_tiles(x, TileCoding(transform, groups, **options), weight=weight)


def decode_rotated(packed, groups, channel_major):
    coding = TileCoding(torch.empty(0), groups, channel_major=channel_major)  # nothing of the transform is read
    return reference.decode_rotated(packed, coding)


def place_of(index: int) -> int:
    """The place, before the trellis reorders values, of the value whose path bit is bit `index`."""
    n, b, a = index // 4, index // 2 % 2, index % 2
    return 16 * a + 8 * b + n


@pytest.mark.parametrize(("tile", "size"), [(128, 16), (128, 64), (128, 128), (96, 48), (32, 80), (256, 16)])
def test_a_lane_of_a_warp_owns_the_channels_of_a_word(tile, size):
    """Token-major: the definition, one value at a time."""
    x = torch.arange(tile * size).view(tile, size)
    words = to_words(x, channel_major=False)
    assert words.shape == (tile * size // 32, 32)
    lanes = tile // 4
    for number, word in enumerate(words.tolist()):
        g, t = number % lanes // 4, number % lanes % 4
        for index, value in enumerate(word):
            in_lane = number // lanes * 32 + place_of(index)
            pair, channel = in_lane // (size // 4), in_lane % (size // 4)
            token = 32 * (g // 2) + 4 * (pair // 2) + 2 * (g % 2) + pair % 2
            assert value == token * size + t * (size // 4) + channel
    assert torch.equal(from_words(words, tile, size, channel_major=False), x)


@pytest.mark.parametrize(("tile", "size"), [(128, 16), (32, 65), (96, 3)])
def test_a_word_of_values_is_32_tokens_of_a_channel(tile, size):
    x = torch.arange(tile * size).view(tile, size)
    words = to_words(x, channel_major=True)
    assert words.shape == (tile * size // 32, 32)
    for number, word in enumerate(words.tolist()):
        channel, first = number // (tile // 32), number % (tile // 32) * 32
        assert word == [(first + place_of(index)) * size + channel for index in range(32)]
    assert torch.equal(from_words(words, tile, size, channel_major=True), x)


def mixed():
    """A group in words between two in rows."""
    first, last = groups_of((16, 5), (16, 2), make=grid)
    return (first, *groups_of((32, 3), make=trellis_code), last)


def test_words_stand_behind_the_rows_of_tokens():
    groups, tile = mixed(), 64
    assert tile_bytes(groups, tile, False) == tile_bytes(groups, tile, True) == tile * (10 + 12 + 4)
    assert group_places(groups, tile, False) == [(0, 10), (tile * 14, tile * 12), (10, 4)]
    assert group_places(groups, tile, True) == [(0, tile * 10), (tile * 10, tile * 12), (tile * 22, tile * 4)]


@pytest.mark.parametrize("channel_major", [False, True], ids=["keys", "values"])
def test_groups_in_words_and_in_rows_stand_in_one_tile(channel_major):
    groups, generator = mixed(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 64, 64, generator=generator)
    options = {"scale_rule": "mse", "channel_major": channel_major}
    packed = encode_tiles(x, torch.eye(64), groups, **options)
    y = decode_rotated(packed, groups, channel_major)
    start = 0
    for index, group in enumerate(groups):
        part = slice(start, start + group.size)
        alone = encode_tiles(x[..., part], torch.eye(group.size), (group,), **options)
        expected = decode_rotated(alone, (group,), channel_major)
        assert torch.equal(y[..., part], expected)
        assert torch.equal(packed["scale"][:, :, :, index], alone["scale"][:, :, :, 0])
        if group.in_words:
            place, size = group_places(groups, 64, channel_major)[index]
            own = packed["codes"][..., place : place + size]
            assert torch.equal(own, alone["codes"])
            words = unpack_words(own.unflatten(-1, (-1, 4 * group.bits)), group.bits)
            level = from_words(group.codebook.decode(words), 64, group.size, channel_major)
            torch.testing.assert_close(level * load_scale(alone["scale"])[..., 0, :, None], expected)
        start += group.size


@pytest.mark.parametrize("channel_major", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_trellis_has_a_third_less_error_at_the_same_bytes(bits, channel_major):
    x = torch.randn(1, 2, 4, 64, 64, generator=torch.Generator().manual_seed(bits))
    errors, sizes = [], []
    for make in (grid, trellis_code):
        groups = groups_of((64, bits), make=make)
        packed = encode_tiles(x, torch.eye(64), groups, scale_rule="mse", channel_major=channel_major)
        y = decode_rotated(packed, groups, channel_major)
        errors.append(float((y - x).square().mean()))
        sizes.append(packed["codes"].numel())
    assert sizes[0] == sizes[1]
    assert errors[1] < {1: 0.87, 2: 0.77, 3: 0.72, 4: 0.71}[bits] * errors[0]


@pytest.mark.parametrize("channel_major", [False, True], ids=["keys", "values"])
def test_a_token_without_weight_does_not_change_other_codes(channel_major):
    """Neither its size nor a NaN in it shows in the codes of other tokens. Its own scale is 0."""
    groups, generator = groups_of((16, 3), (48, 2), make=trellis_code), torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 2, 2, 64, 64, generator=generator), torch.ones(2, 2, 64)
    weight[:, 0, :7] = 0
    found = []
    for odd in (0.0, 1000.0, torch.nan):
        x[:, :, 0, :7] = odd
        packed = encode_tiles(
            x, rotation_matrix(64), groups, scale_rule="unbiased", weight=weight, channel_major=channel_major
        )
        assert not packed["scale"][:, :, 0, :, :7].any()
        found.append(packed)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


CASES = {
    "1-and-2-bit": (((16, 1), (32, 2)), False, 64, "unbiased"),
    "3-bit-channel-major": (((24, 3),), True, 96, "norm-corrected"),
    "4-bit": (((48, 4),), False, 32, "mse"),
    "fewer-words-than-threads": (((16, 3),), False, 128, "unbiased"),
    "2-bit-channel-major": (((32, 2),), True, 64, "unbiased"),
    "5-bit-beside-rows": (((16, 5), (16, 6), (32, 1)), False, 32, "norm"),
}


def groups_with_rows(widths):
    return tuple(groups_of((size, bits), make=grid if bits > 5 else trellis_code)[0] for size, bits in widths)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_searches_as_the_reference_does(device, case):
    from turboquant_hf.kernels.encode import triton

    widths, channel_major, tile, rule = CASES[case]
    groups, dim = groups_with_rows(widths), sum(size for size, _ in widths)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 1, 1, tile, dim, generator=generator), torch.ones(1, 1, tile)
    weight[:, 0, :3] = 0.0
    if all(group.in_words for group in groups):  # a NaN in a row may have any code
        x[0, 0, 0, 9, 3] = torch.nan
    coding, ours = (
        TileCoding(torch.eye(dim).to(where), groups, scale_rule=rule, channel_major=channel_major)
        for where in ("cpu", device)
    )
    wanted = reference.encode_tiles(x, coding, weight=weight)
    found = triton.encode_tiles(x.to(device), ours, weight=weight.to(device))
    found = {name: array.cpu() for name, array in found.items()}
    if INTERPRETED:
        assert torch.equal(found["codes"], wanted["codes"])
    else:  # sums of a compiler's own order decide between two ways that are as good
        assert (found["codes"] != wanted["codes"]).float().mean() < 0.01
    torch.testing.assert_close(found["scale"], wanted["scale"], rtol=2e-3, atol=1e-6, equal_nan=True)
    dense = reference.decode_tiles(wanted, torch.eye(dim), coding)
    wanted = {name: array.to(device) for name, array in wanted.items()}
    decoded = triton.decode_tiles(wanted, torch.eye(dim).to(device), ours)
    torch.testing.assert_close(decoded.cpu(), dense, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("keys", "values", "tile"),
    [
        (((16, 5), (16, 6), (32, 2)), ((64, 3),), 32),
        (((32, 5), (32, 3)), ((64, 4),), 64),
        (((48, 4),), ((48, 1),), 96),
        (((80, 1),), ((80, 5),), 32),
    ],
    ids=str,
)
def test_attention_reads_words(device, keys, values, tile, dtype):
    from turboquant_hf.kernels.decode import triton

    arguments = attention_inputs(
        dim=sum(size for size, _ in keys), tile=tile, keys=groups_with_rows(keys), values=groups_with_rows(values),
        group=3, queries=2, scale_format="e3m5", spare=2,
    )  # fmt: skip
    check(triton.decode_attention, device, dtype, arguments)


def test_kernels_are_written_for_one_trellis():
    pytest.importorskip("triton")
    from turboquant_hf.kernels.common.words import word_planes

    assert word_planes(trellis_code(4)) == ((2, 0, 0), (2, 0, 1), (1, 2, 0))
    (other,) = groups_of((16, 2), make=partial(trellis_code, states=64))
    assert not other.for_kernels
    with pytest.raises(ValueError, match="h0=0o103"):
        word_planes(other.codebook)
    assert all(group.for_kernels for group in (*mixed(), *groups_of((16, 2), make=trellis_code)))


def test_a_nan_stays_with_its_token():
    groups, x = groups_of((64, 3), make=trellis_code), torch.randn(1, 1, 1, 32, 64)
    x[0, 0, 0, 5, 9] = torch.nan
    for channel_major in (False, True):
        packed = encode_tiles(x, torch.eye(64), groups, scale_rule="norm-corrected", channel_major=channel_major)
        y = decode_rotated(packed, groups, channel_major)
        bad = torch.zeros(32, dtype=torch.bool)
        bad[5] = True
        assert torch.equal(y.isnan().any(-1)[0, 0, 0], bad) and y[0, 0, 0, 5].isnan().all()
