"""Groups of a token's channels, rounded to a grid: what q4_0, int4, int8 and NF4 caches do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.kernels.codes import store_scale, to_half
from turboquant_hf.primitives import Codebook, nf4, pack, packed_size, unpack
from turboquant_hf.quantizers.base import Field, Packed, check_bits, check_choice
from turboquant_hf.quantizers.scaled import ScaledQuantizer

GRIDS = ("affine", "symmetric", "nf4")


@dataclass(frozen=True)
class Uniform(ScaledQuantizer):
    """No rotation. The channels of each token are cut into groups, and a group is scaled by its extreme values.

    Attributes:
        bits: width of a code, 2 to 8 (4 for "nf4").
        group: channels that share a scale; the last group of a head may be shorter.
        codebook: "affine" (least to greatest, with a zero point), "symmetric" (equal steps up to the greatest
            magnitude) or "nf4" (QLoRA's table, by the greatest magnitude).
    """

    name: ClassVar[str] = "uniform"
    bits: int = 4
    group: int = 64
    codebook: str = "affine"

    def __post_init__(self) -> None:
        check_bits(self.name, "bits", self.bits, 2, 8)
        check_group(self.name, self.group)
        check_choice(self.name, "codebook", self.codebook, GRIDS)
        if self.codebook == "nf4" and self.bits != 4:
            raise ValueError(f"{self.name}: bits={self.bits!r} is not supported; allowed with codebook='nf4': 4")

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        fields = affine_layout(tile, head_dim, self.bits, self.group)
        if self.codebook != "affine":
            del fields["zero"]
        return fields

    def encode_scaled(self, tiles: torch.Tensor, weight: torch.Tensor | None) -> Packed:
        if self.codebook == "affine":
            return affine_encode(tiles, self.bits, self.group)
        x = in_groups(tiles, self.group)
        scale = store_scale(x.abs().amax(dim=-1))
        codes = self._levels().encode(x / scale.float().clamp(min=1e-30).unsqueeze(-1))
        return {"codes": pack(codes.flatten(-2)[..., : tiles.shape[-1]], self.bits), "scale": scale}

    def decode_scaled(self, packed: Packed, head_dim: int) -> torch.Tensor:
        if self.codebook == "affine":
            return affine_decode(packed, head_dim, self.bits, self.group)
        levels = self._levels().decode(unpack(packed["codes"], self.bits, head_dim))
        return levels * _per_channel(packed["scale"], self.group, head_dim)

    def _levels(self) -> Codebook:
        if self.codebook == "nf4":
            return nf4()
        top = 2 ** (self.bits - 1) - 1
        return Codebook(tuple(step / top for step in range(-top - 1, top + 1)), f"symmetric(bits={self.bits})")


def check_group(owner: str, group: int) -> None:
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"{owner}: group={group!r} is not supported; allowed: whole numbers from 1")


def affine_layout(rows: int, length: int, bits: int, group: int) -> dict[str, Field]:
    """What `affine_encode` returns for [rows, length]."""
    groups = -(-length // group)
    return {
        "codes": Field((rows, packed_size(length, bits)), torch.uint8),
        "scale": Field((rows, groups), torch.float16),
        "zero": Field((rows, groups), torch.float16),
    }


def affine_encode(rows: torch.Tensor, bits: int, group: int) -> Packed:
    """Min-max rounding of groups along the last axis: x ~ zero + scale * code.

    rows: [..., L], any float dtype -> codes uint8 [..., packed_size(L, bits)], scale and zero fp16 [..., G].
    The codes are chosen for the stored, already rounded scale and zero.
    """
    x = in_groups(rows.float(), group)
    low, high = x.aminmax(dim=-1)
    zero = to_half(low)
    scale = store_scale((high - zero.float()).clamp(min=0.0) / (2**bits - 1))
    step = scale.float().clamp(min=1e-30).unsqueeze(-1)
    codes = ((x - zero.float().unsqueeze(-1)) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return {"codes": pack(codes.flatten(-2)[..., : rows.shape[-1]], bits), "scale": scale, "zero": zero}


def affine_decode(packed: Packed, length: int, bits: int, group: int) -> torch.Tensor:
    """The inverse of `affine_encode`, float32 [..., L]."""
    codes = unpack(packed["codes"], bits, length).float()
    return codes * _per_channel(packed["scale"], group, length) + _per_channel(packed["zero"], group, length)


def in_groups(x: torch.Tensor, group: int) -> torch.Tensor:
    """[..., L] -> [..., G, group]. The last group is filled up with its last value, which moves no extreme."""
    missing = -x.shape[-1] % group
    padded = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], dim=-1)
    return padded.unflatten(-1, (-1, group))


def _per_channel(stored: torch.Tensor, group: int, length: int) -> torch.Tensor:
    return stored.float().repeat_interleave(group, dim=-1)[..., :length]
