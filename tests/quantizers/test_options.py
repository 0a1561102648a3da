"""Options of quantizers: the bits that they cost, and the errors that name impossible ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from turboquant_hf.primitives import grid
from turboquant_hf.quantizers import QUANTIZERS
from turboquant_hf.quantizers.data import quantizer_from


@pytest.mark.parametrize(
    ("name", "options", "head_dim", "bits"),
    [
        ("conditioned", {}, 128, 4 + 2 * 0.125),
        ("conditioned", {"widths": ((0.5, 4), (0.5, 2)), "scale_format": "e3m5"}, 128, 3 + 0.125 + 0.125),
        ("kivi", {}, 128, 4 + 1),
        ("kivi", {"axis": "token"}, 80, 4 + 32 * 3 / 80),
        ("mse", {}, 128, 4 + 0.125),
        ("conditioned", {"widths": ((0.5, 5), (0.5, 3)), "codebook": "trellis"}, 64, 4 + 0.5 + 0.125),
        ("mse", {"block": 128}, 256, 4 + 0.125),
        ("mse", {"bits": 3, "codebook": "trellis", "scale_format": "e4m4"}, 64, 3 + 0.125),
        ("outlier", {}, 128, 2.25 + 0.25),
        ("outlier", {"outlier_bits": 4, "bits": 3}, 128, 3.25 + 0.25),
        ("polar", {}, 128, 3.875),
        ("prod", {}, 128, 4 + 0.25),
        ("prod", {"block": 128, "sketch_size": 256}, 256, 3 + 2 + 0.25),
        ("qjl", {"bits": 3}, 128, 3 + 0.125),
        ("uniform", {}, 128, 4 + 0.5),
        ("uniform", {"codebook": "nf4"}, 128, 4 + 0.25),
    ],
    ids=str,
)
def test_bits_per_channel_counts_every_overhead(name, options, head_dim, bits):
    assert QUANTIZERS[name](**options).bits_per_channel(head_dim, 128) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("name", "field", "value", "allowed"),
    [
        ("conditioned", "balance", "median", "query, key, none"),
        ("kivi", "axis", "head", "channel, token"),
        ("kivi", "bits", 0, "1 to 8"),
        ("kivi", "bits", 9, "1 to 8"),
        ("kivi", "group", 0, "from 1"),
        ("kivi", "group", 2.5, "from 1"),
        ("mse", "bits", True, "1 to 8"),
        ("mse", "bits", "4", "1 to 8"),
        ("mse", "block", 1, "2 channels"),
        ("mse", "codebook", "nf4", "lloyd-max, grid, polynomial, uniform, trellis, trellis-64"),
        ("mse", "rotation", "dct", "hadamard"),
        ("mse", "trellis_bits", 6, "1 to 5"),
        ("mse", "rounds", 0, "from 1"),
        ("mse", "scale", "max", "unbiased"),
        ("outlier", "bits", 0, "1 to 8"),
        ("outlier", "outlier_bits", 9, "1 to 8"),
        ("outlier", "outlier_fraction", 0.0, "between 0 and 1"),
        ("outlier", "outlier_fraction", 1, "between 0 and 1"),
        ("polar", "rotation", "dct", "hadamard"),
        ("prod", "bits", 1, "2 to 8"),
        ("prod", "block", 1, "2 channels"),
        ("prod", "rotation", "dct", "hadamard"),
        ("prod", "scale", "max", "unbiased"),
        ("prod", "sketch", "hadamard", "gaussian, orthogonal"),
        ("prod", "sketch_size", -1, "from 0"),
        ("qjl", "bits", 9, "1 to 8"),
        ("qjl", "sketch", "hadamard", "gaussian, orthogonal"),
        ("uniform", "bits", 1, "2 to 8"),
        ("uniform", "codebook", "lloyd-max", "affine, symmetric, nf4"),
        ("uniform", "group", -1, "from 1"),
    ],
    ids=str,
)
def test_impossible_options_are_named(name, field, value, allowed):
    with pytest.raises(ValueError) as error:
        QUANTIZERS[name](**{field: value})
    for part in (name, f"{field}={value!r}", allowed):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "head_dim", "parts"),
    [
        ("kivi", {"group": 48}, 64, ("group=48", "divisors of tile=128")),
        ("mse", {"rotation": "hadamard"}, 65, ("65", "Hadamard")),
        ("mse", {"block": 32}, 65, ("head_dim=65", "at least 2")),
        ("outlier", {"outlier_fraction": 0.01}, 64, ("head_dim=64", "at least 2")),
        ("polar", {}, 72, ("head_dim=72", "multiples of 16")),
        ("polar", {"rotation": "hadamard"}, 65, ("head_dim=65", "multiples of 16")),
        ("prod", {"block": 32}, 65, ("prod", "head_dim=65", "at least 2")),
    ],
    ids=str,
)
def test_impossible_head_dims_and_tiles_are_named(name, options, head_dim, parts):
    with pytest.raises(ValueError) as error:
        QUANTIZERS[name](**options).validate(head_dim, 128)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("channel_major", [False, True])
def test_a_trellis_needs_tiles_of_whole_words(channel_major):
    quantizer = QUANTIZERS["mse"](bits=3, codebook="trellis", channel_major=channel_major)
    scalar = replace(quantizer, codebook="grid")
    tiles = torch.randn(1, 1, 2, 24, 64, generator=torch.Generator().manual_seed(0))
    packed, expected = (q.encode(tiles, {}) for q in (quantizer, scalar))
    for name in expected:
        assert torch.equal(packed[name], expected[name])
    assert torch.equal(quantizer.decode(packed, {}, 64, torch.float32), scalar.decode(expected, {}, 64, torch.float32))
    assert quantizer.packed_side(packed, {}, 64).groups == scalar.groups(64, 24) != quantizer.groups(64, 32)


@pytest.mark.parametrize(
    ("head_dim", "bits", "channel_major", "in_words"),
    [
        (64, 4, False, True), (64, 5, False, False), (80, 2, False, True), (72, 3, False, False),
        (72, 3, True, True), (8, 3, True, False), (64, 1, True, True),
    ],
)  # fmt: skip
def test_groups_that_words_cannot_hold_use_the_grid(head_dim, bits, channel_major, in_words):
    (group,) = QUANTIZERS["mse"](bits=bits, codebook="trellis", channel_major=channel_major).groups(head_dim, 32)
    assert group.in_words == in_words
    assert in_words or group.codebook == grid(bits, head_dim)


@pytest.mark.parametrize("most", [3, 4, 5])
def test_codes_wider_than_trellis_bits_use_the_grid(most):
    keys = QUANTIZERS["conditioned"](widths=((0.25, 5), (0.25, 4), (0.5, 3)), codebook="trellis", trellis_bits=most)
    assert [group.in_words for group in keys.groups(64, 32)] == [most > 4, most > 3, True]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_unknown_options_are_named(name):
    with pytest.raises(ValueError, match="bitz.*=4.*allowed"):
        quantizer_from({"quantizer": name, "bitz": 4}, "keys")


def test_nf4_has_one_width():
    with pytest.raises(ValueError, match="bits=3.*allowed.*4"):
        QUANTIZERS["uniform"](bits=3, codebook="nf4")
