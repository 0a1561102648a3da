"""Rings of raw tokens: the token at position p lies in slot p % R."""

from __future__ import annotations

import torch

from turboquant_hf.cache.sides import Sides
from turboquant_hf.cache.store import Tail

STEP_TOKENS = 16
"""The most new tokens of a decode step (candidates of assisted decoding, prompt lookup). A longer chunk is no step."""


class RingTail(Tail):
    """The tail of a fixed layer: keys and values in rings [B, H, R, D], R = `slots`.

    Attributes:
        start: position of the oldest raw token; the packed tiles end there.
        count: raw tokens held.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, start: int, slots: int) -> None:
        self.start, self.count = start, keys.shape[2]
        self.arrays = Sides(keys, values).map(lambda x: x.new_zeros((*x.shape[:2], slots, x.shape[3])))
        where = self._slots(keys.device)
        for ring, new in zip(self.arrays, (keys, values), strict=True):
            ring.index_copy_(2, where, new)

    def _slots(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.start, self.start + self.count, device=device) % self.slots

    def view(self) -> Sides:
        """Keys and values [B, H, count, D] in order: views, or copies if the tokens wrap round the ring."""
        first = self.start % self.slots
        if first + self.count <= self.slots:
            return self.arrays.map(lambda ring: ring[:, :, first : first + self.count])
        where = self._slots(self.arrays.keys.device)
        return self.arrays.map(lambda ring: ring.index_select(2, where))

    def drop_front(self, tokens: int) -> None:
        self.start, self.count = self.start + tokens, self.count - tokens

    def own(self) -> None:
        """Do nothing: unlike `TailBuffer`, a ring never keeps a block of the model."""


def unrolled(
    ring: torch.Tensor,
    decoded: torch.Tensor | None,
    sinks: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    tile: int,
    room: int,
) -> torch.Tensor:
    """All tokens in order, [B, H, room, D], zeros behind the newest. Does not wait for the device.

    Args:
        ring: [B, H, R, D], the tokens behind the tiles.
        decoded: [B, H, N * tile, D], the decoded tiles, of which counts[0] are in use; None if there are none.
        sinks: [B, H, S, D]; they replace the decoded values at their positions.
        starts: int64 [B], the first real position of every sequence.
        counts: int32, tiles encoded and tokens held.
        tile: tokens per tile.
        room: length of the result.
    """
    position = torch.arange(room, device=ring.device)
    packed = counts[0] * tile
    in_ring = (position >= packed) & (position < counts[1])
    out = ring.index_select(2, position % ring.shape[2])
    out = torch.where(in_ring[:, None], out, torch.zeros((), dtype=out.dtype, device=out.device))
    if decoded is not None:
        covered = decoded.shape[2]
        inside = (position[:covered] < packed)[:, None]
        out[:, :, :covered] = torch.where(inside, decoded, out[:, :, :covered])
    where = starts[:, None] + torch.arange(sinks.shape[2], device=out.device)
    inside = (where < packed)[:, None, :, None]
    where = where.clamp(max=room - 1)[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
    return out.scatter_(2, where, torch.where(inside, sinks, out.gather(2, where)))
