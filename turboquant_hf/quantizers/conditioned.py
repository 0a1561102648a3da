"""Conditioned TurboQuant, the default for keys: centre, balance, sort into groups, then rotate and round.

Three facts about attention are used before the random rotation. Softmax ignores what all keys share, so the mean
key of a tile is kept exactly and only the rest is coded. What matters is the error of q.k, not of k: over diagonal
scalings s, E[(q.(k - k^))^2] is least for s_i = sqrt(rms(q_i) / rms(k_i)) (Cauchy-Schwarz on the product of the
rotated error's energy and the query's). And channels whose product rms(q_i) rms(k_i) is large deserve more bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from turboquant_hf.kernels.dispatch import tile_mean
from turboquant_hf.kernels.encode.reference import sorted_columns
from turboquant_hf.quantizers.base import Field, State, check_bits, check_choice
from turboquant_hf.quantizers.rotated import RotatedQuantizer

BALANCES = ("query", "key", "none")
PRIOR_TOKENS = 256
"""A sequence with fewer tokens borrows the rest of its statistics from the batch."""


@dataclass(frozen=True)
class Conditioned(RotatedQuantizer):
    """Keys measured before they are rounded.

    Attributes:
        widths: ((fraction of the channels, bits), ...); fractions add up to 1, the most important channels first.
        center: keep the mean of every tile (fp16) and code the rest.
        balance: "query" (falls back to "key" while no queries are known), "key" (s_i = rms(k_i)^-1/2) or "none".
    """

    name: ClassVar[str] = "conditioned"
    needs_statistics: ClassVar[bool] = True
    scale: str = "unbiased"
    widths: tuple[tuple[float, int], ...] = ((1.0, 4),)
    center: bool = True
    balance: str = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "widths", tuple((float(share), bits) for share, bits in self.widths))
        for share, bits in self.widths:
            check_bits(self.name, "widths bits", bits, 1, 8)
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{self.name}: widths fraction {share!r} is not supported; allowed: (0, 1]")
        if abs(sum(share for share, _ in self.widths) - 1.0) > 1e-6:
            raise ValueError(f"{self.name}: widths={self.widths!r}: the fractions must add up to 1")
        check_choice(self.name, "balance", self.balance, BALANCES)

    def group_sizes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        edges, share = [0], 0.0
        for fraction, _ in self.widths:
            share += fraction
            edges.append(round(share * head_dim))
        bits = (bits for _, bits in self.widths)
        return tuple((stop - start, width) for (start, stop), width in zip(pairwise(edges), bits, strict=True))

    @property
    def centered(self) -> bool:
        return self.center

    def layout(self, head_dim: int, tile: int, dtype: torch.dtype) -> dict[str, Field]:
        fields = super().layout(head_dim, tile, dtype)
        return {**fields, "mean": Field((head_dim,), torch.float16)} if self.center else fields

    def fit(self, tiles: torch.Tensor, weight: torch.Tensor, query_rms: torch.Tensor | None) -> State:
        x = tiles.float()
        if self.center:
            x = x - tile_mean(x, weight).unsqueeze(-2).float()
        w = weight[:, None, :, :, None].float()
        energy = (x.square() * w).sum(dim=(2, 3))
        count = w.sum(dim=(2, 3)).expand_as(energy[..., :1])
        key_rms = _root(_borrow(energy, count))
        importance = key_rms
        balance = torch.ones_like(key_rms)
        if self.balance == "query" and query_rms is not None:
            query = _root(query_rms.float().square())
            balance, importance = (query / key_rms).sqrt(), query * key_rms
        elif self.balance != "none":
            balance = key_rms.rsqrt()
        order = importance.argsort(dim=-1, descending=True, stable=True)
        if len(self.widths) == 1:
            order = torch.arange(tiles.shape[-1], device=tiles.device).expand_as(order).contiguous()
        # Unit energy in each group after balancing: stored scales stay near 1 whatever the model's units.
        energy = (balance * key_rms).square().gather(-1, order)
        sizes = [size for size, _ in self.group_sizes(tiles.shape[-1])]
        level = torch.cat([part.mean(-1, keepdim=True).expand_as(part) for part in energy.split(sizes, -1)], dim=-1)
        balance = balance * torch.empty_like(level).scatter(-1, order, level.rsqrt())
        return {"balance": balance, "order": order.to(torch.int16)}

    def transform(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        rotation = self.rotation_of(head_dim, num_heads, device)
        return sorted_columns(rotation, state["order"]) * state["balance"].unsqueeze(-2)

    def inverse(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        rotation = self.rotation_of(head_dim, num_heads, device)
        return (sorted_columns(rotation, state["order"]) / state["balance"].unsqueeze(-2)).transpose(-1, -2)


def _borrow(energy: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mean squares [B, H, D] from sums and counts [B, H, 1], short sequences filled up with the batch's average."""
    pooled = energy.sum(dim=0, keepdim=True) / count.sum(dim=0, keepdim=True).clamp(min=1.0)
    missing = (PRIOR_TOKENS - count).clamp(min=0.0)
    return (energy + missing * pooled) / (count + missing).clamp(min=1.0)


def _root(mean_square: torch.Tensor) -> torch.Tensor:
    """Root with a floor, so that a dead channel neither divides by zero nor draws unbounded balance."""
    floor = 1e-6 * mean_square.mean(dim=-1, keepdim=True) + 1e-20
    return torch.maximum(mean_square, floor).sqrt()
