"""QJL (arXiv 2406.03482): the signs of a random sketch of the key, and its norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.kernels.codes import store_scale
from turboquant_hf.primitives import Codebook, head_rotations, pack, packed_size, unpack
from turboquant_hf.primitives.memo import once
from turboquant_hf.quantizers.base import Field, Packed, check_bits, check_choice
from turboquant_hf.quantizers.scaled import ScaledQuantizer

SKETCHES = ("gaussian", "orthogonal")
SIGNS = Codebook((-1.0, 1.0), "signs")


@dataclass(frozen=True)
class QJL(ScaledQuantizer):
    """One sign per sketch row. The product of q with the decoded key is the paper's asymmetric, unbiased estimate of
    q.k.

    Attributes:
        bits: sketch rows per channel, 1 to 8.
        sketch: "gaussian" rows as published, or "orthogonal" (stacked random rotations: less variance).
        seed: of the sketch; the same for all layers.
    """

    name: ClassVar[str] = "qjl"
    bits: int = 1
    sketch: str = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.name, "bits", self.bits, 1, 8)
        check_choice(self.name, "sketch", self.sketch, SKETCHES)

    def sketch_of(self, head_dim: int, device: torch.device) -> torch.Tensor:
        return sketch_matrix(self.sketch, self.bits * head_dim, head_dim, self.seed, str(device))

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        return {
            "signs": Field((tile, packed_size(self.bits * head_dim, 1)), torch.uint8),
            "norm": Field((tile,), torch.float16),
        }

    def shared_nbytes(self, head_dim: int) -> int:
        return self.bits * head_dim * head_dim * 4

    def encode_scaled(self, tiles: torch.Tensor, weight: torch.Tensor | None) -> Packed:
        signs, norm = sketch_encode(tiles, self.sketch_of(tiles.shape[-1], tiles.device))
        return {"signs": signs, "norm": norm}

    def decode_scaled(self, packed: Packed, head_dim: int) -> torch.Tensor:
        sketch = self.sketch_of(head_dim, packed["signs"].device)
        return sketch_decode(packed["signs"], packed["norm"], sketch)


def sketch_encode(x: torch.Tensor, sketch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float32 [..., D], sketch [m, D] -> packed signs uint8 [..., packed_size(m, 1)], fp16 norms [...]."""
    return pack(SIGNS.encode(x @ sketch.T), 1), store_scale(x.norm(dim=-1))


def sketch_decode(signs: torch.Tensor, norm: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
    """The decoded vectors, float32 [..., D]: their product with any q is the estimate of q.x."""
    return (SIGNS.decode(unpack(signs, 1, len(sketch))) @ sketch) * norm.float().unsqueeze(-1)


@once(maxsize=64)
@torch.inference_mode(False)
def sketch_matrix(kind: str, rows: int, dim: int, seed: int, device: str) -> torch.Tensor:
    """S, float32 [rows, dim]: norm(x) S^T sign(S x) has the mean x. Shared: do not write to it.

    For rows s of any rotation-invariant distribution, E[s sign(s.u)] = E|s.u| u for a unit vector u. Gaussian rows of
    unit variance have E|s.u| = sqrt(2 / pi), which gives the paper's factor sqrt(pi / 2) / m. Rows of random rotations
    have unit norm and E|s.u| = Gamma(dim / 2) / (sqrt(pi) Gamma((dim + 1) / 2)). With dim such rows the relative error
    is near pi / 2 - 1; with Gaussian rows it is pi / 2. More than dim rows take several rotations.
    """
    if kind == "orthogonal":
        blocks = -(-rows // dim)
        sketch = head_rotations(blocks, dim, seed=seed, kind="qr", dtype=torch.float64).flatten(0, 1)[:rows]
        mean = math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)
    else:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        sketch = torch.randn(rows, dim, generator=generator, dtype=torch.float64, device="cpu")
        mean = math.sqrt(2 / math.pi)
    return (sketch / (rows * mean)).to(device=device, dtype=torch.float32)
