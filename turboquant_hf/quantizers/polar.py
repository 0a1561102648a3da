"""PolarQuant (arXiv 2502.02617): blocks of 16 rotated channels as a radius and the angles of four levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.kernels.codes import store_scale
from turboquant_hf.primitives import (
    from_polar,
    pack,
    packed_size,
    polar_codebook,
    rotation_matrix,
    to_polar,
    unpack,
)
from turboquant_hf.quantizers.base import Field, Packed, check_choice
from turboquant_hf.quantizers.rotated import ROTATIONS
from turboquant_hf.quantizers.scaled import ScaledQuantizer

BLOCK = 16
LEVEL_BITS = (4, 2, 2, 2)
"""Bits of an angle, by level. Level 1 has the most because its angles cover the whole circle."""


@dataclass(frozen=True)
class Polar(ScaledQuantizer):
    """3.875 bits per channel: per block 8, 4, 2 and 1 angles at 4, 2, 2 and 2 bits, and a radius in fp16.

    A row holds the angles that all tokens of a tile have in one place of the head, so no row is padded.

    Attributes:
        rotation: of the whole head, before it is cut into blocks ("preconditioning"); kinds as in `mse`.
        seed: of the rotation; the same for all layers.
    """

    name: ClassVar[str] = "polar"
    rotation: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.name, "rotation", self.rotation, ROTATIONS)

    def validate(self, head_dim: int, tile: int) -> None:
        if head_dim < BLOCK or head_dim % BLOCK:
            raise ValueError(f"{self.name}: head_dim={head_dim} is not supported; allowed: multiples of {BLOCK}")
        self.rotation_of(head_dim, torch.device("cpu"))

    def rotation_of(self, head_dim: int, device: torch.device) -> torch.Tensor:
        return rotation_matrix(head_dim, seed=self.seed, kind=self.rotation, device=device)

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        row_bytes = sum(count * packed_size(tile, bits) for count, bits in _level_rows(head_dim))
        return {
            "angles": Field((row_bytes,), torch.uint8),
            "radius": Field((tile, head_dim // BLOCK), torch.float16),
        }

    def shared_nbytes(self, head_dim: int) -> int:
        return head_dim * head_dim * 4

    def encode_scaled(self, tiles: torch.Tensor, weight: torch.Tensor | None) -> Packed:
        rotated = tiles @ self.rotation_of(tiles.shape[-1], tiles.device).T
        radius, levels = to_polar(rotated.unflatten(-1, (-1, BLOCK)))
        rows = []
        for level, (angles, bits) in enumerate(zip(levels, LEVEL_BITS, strict=True), start=1):
            codes = polar_codebook(level, bits).encode(angles).flatten(-2)
            rows.append(pack(codes.transpose(-1, -2), bits).flatten(-2))
        return {"angles": torch.cat(rows, dim=-1), "radius": store_scale(radius)}

    def decode_scaled(self, packed: Packed, head_dim: int) -> torch.Tensor:
        tile, blocks = packed["radius"].shape[-2:]
        sizes = [count * packed_size(tile, bits) for count, bits in _level_rows(head_dim)]
        parts, levels = packed["angles"].split(sizes, dim=-1), []
        for level, (rows, bits) in enumerate(zip(parts, LEVEL_BITS, strict=True), start=1):
            codes = unpack(rows.unflatten(-1, (-1, packed_size(tile, bits))), bits, tile).transpose(-1, -2)
            levels.append(polar_codebook(level, bits).decode(codes).unflatten(-1, (blocks, -1)))
        rotated = from_polar(packed["radius"].float(), levels).flatten(-2)
        return rotated @ self.rotation_of(head_dim, rotated.device)


def _level_rows(head_dim: int) -> list[tuple[int, int]]:
    """(angles per head, bits per angle) by level."""
    return [(head_dim >> level, bits) for level, bits in enumerate(LEVEL_BITS, start=1)]
