"""The parts of KVQuant as a quantizer for this evaluation: levels fitted to the data, sparse outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from turboquant_hf.config import CachePreset
from turboquant_hf.primitives import pack, packed_size, unpack
from turboquant_hf.quantizers import Field, Quantizer


@dataclass(frozen=True)
class NonUniform(Quantizer):
    """The parts of KVQuant (arXiv 2401.18079): levels fitted to the data, per-channel keys, sparse outliers.

    Differences from KVQuant:

    - Keys are post-RoPE.
    - Levels are fitted to the first tiles of each sequence, and not to a calibration set weighted by Fisher
      information.
    - Every tile has the same number of outliers.

    Attributes:
        bits: width of a code.
        outliers: share of a tile's numbers that are kept in fp16, with 16-bit positions.
        axis: "channel" (keys: a channel's tokens in the tile share a scale and a shift) or "token" (values).
    """

    name: ClassVar[str] = "non-uniform"
    needs_statistics: ClassVar[bool] = True
    bits: int = 4
    outliers: float = 0.01
    axis: str = "channel"

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        rows, length = (head_dim, tile) if self.axis == "channel" else (tile, head_dim)
        count = self._count(head_dim, tile)
        return {
            "codes": Field((rows, packed_size(length, self.bits)), torch.uint8),
            "scale": Field((rows,), torch.float16),
            "shift": Field((rows,), torch.float16),
            "places": Field((count,), torch.int16),
            "outliers": Field((count,), torch.float16),
        }

    def fit(
        self,
        tiles: torch.Tensor,
        weight: torch.Tensor,
        query_rms: torch.Tensor | None,
        *,
        flag: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        unit, *_ = self._normalised(self._rows(tiles))
        return {"levels": lloyd_levels(unit.flatten(1), 2**self.bits)}

    def encode(self, tiles: torch.Tensor, state: dict, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        unit, scale, shift, places, outliers = self._normalised(self._rows(tiles))
        middle = (state["levels"][:, 1:] + state["levels"][:, :-1]) / 2
        codes = torch.stack(
            [torch.bucketize(x, m) for x, m in zip(unit.contiguous(), middle.contiguous(), strict=True)]
        )
        # Flat positions in a tile fit into 16 bits. Those above 32,767 are stored as negative numbers.
        places = torch.where(places > 32767, places - 65536, places).to(torch.int16)
        return {
            "codes": pack(codes.to(torch.uint8), self.bits), "scale": scale, "shift": shift, "places": places,
            "outliers": outliers,
        }  # fmt: skip

    def decode(self, packed: dict, state: dict, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        rows = packed["scale"].shape[-1]
        length = head_dim if self.axis == "token" else packed["codes"].shape[-1] * 8 // self.bits
        codes = unpack(packed["codes"], self.bits, length).long()
        levels = torch.stack([table[code] for table, code in zip(state["levels"], codes, strict=True)])
        x = levels * packed["scale"].float().unsqueeze(-1) + packed["shift"].float().unsqueeze(-1)
        x = x.flatten(-2).scatter(-1, packed["places"].long() % 65536, packed["outliers"].float())
        x = x.unflatten(-1, (rows, length))
        return (x.transpose(-1, -2) if self.axis == "channel" else x).to(dtype)

    def _rows(self, tiles: torch.Tensor) -> torch.Tensor:
        return (tiles.transpose(-1, -2) if self.axis == "channel" else tiles).float()

    def _count(self, head_dim: int, tile: int) -> int:
        return max(round(self.outliers * head_dim * tile), 1)

    def _normalised(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(rows [..., R, L] in [-1, 1] without outliers, the stored scale, shift, positions and outliers)."""
        centre = rows.median(dim=-1, keepdim=True).values
        spread = (rows - centre).abs().mean(dim=-1, keepdim=True).clamp(min=1e-9)
        count = self._count(*rows.shape[-2:])
        places = ((rows - centre) / spread).abs().flatten(-2).topk(count, dim=-1).indices
        outliers = rows.flatten(-2).gather(-1, places).to(torch.float16)
        # The position of an outlier gets the middle of the row, so that it does not widen the range.
        inner = (
            rows.flatten(-2).scatter(-1, places, centre.expand_as(rows).flatten(-2).gather(-1, places)).view_as(rows)
        )
        low, high = inner.aminmax(dim=-1)
        shift, scale = ((low + high) / 2).to(torch.float16), ((high - low) / 2).clamp(min=1e-6).to(torch.float16)
        unit = (inner - shift.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        return unit, scale, shift, places, outliers


def lloyd_levels(x: torch.Tensor, count: int, rounds: int = 20) -> torch.Tensor:
    """Lloyd's levels of each row of x [B, n], increasing: float32 [B, count]. Reads at most 65,536 numbers per row."""
    x = x[:, :: max(x.shape[1] // 65536, 1)]
    levels = torch.quantile(x, (torch.arange(count, device=x.device) + 0.5) / count, dim=1).T.contiguous()
    for _ in range(rounds):
        nearest = torch.stack([torch.bucketize(row, (c[1:] + c[:-1]) / 2) for row, c in zip(x, levels, strict=True)])
        total = torch.zeros_like(levels).scatter_add(1, nearest, x)
        size = torch.zeros_like(levels).scatter_add(1, nearest, torch.ones_like(x))
        levels = torch.where(size > 0, total / size.clamp(min=1), levels)
    return levels.sort(dim=1).values


def non_uniform_preset(name: str, *, bits: int, outliers: float, **options) -> CachePreset:
    """KVQuant's arrangement: keys by channel, values by token, one sink token in 16 bits."""
    keys, values = (NonUniform(bits=bits, outliers=outliers, axis=axis) for axis in ("channel", "token"))
    return CachePreset(name=name, keys=keys, values=values, sinks=1, **options)
