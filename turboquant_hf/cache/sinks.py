"""A raw copy of the first real tokens of each sequence. The slots of these tokens in a tile are not read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from turboquant_hf.cache.sides import Side, Sides


class SinkBuffer:
    """The first `size` real tokens of every sequence, keys and values, [B, H, size, D] each.

    Attributes:
        starts: int64 [B], the position of each sequence's first real token, which is its left padding. `first` is the
            same as a list.
        latest: a number that is at least the largest of `starts`, so that steps need not wait for the device.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, size: int, starts: list[int]) -> None:
        self.size = size
        self.arrays = Sides(keys, values).map(lambda x: x.new_zeros((*x.shape[:2], size, x.shape[3])))
        self.set_starts(starts, keys.device)

    def set_starts(self, starts: list[int], device: torch.device) -> None:
        self._first: list[int] | None = list(starts)
        self.latest = max(starts, default=0)
        self.starts = torch.tensor(self._first, dtype=torch.int64, device=device)

    @property
    def first(self) -> list[int]:
        """`starts` as a list. The first access after a change of the batch waits for the device."""
        if self._first is None:
            self._first = self.starts.tolist()
        return self._first

    def write(self, keys: torch.Tensor, values: torch.Tensor, position: int) -> None:
        """Copy those of the tokens [position, position + T) that are sinks."""
        if not self.size or not keys.shape[2] or position >= self.latest + self.size:
            return
        if len(set(self.first)) == 1:
            sinks, tokens = self._common(position, position + keys.shape[2])
            for array, new in zip(self.arrays, (keys, values), strict=True):
                array[:, :, sinks] = new[:, :, tokens]
            return
        slots = self.positions() - position
        inside = (slots >= 0) & (slots < keys.shape[2])
        for array, new in zip(self.arrays, (keys, values), strict=True):
            picked = new.gather(2, _expand(slots.clamp(0, keys.shape[2] - 1), new))
            array.copy_(torch.where(inside[:, None, :, None], picked, array))

    def positions(self) -> torch.Tensor:
        """Positions of the sinks in the padded batch, [B, size]."""
        return self.starts[:, None] + torch.arange(self.size, device=self.starts.device)

    def overlay(self, dense: torch.Tensor, side: Side, start: int, stop: int) -> torch.Tensor:
        """Write the sinks into dense [B, H, T, D], which holds positions [start, stop).

        Works in place and returns `dense`.
        """
        sinks = self.arrays.of(side)
        if not self.size or start == stop or start >= self.latest + self.size:
            return dense
        if len(set(self.first)) == 1:
            slots, tokens = self._common(start, stop)
            dense[:, :, tokens] = sinks[:, :, slots]
            return dense
        # Sinks outside [start, stop) write an edge position's own value again, so that scatter needs no mask.
        where = self.positions().clamp(min=start, max=stop - 1)
        source = where - self.starts[:, None]
        inside = (source >= 0) & (source < self.size)
        picked = sinks.gather(2, _expand(source.clamp(0, self.size - 1), dense))
        where = _expand(where - start, dense)
        return dense.scatter_(2, where, torch.where(inside[:, None, :, None], picked, dense.gather(2, where)))

    def _common(self, start: int, stop: int) -> tuple[slice, slice]:
        """Which sinks lie in positions [start, stop), and which of these they are, if all sequences begin alike.

        Slices are copied at once, where gather and scatter would launch a dozen kernels.
        """
        first = self.first[0]
        low = max(first, start)
        high = max(low, min(first + self.size, stop))
        return slice(low - first, high - first), slice(low - start, high - start)

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.arrays = self.arrays.map(fn)
        self.starts = fn(self.starts)
        self.reordered()

    def reordered(self) -> None:
        """Note that `starts` was replaced by a choice among its entries. The list is kept only if all are equal."""
        alike = self._first is not None and len(set(self._first)) == 1
        self._first = self._first[:1] * self.starts.shape[0] if alike else None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays) + self.starts.nbytes


def _expand(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, S] -> [B, H, S, D] for gather and scatter over the tokens of `like`."""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])
