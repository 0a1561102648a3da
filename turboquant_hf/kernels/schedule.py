"""When a layer's next tile is encoded, said so that a kernel can read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Schedule:
    """How far a layer is, on its device, and the rule of its next tile.

    Tile number counts[0] is due where the layer is fitted, `capacity` has room for it, and `window` tokens follow it.

    Attributes:
        counts: int32 [2]: tiles encoded, and tokens seen (of the padded batch, those of this step included).
        fitted: int32 [H], not 0 where the layer's state is known; one flag per head, so that no program waits for
            another.
        starts: int64 [B], every sequence's first position.
        tile, window: tokens of a tile, and newest tokens that stay raw.
        sinks: positions below starts + sinks carry no weight in a mean.
        capacity: tiles that the arrays have room for.
    """

    counts: torch.Tensor
    fitted: torch.Tensor
    starts: torch.Tensor
    tile: int
    window: int
    sinks: int
    capacity: int

    def is_due(self) -> bool:
        """Whether the next tile is due. Waits for the device."""
        tiles, length = self.counts.tolist()
        enough = length >= (tiles + 1) * self.tile + self.window and tiles < self.capacity
        return enough and bool(self.fitted[0])
