"""The raw bytes of every element, stored like the codes of all methods: a bug of the cache becomes a wrong token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.quantizers.base import Field, Packed, Quantizer, State


@dataclass(frozen=True)
class Lossless(Quantizer):
    """Stores the model's own values bit for bit."""

    name: ClassVar[str] = "lossless"
    marks_infinity: ClassVar[bool] = True

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        return {"raw": Field((tile, head_dim * dtype.itemsize), torch.uint8)}

    def encode(self, tiles: torch.Tensor, state: State, weight: torch.Tensor | None = None) -> Packed:
        return {"raw": tiles.contiguous().view(torch.uint8)}

    def decode(self, packed: Packed, state: State, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return packed["raw"].view(dtype)
