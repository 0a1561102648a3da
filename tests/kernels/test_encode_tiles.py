"""`encode_tiles` and `decode_tiles` of Triton against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.cases import groups_of
from turboquant_hf.kernels.codes import CodeGroup, TileCoding, tile_bytes
from turboquant_hf.kernels.encode import reference
from turboquant_hf.primitives import grid, polynomial, rotation_matrix, trellis_code, unpack


@pytest.fixture
def kernel(device):
    from turboquant_hf.kernels.encode import triton

    return triton


CASES = {f"{bits}-bit": {"groups": groups_of((32, bits)), "channel_major": bits % 2 == 0} for bits in range(1, 9)} | {
    "groups": {"groups": groups_of((40, 4), (24, 2), (16, 1)), "scale_format": "e4m4", "dtype": torch.float16},
    "channel-major-groups": {
        "groups": groups_of((20, 3), (60, 5)), "scale_format": "e3m5", "channel_major": True, "tile": 24,
    },
    "per-head": {"groups": groups_of((48, 3)), "per_head": True, "mean": False, "scale_rule": "mse"},
    "odd-channels": {"groups": groups_of((30, 3)), "tile": 8, "scale_rule": "norm"},
    "bf16": {
        "groups": groups_of((36, 4)), "tile": 40, "channel_major": True, "dtype": torch.bfloat16,
        "scale_rule": "norm-corrected",
    },
    "d128": {"groups": groups_of((128, 3)), "tile": 128, "tiles": 1},
    "polynomial": {"groups": groups_of((64, 5), (32, 4), (32, 3), make=polynomial), "dtype": torch.float16},
    "polynomial-channel-major": {
        "groups": groups_of((64, 4), make=polynomial), "channel_major": True, "mean": False, "dtype": torch.float16,
        "tile": 128, "scale_rule": "norm-corrected", "scale_format": "e4m4",
    },
    "grid": {"groups": groups_of((64, 5), (32, 4), (32, 3), make=grid), "dtype": torch.float16, "scale_format": "e3m5"},
    "wide": {"groups": groups_of((144, 4)), "tile": 16, "dtype": torch.float16, "mean": False},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_encode_then_decode(kernel, device, case):
    options = {"tile": 32, "tiles": 2, "dtype": torch.float32, "mean": True, "per_head": False, **CASES[case]}
    groups = options["groups"]
    dim = sum(group.size for group in groups)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, options["tiles"], options["tile"], dim)
    x = (torch.randn(shape, generator=generator) + torch.randn(dim, generator=generator)).to(options["dtype"])
    weight = (torch.rand(2, *shape[2:4], generator=generator) > 0.3).float()
    transform = rotation_matrix(dim)
    if options["per_head"]:
        transform = transform + 0.1 * torch.randn(2, 2, dim, dim, generator=generator) / dim**0.5
    fmt = options.get("scale_format", "fp16")
    gain = None if fmt == "fp16" else torch.rand(2, 2, generator=generator) + 0.5
    mean = reference.tile_mean(x, weight) if options["mean"] else None
    rule, channel_major = options.get("scale_rule", "unbiased"), options.get("channel_major", False)
    how = {"scale_rule": rule, "scale_format": fmt, "gain": gain, "channel_major": channel_major}
    coding = TileCoding(transform, groups, **how)

    def on_device(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    moved = replace(coding, transform=on_device(transform), gain=on_device(gain))

    expected = reference.encode_tiles(x, coding, mean=mean)
    packed = kernel.encode_tiles(on_device(x), moved, mean=on_device(mean))
    packed = {name: value.cpu() for name, value in packed.items()}
    assert_codes_match(packed["codes"], expected["codes"], x, transform, groups, mean, channel_major)
    stored, wanted = packed["scale"].float(), expected["scale"].float()
    assert ((stored - wanted).abs() <= (1.0 if fmt != "fp16" else 2e-3 * wanted.abs() + 1e-7)).all()

    if mean is not None:
        expected["mean"] = mean
    inverse = torch.linalg.inv(transform)
    dense = reference.decode_tiles(expected, inverse, coding)
    given = {name: on_device(value) for name, value in expected.items()}
    ours = kernel.decode_tiles(given, on_device(inverse), moved)
    assert (ours.cpu() - dense).norm() <= 2e-6 * dense.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "widths", [((32, 5), (32, 3)), ((24, 4), (36, 2)), ((160, 2),), ((32, 4), (160, 2), (64, 1))], ids=str
)
def test_conditioned_tiles_into_views(kernel, device, widths, dtype):
    """The kernel centres, balances and sorts, and writes between the tiles that an array holds already."""
    groups, tile = groups_of(*widths, make=polynomial), 128 if len(widths) == 3 else 32
    dim, generator = sum(size for size, _ in widths), torch.Generator().manual_seed(1)
    balance = 4.0 * torch.rand(2, 2, dim, generator=generator) + 0.1
    x = torch.randn(2, 2, 3, tile, dim, generator=generator) / balance[:, :, None, None]
    x = (x + 3 * torch.randn(2, 2, 1, 1, dim, generator=generator)).to(dtype)
    order = torch.rand(2, 2, dim, generator=generator).argsort(dim=-1).to(torch.int16)
    weight = (torch.rand(2, 3, tile, generator=generator) > 0.3).float()
    arrays = {
        "codes": torch.full((2, 2, 5, tile_bytes(groups, tile, False)), 7, dtype=torch.uint8),
        "scale": torch.full((2, 2, 5, len(groups), tile), 7, dtype=torch.uint8),
        "mean": torch.full((2, 2, 5, dim), 7, dtype=torch.float16),
    }
    arrays = {name: array.to(device) for name, array in arrays.items()}
    rotation = rotation_matrix(dim)
    coding = TileCoding(
        rotation, groups, scale_rule="unbiased", scale_format="e3m5", order=order, balance=balance, center=True
    )
    tensors = {"transform": rotation, "order": order, "balance": balance}
    moved = replace(coding, **{name: x.to(device) for name, x in tensors.items()})
    out = {name: array[:, :, 1:4] for name, array in arrays.items()}
    kernel.encode_tiles(x.to(device), moved, weight=weight.to(device), out=out)
    for array in arrays.values():
        assert (array[:, :, [0, 4]] == 7).all()
    found = {name: array[:, :, 1:4].cpu() for name, array in arrays.items()}
    torch.testing.assert_close(found["mean"], reference.tile_mean(x, weight), rtol=1e-3, atol=1e-6)
    wanted = reference.encode_tiles(x, replace(coding, center=False), mean=found["mean"])
    transform = reference.sorted_columns(rotation, order) * balance.unsqueeze(-2)
    assert_codes_match(found["codes"], wanted["codes"], x, transform, groups, found["mean"], False)
    assert ((found["scale"].int() - wanted["scale"].int()).abs() <= 1).all()


@pytest.mark.parametrize("center", [True, False], ids=["centred", "not-centred"])
def test_infinities_become_nan(kernel, device, center):
    """Stored scales are clamped, which would turn an infinity into a plausible number."""
    groups = groups_of((32, 4), make=polynomial)
    x = torch.randn(1, 1, 2, 32, 32, dtype=torch.float16)
    x[0, 0, 1, 5, 3] = torch.inf
    for encode, where in ((reference.encode_tiles, "cpu"), (kernel.encode_tiles, device)):
        rotation, balance = rotation_matrix(32).to(where), torch.ones(1, 1, 32, device=where)
        coding = TileCoding(rotation, groups, scale_rule="unbiased", center=center, balance=balance)
        scale = encode(x.to(where), coding)["scale"].isnan().cpu()
        assert not scale[0, 0, 0].any()
        assert scale[0, 0, 1].all() if center else scale[0, 0, 1].nonzero().tolist() == [[0, 5]]


def test_means_and_scales_that_float16_cannot_hold_become_nan(kernel, device):
    """With clamped means or scales, the rest of the head would be wrong and look right."""
    groups = groups_of((32, 4), make=polynomial)
    x = torch.randn(1, 1, 3, 32, 32)
    x[0, 0, 1, :, 3] += 1e5
    x[0, 0, 2, 5] *= 2e5
    weight = torch.ones(1, 3, 32)
    for module, where in ((reference, "cpu"), (kernel, device)):
        tiles, rotation, counted = x.to(where), rotation_matrix(32).to(where), weight.to(where)
        packed = module.encode_tiles(tiles, TileCoding(rotation, groups, center=True), weight=counted)
        mean = packed["mean"].cpu()
        assert mean.isnan().nonzero().tolist() == [[0, 0, 1, 3]]
        for rule in ("norm", "norm-corrected", "mse", "unbiased"):
            scale = module.encode_tiles(tiles, TileCoding(rotation, groups, scale_rule=rule))["scale"].cpu()
            assert scale.isnan().nonzero().tolist() == [[0, 0, 2, 0, 5]]


def assert_codes_match(ours, wanted, x, transform, groups, mean, channel_major):
    """Codes are equal, except within 1e-5 of a threshold, where the neighbouring code is as good."""
    tile = x.shape[-2]
    v = x.float() if mean is None else x.float() - mean.unsqueeze(-2).float()
    y = v @ (transform if transform.dim() == 2 else transform.unsqueeze(2)).transpose(-1, -2)
    offset = 0
    for group, part in zip(groups, y.split([group.size for group in groups], dim=-1), strict=True):
        unit = part.norm(dim=-1, keepdim=True) / group.size**0.5
        near = (part / unit)[..., None] - torch.tensor(group.codebook.thresholds)
        near = near.abs().amin(dim=-1) < 1e-5
        length, rows = (tile, group.size) if channel_major else (group.size, tile)
        width = -(-length // 8) * group.bits
        parts = []
        for codes in (ours, wanted):
            if channel_major:
                block = codes[..., offset : offset + rows * width].unflatten(-1, (rows, width))
            else:
                block = codes.unflatten(-1, (tile, -1))[..., offset : offset + width]
            octets = -(-length // 8) * 8
            every = unpack(block.contiguous(), group.bits, octets).int()
            assert (every[..., length:] == 0).all(), "padding codes are zero"
            parts.append(every[..., :length].transpose(-1, -2) if channel_major else every[..., :length])
        difference = (parts[0] - parts[1]).abs()
        assert (difference <= near).all()
        offset += rows * width if channel_major else width


FLAGGED = [(grid, "e4m4", True), (grid, "fp16", False), (grid, "e3m5", False)]
FLAGGED = [(*case, number) for case in FLAGGED for number in ("0", "nan", "-nan", "inf", "1e30")]


@pytest.mark.parametrize(
    ("codebook", "scale_format", "center", "number"),
    [*FLAGGED, *((trellis_code, "e4m4", False, number) for number in ("0", "-nan"))],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", str(x)),
)
def test_a_flag_is_set_for_what_does_not_fit(kernel, device, codebook, scale_format, center, number):
    """One number sets it, unless its token has no weight."""
    groups = (CodeGroup(16, codebook(3, 16)), CodeGroup(16, codebook(2, 16)))
    coding = TileCoding(rotation_matrix(32), groups, scale_format=scale_format, center=center)
    there = replace(coding, transform=coding.transform.to(device))
    tile = 128 if device == "cuda" else 32  # on a GPU, small tiles in words go to the reference
    shape = (1, 1, 1, tile, 32) if codebook is trellis_code else (1, 2, 2, tile, 32)
    x, weight = torch.randn(shape), torch.ones(1, shape[2], tile)
    x[0, -1, -1, 5, 7] = -(torch.tensor(torch.nan)) if number == "-nan" else float(number)
    weight[0, -1, 5] = 0.0
    for counted in (weight, torch.ones_like(weight), None):
        flags = [torch.zeros(1, dtype=torch.int8, device=where) for where in ("cpu", device)]
        reference.encode_tiles(x, coding, weight=counted, flag=flags[0])
        moved = None if counted is None else counted.to(device)
        kernel.encode_tiles(x.to(device), there, weight=moved, flag=flags[1])
        spoiled = number != "0" and (counted is not weight or (center and number != "1e30"))
        assert flags[0].item() == flags[1].item() == spoiled
