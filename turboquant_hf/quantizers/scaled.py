"""The base of quantizers with float16 scales: a power of two per head brings numbers near 1."""

from __future__ import annotations

from abc import abstractmethod

import torch

from turboquant_hf.kernels.dispatch import tile_energy, typical_scale
from turboquant_hf.kernels.statistics import power_of_two
from turboquant_hf.quantizers.base import Packed, Quantizer, State

ROOM = 16.0
"""Room for norms, which are larger than elements, and for tokens that are much larger than others."""


class ScaledQuantizer(Quantizer):
    """Codes tiles / unit. The unit is a power of two, so that it costs no accuracy. A state without one is an old
    file's.

    float16 ends at 65504 and is coarse below 6e-5. Without a unit, larger scales would be lost and smaller ones wrong.
    """

    def fit(
        self,
        tiles: torch.Tensor,
        weight: torch.Tensor,
        query_rms: torch.Tensor | None,
        *,
        flag: torch.Tensor | None = None,
    ) -> State:
        rms = typical_scale(tile_energy(tiles, weight), weight.sum(dim=(1, 2)))
        return {"unit": ROOM * power_of_two(rms)}

    def encode(self, tiles: torch.Tensor, state: State, weight: torch.Tensor | None = None) -> Packed:
        x = tiles.float()
        return self.encode_scaled(x / _unit(state) if "unit" in state else x, weight)

    def decode(self, packed: Packed, state: State, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        x = self.decode_scaled(packed, head_dim)
        return (x * _unit(state) if "unit" in state else x).to(dtype)

    @abstractmethod
    def encode_scaled(self, tiles: torch.Tensor, weight: torch.Tensor | None) -> Packed:
        """`encode` of float32 tiles near 1."""

    @abstractmethod
    def decode_scaled(self, packed: Packed, head_dim: int) -> torch.Tensor:
        """The inverse of `encode_scaled`, float32."""


def _unit(state: State) -> torch.Tensor:
    return state["unit"][:, :, None, None, None]
