"""`tile_mean`, `encode_tiles` and `decode_tiles` of Triton against the reference."""

from __future__ import annotations

import pytest
import torch

from turboquant_hf.kernels.encode import reference
from turboquant_hf.primitives import rotation_matrix, unpack

from .cases import groups_of


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
    common = {"scale_format": fmt, "gain": gain, "channel_major": options.get("channel_major", False)}
    encoding = {"scale_rule": options.get("scale_rule", "unbiased"), "mean": mean, **common}

    def on_device(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    for given in (weight, None):
        ours = kernel.tile_mean(on_device(x), on_device(given)).cpu()
        torch.testing.assert_close(ours, reference.tile_mean(x, given), rtol=1e-3, atol=1e-6)

    expected = reference.encode_tiles(x, transform, groups, **encoding)
    packed = kernel.encode_tiles(
        on_device(x), on_device(transform), groups, **{name: on_device(value) for name, value in encoding.items()}
    )
    packed = {name: value.cpu() for name, value in packed.items()}
    assert_codes_match(packed["codes"], expected["codes"], x, transform, groups, mean, common["channel_major"])
    stored, wanted = packed["scale"].float(), expected["scale"].float()
    assert ((stored - wanted).abs() <= (1.0 if fmt != "fp16" else 2e-3 * wanted.abs() + 1e-7)).all()

    if mean is not None:
        expected["mean"] = mean
    inverse = torch.linalg.inv(transform)
    dense = reference.decode_tiles(expected, inverse, groups, **common)
    ours = kernel.decode_tiles(
        {name: on_device(value) for name, value in expected.items()}, on_device(inverse), groups,
        **{name: on_device(value) for name, value in common.items()},
    )  # fmt: skip
    assert (ours.cpu() - dense).norm() <= 2e-6 * dense.norm()


def assert_codes_match(ours, wanted, x, transform, groups, mean, channel_major):
    """Equal codes, but where the coordinate lies within 1e-5 of a threshold: there the next one is as right."""
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
