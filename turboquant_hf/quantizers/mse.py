"""TurboQuant_mse (arXiv 2504.19874): random rotation, unit sphere, Lloyd-Max codebook, one scale per vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from turboquant_hf.quantizers.base import check_bits
from turboquant_hf.quantizers.rotated import RotatedQuantizer


@dataclass(frozen=True)
class MSE(RotatedQuantizer):
    """The same number of bits for all channels.

    Attributes:
        bits: width of a code, 1 to 8.
        block: channels that are rotated and scaled together; 0 means the whole head.
    """

    name: ClassVar[str] = "mse"
    bits: int = 4
    block: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.name, "bits", self.bits, 1, 8)
        if not isinstance(self.block, int) or self.block < 0 or self.block == 1:
            raise ValueError(f"{self.name}: block={self.block!r} is not supported; allowed: 0, or 2 channels and more")

    def group_sizes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        step = self.block or head_dim
        starts = range(0, head_dim, step)
        return tuple((min(step, head_dim - start), self.bits) for start in starts)
