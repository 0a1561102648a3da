"""Conditioned TurboQuant, the default for keys: centre, balance, sort into groups, then rotate and round.

Three facts about attention are used before the random rotation:

- Softmax ignores what all keys have in common. The mean key of a tile is therefore stored, and only the rest is coded.
- The error of q.k matters, not that of k. Over factors s_i of the channels, E[(q.(k - k^))^2] is least for
  s_i = sqrt(rms(q_i) / rms(k_i)). `primitives/moments.py` derives this.
- Channels whose product rms(q_i) rms(k_i) is large deserve more bits.

`balance_channels` multiplies the s_i of each group by one more factor, which brings the group to unit energy. One-byte
scales need this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch

from turboquant_hf.checks import shown
from turboquant_hf.kernels.decode import PackedSide
from turboquant_hf.kernels.dispatch import balance_channels, centred_energy, tile_energy
from turboquant_hf.kernels.encode.reference import sorted_columns
from turboquant_hf.kernels.statistics import beyond_half, borrow, power_of_two
from turboquant_hf.quantizers.base import Packed, State, check_bits, check_choice
from turboquant_hf.quantizers.rotated import RotatedQuantizer

BALANCES = ("query", "key", "none")
ALIGNMENTS = (1, 16)
ALIGNED_FROM = 64
"""`align` applies from this head dim on: a quarter of the channels is then at least 16."""


@dataclass(frozen=True)
class Conditioned(RotatedQuantizer):
    """Centres, balances and sorts the channels of keys before it rotates and rounds them.

    If float16 cannot hold the means of a head's first tiles, the state also has "offset" and "unit", float32 [B, H, D].
    Then (key - offset) / unit is encoded. Ordinary keys have neither.

    Attributes:
        widths: ((fraction of the channels, bits), ...); fractions add up to 1, the most important channels first.
        center: keep the mean of every tile (fp16) and code the rest.
        align: groups begin at the nearest multiple of this many channels (the lower one if two are as near), in heads
            of at least 64 channels. The CUDA C++ kernel reads groups of 16, 32, ... channels.
        balance: "query" (falls back to "key" while no queries are known), "key" (s_i = rms(k_i)^-1/2) or "none".
    """

    name: ClassVar[str] = "conditioned"
    needs_statistics: ClassVar[bool] = True
    scale: str = "unbiased"
    widths: tuple[tuple[float, int], ...] = ((1.0, 4),)
    center: bool = True
    align: int = 1
    balance: str = "query"

    @classmethod
    def check_options(cls, owner: str, options: dict[str, Any]) -> None:
        super().check_options(owner, options)
        value = options.get("widths", ())
        pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
        if not pairs or any(isinstance(x, bool) or not isinstance(x, (int, float)) for pair in value for x in pair):
            raise ValueError(f"{owner}: widths={shown(value)} is not supported; allowed: pairs of [fraction, bits]")

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
        check_choice(self.name, "align", self.align, ALIGNMENTS)

    def group_sizes(self, head_dim: int) -> tuple[tuple[int, int], ...]:
        edges, share, step = [0], 0.0, self.align if head_dim >= ALIGNED_FROM else 1
        for fraction, _ in self.widths:
            share += fraction
            # Unaligned edges are rounded as ever: caches in files depend on it.
            edges.append(round(share * head_dim) if step == 1 else math.ceil(share * head_dim / step - 0.5) * step)
        edges[-1] = head_dim
        bits = (bits for _, bits in self.widths)
        return tuple((stop - start, width) for (start, stop), width in zip(pairwise(edges), bits, strict=True))

    @property
    def centered(self) -> bool:
        return self.center

    def fit(
        self,
        tiles: torch.Tensor,
        weight: torch.Tensor,
        query_rms: torch.Tensor | None,
        *,
        flag: torch.Tensor | None = None,
    ) -> State:
        sizes = tuple(size for size, _ in self.group_sizes(tiles.shape[-1]))
        count, state = weight.sum(dim=(1, 2)), {}
        if not self.center or tiles.dtype == torch.float16:
            energy, largest = (centred_energy(tiles, weight)[0] if self.center else tile_energy(tiles, weight)), None
        else:
            energy, largest = centred_energy(tiles, weight)
            if flag is None:
                state = _units(tiles, weight, beyond_half(energy, count, largest), count)
            if state:
                energy = centred_energy(_in_units(tiles, state), weight)[0] * state["unit"].square()
        return {**state, **balance_channels(energy, count, query_rms, sizes, self.balance, largest, flag)}

    def _encode(self, tiles: torch.Tensor, state: State, **options: Any) -> Packed:
        if "unit" in state:
            tiles, state = _in_units(tiles, state), {**state, "balance": state["balance"] * state["unit"]}
        return super()._encode(tiles, state, **options)

    def decode(self, packed: Packed, state: State, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        return super().decode(_with_whole_mean(packed, state), state, head_dim, dtype)

    def packed_side(self, packed: Packed, state: State, head_dim: int) -> PackedSide:
        return super().packed_side(_with_whole_mean(packed, state), state, head_dim)

    def transform(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        rotation = self.rotation_of(head_dim, num_heads, device)
        return sorted_columns(rotation, state["order"]) * state["balance"].unsqueeze(-2)

    def inverse(self, state: State, head_dim: int, num_heads: int, device: torch.device) -> torch.Tensor:
        rotation = self.rotation_of(head_dim, num_heads, device)
        return (sorted_columns(rotation, state["order"]) / state["balance"].unsqueeze(-2)).transpose(-1, -2)


def _units(tiles: torch.Tensor, weight: torch.Tensor, beyond: torch.Tensor, count: torch.Tensor) -> State:
    """{"offset", "unit"} for channels `beyond` float16 in any sequence: there, (key - offset) / unit is encoded.

    Other channels get 0 and 1. The result is {} if there are none. Waits for the device.
    """
    beyond = beyond.any(dim=0, keepdim=True)
    if not beyond.any():
        return {}
    counts = count[:, None, None]
    offset = torch.where(beyond, borrow((tiles.float() * weight[:, None, :, :, None]).sum(dim=(2, 3)), counts), 0.0)
    rms = borrow(tile_energy(tiles.float() - offset[:, :, None, None], weight), counts).sqrt()
    return {"offset": offset, "unit": torch.where(beyond & (rms > 0.0), power_of_two(rms), 1.0)}


def _in_units(tiles: torch.Tensor, state: State) -> torch.Tensor:
    if "unit" not in state:
        return tiles
    return (tiles.float() - state["offset"][:, :, None, None]) / state["unit"][:, :, None, None]


def _with_whole_mean(packed: Packed, state: State) -> Packed:
    if "unit" not in state:
        return packed
    return {**packed, "mean": packed["mean"].float() * state["unit"][:, :, None] + state["offset"][:, :, None]}
