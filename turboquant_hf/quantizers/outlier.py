"""Outlier split of TurboQuant's experiments (arXiv 2504.19874, section 4.3): strong channels at more bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.kernels.dispatch import tile_energy
from turboquant_hf.kernels.encode.reference import sorted_columns
from turboquant_hf.quantizers.base import State, check_bits
from turboquant_hf.quantizers.rotated import RotatedQuantizer


@dataclass(frozen=True)
class Outlier(RotatedQuantizer):
    """Two groups of channels, each rotated and scaled on its own. The strong channels are found once per head.

    32 of 128 channels at 3 bits and 96 at 2 bits are 2.25 bits per channel of codes, 2.5 with the two fp16 scales.

    Attributes:
        outlier_fraction: share of the channels with the largest root mean square.
        outlier_bits: width of their codes, 1 to 8.
        bits: width of all other codes, 1 to 8.
    """

    name: ClassVar[str] = "outlier"
    needs_statistics: ClassVar[bool] = True
    outlier_fraction: float = 0.25
    outlier_bits: int = 3
    bits: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.name, "outlier_bits", self.outlier_bits, 1, 8)
        check_bits(self.name, "bits", self.bits, 1, 8)
        if not isinstance(self.outlier_fraction, float) or not 0.0 < self.outlier_fraction < 1.0:
            share = self.outlier_fraction
            raise ValueError(f"{self.name}: outlier_fraction={share!r} is not supported; allowed: between 0 and 1")

    def group_sizes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        strong = round(self.outlier_fraction * head_dim)
        return ((strong, self.outlier_bits), (head_dim - strong, self.bits))

    def fit(
        self,
        tiles: torch.Tensor,
        weight: torch.Tensor,
        query_rms: torch.Tensor | None,
        *,
        flag: torch.Tensor | None = None,
    ) -> State:
        energy = tile_energy(tiles, weight)
        order = energy.argsort(dim=-1, descending=True, stable=True)
        return {**super().fit(tiles, weight, query_rms), "order": order.to(torch.int16)}

    def transform(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        return sorted_columns(self.rotation_of(head_dim, num_heads, device), state["order"])

    def inverse(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        return self.transform(state, head_dim, num_heads, device).transpose(-1, -2)
