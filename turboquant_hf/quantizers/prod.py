"""TurboQuant_prod (arXiv 2504.19874): `mse` with one bit less, and a 1-bit QJL sketch of its residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.kernels.codes import TileCoding
from turboquant_hf.kernels.encode.reference import decode_rotated
from turboquant_hf.primitives import packed_size
from turboquant_hf.quantizers.base import Field, Packed, check_bits, check_choice
from turboquant_hf.quantizers.mse import MSE
from turboquant_hf.quantizers.qjl import SKETCHES, sketch_decode, sketch_encode, sketch_matrix
from turboquant_hf.quantizers.scaled import ScaledQuantizer

SKETCH_SEED = 500_000
"""Added to the seed of a sketch, so that a sketch differs from the rotation before it."""


@dataclass(frozen=True)
class Prod(ScaledQuantizer):
    """A linear estimate of q.k is q times one vector: here the decoded first stage plus the decoded sketch.

    Attributes:
        bits: width of a code and its sign together, 2 to 8 (1 bit would be the sketch alone: `qjl`).
        sketch: "gaussian" rows as published, or "orthogonal" (stacked random rotations: less variance).
        sketch_size: sketch rows per block; 0 means as many as the block has channels.
        block: channels that are rotated, scaled and sketched together; 0 means the whole head.
        scale: the first stage's scale rule; see `kernels.encode.reference`.
        rotation: as in `mse`.
        seed: of rotation and sketch; the same for all layers.
    """

    name: ClassVar[str] = "prod"
    bits: int = 4
    sketch: str = "gaussian"
    sketch_size: int = 0
    block: int = 0
    scale: str = "norm"
    rotation: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.name, "bits", self.bits, 2, 8)
        check_choice(self.name, "sketch", self.sketch, SKETCHES)
        check_bits(self.name, "sketch_size", self.sketch_size, 0, 8192)
        stage = _FirstStage(
            bits=self.bits - 1, block=self.block, scale=self.scale, rotation=self.rotation, seed=self.seed
        )
        object.__setattr__(self, "stage", stage)

    def sketch_sizes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        """(channels, sketch rows) of every block."""
        return tuple((size, self.sketch_size or size) for size, _ in self.stage.group_sizes(head_dim))

    def sketches(self, head_dim: int, device: torch.device) -> list[torch.Tensor]:
        return [
            sketch_matrix(self.sketch, rows, size, self.seed + SKETCH_SEED + index, str(device))
            for index, (size, rows) in enumerate(self.sketch_sizes(head_dim))
        ]

    def validate(self, head_dim: int, tile: int) -> None:
        self.stage.validate(head_dim, tile)

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        rows = [packed_size(rows, 1) for _, rows in self.sketch_sizes(head_dim)]
        return {
            **self.stage.layout(head_dim, tile, dtype),
            "signs": Field((tile, sum(rows)), torch.uint8),
            "residual": Field((len(rows), tile), torch.float16),
        }

    def shared_nbytes(self, head_dim: int) -> int:
        sketches = sum(size * rows * 4 for size, rows in self.sketch_sizes(head_dim))
        return self.stage.shared_nbytes(head_dim) + sketches

    def encode_scaled(self, tiles: torch.Tensor, weight: torch.Tensor | None) -> Packed:
        head_dim, device = tiles.shape[-1], tiles.device
        packed = self.stage.encode(tiles, {}, weight)
        rotation = self.stage.rotation_of(head_dim, 0, device)
        coding = TileCoding(rotation, self.stage.groups(head_dim, tiles.shape[-2]))
        left = tiles @ rotation.T - decode_rotated(packed, coding)
        sizes = [size for size, _ in self.sketch_sizes(head_dim)]
        pairs = [
            sketch_encode(part, sketch)
            for part, sketch in zip(left.split(sizes, dim=-1), self.sketches(head_dim, device), strict=True)
        ]
        signs, norms = zip(*pairs, strict=True)
        return {**packed, "signs": torch.cat(signs, dim=-1), "residual": torch.stack(norms, dim=-2)}

    def decode_scaled(self, packed: Packed, head_dim: int) -> torch.Tensor:
        device = packed["codes"].device
        rows = [packed_size(rows, 1) for _, rows in self.sketch_sizes(head_dim)]
        signs, norms = packed["signs"].split(rows, dim=-1), packed["residual"].unbind(dim=-2)
        triples = zip(signs, norms, self.sketches(head_dim, device), strict=True)
        left = torch.cat([sketch_decode(*triple) for triple in triples], dim=-1)
        rotation = self.stage.rotation_of(head_dim, 0, device)
        coding = TileCoding(rotation, self.stage.groups(head_dim, packed["scale"].shape[-1]))
        return (decode_rotated(packed, coding) + left) @ rotation


class _FirstStage(MSE):
    """`mse` that reports its errors as `prod`."""

    name: ClassVar[str] = Prod.name
