"""A lossless quantizer that makes every mix-up of sequences, heads or positions visible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.quantizers import QUANTIZERS
from turboquant_hf.quantizers.base import Packed, State

Lossless = QUANTIZERS["lossless"]


@dataclass(frozen=True)
class Tagged(Lossless):
    """Stores the bytes of a token XOR the tag of its sequence and head. Tokens without weight become garbage.

    Other bytes are decoded if a state belongs to the wrong sequence, if a sink is not written over its tile, or if
    padding is taken for a real token.
    """

    name: ClassVar[str] = "tagged"
    needs_statistics: ClassVar[bool] = True

    def fit(self, tiles: torch.Tensor, weight: torch.Tensor, query_rms: torch.Tensor | None, *, flag=None) -> State:
        first = tiles.contiguous().view(torch.uint8)
        return {"tag": first.flatten(2)[:, :, -97:].to(torch.int64).sum(-1).to(torch.uint8) | 1}

    def encode(self, tiles: torch.Tensor, state: State, weight: torch.Tensor | None = None) -> Packed:
        raw = super().encode(tiles, state)["raw"] ^ state["tag"][:, :, None, None, None]
        return {"raw": torch.where(weight[:, None, :, :, None] > 0, raw, torch.full_like(raw, 0x5A))}

    def decode(self, packed: Packed, state: State, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return super().decode({"raw": packed["raw"] ^ state["tag"][:, :, None, None, None]}, state, head_dim, dtype)
