"""Two parts of a layer's storage, packed tiles and tail (`cache.sinks` has the third). They decide nothing.

- Positions are those of the padded batch. Tile n holds positions [n * tile, (n + 1) * tile) of every sequence.
- The tail holds the tokens behind the last tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from turboquant_hf.cache.sides import Sides
from turboquant_hf.quantizers import Field, Quantizer

MIN_SPARE_TILES = 1
SPARE_SHARE = 20
"""Tiles grow by 1/20 of their number (and at least MIN_SPARE_TILES), so that spare capacity stays near 5 %."""

GROWTH_TOKENS = 64
"""Room for more raw tokens than usual is a multiple of this."""
FIRST_TOKENS = 512
"""Room for raw tokens at first. A larger recent window gets its room as it fills."""


class TileStore:
    """Packed tiles: named arrays [B, H, capacity, *field.shape], of which the first `count` tiles are in use.

    When an array moves, `arrays` becomes a new dict, so that readers can compare it by identity.
    """

    def __init__(self, fields: dict[str, Field], batch: int, heads: int, device: torch.device) -> None:
        self.count, self.fields = 0, fields
        self.arrays = {
            name: torch.empty((batch, heads, 0, *field.shape), dtype=field.dtype, device=device)
            for name, field in fields.items()
        }

    @property
    def capacity(self) -> int:
        return next(iter(self.arrays.values())).shape[2]

    def extend(self, added: int) -> dict[str, torch.Tensor]:
        """Count `added` more tiles and return views of them, to be written. Copies only if the capacity grows."""
        self.reserve(self.count + added)
        self.count += added
        return self.view(self.count - added)

    def encode(
        self, quantizer: Quantizer, tiles: torch.Tensor, state: dict, weight: torch.Tensor, flag: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Encode and add tiles [B, H, N, T, D]; returns the packed arrays. flag: see `Quantizer.encode_into`."""
        packed = self.extend(tiles.shape[2])
        quantizer.encode_into(tiles, state, weight, packed, flag)
        return packed

    def make_room(
        self, quantizer: Quantizer, tiles: torch.Tensor, state: dict, weight: torch.Tensor, packed: dict
    ) -> dict:
        """A state that decodes all tiles, of which `packed` are the newest; see `Quantizer.make_room`."""
        return quantizer.make_room(tiles, state, weight, packed, self.view(0, self.count - tiles.shape[2]))

    def encode_again(
        self, quantizer: Quantizer, old: dict, new: dict, rows: torch.Tensor, weight: torch.Tensor, like: torch.Tensor
    ) -> dict:
        """Read sequences `rows` of all tiles by state `old` and write them by `new`, both of these sequences alone.

        weight: [rows, count, T]. like: gives head dim and dtype. Returns the state by which they are to be read.
        """
        if self.count == 0:
            return new
        packed = {name: array[rows] for name, array in self.view().items()}
        tiles = quantizer.decode(packed, old, like.shape[-1], like.dtype)
        packed = quantizer.encode(tiles, new, weight)
        new = quantizer.make_room(tiles, new, weight, packed, {name: array[:, :, :0] for name, array in packed.items()})
        self.write(rows, packed)
        return new

    def write(self, rows: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
        """Replace all tiles of sequences `rows`."""
        for name, array in self.arrays.items():
            array[rows.to(array.device), :, : self.count] = packed[name].to(array.device)

    def append(self, packed: dict[str, torch.Tensor]) -> None:
        """Copy new tiles behind the stored ones."""
        for name, array in self.extend(next(iter(packed.values())).shape[2]).items():
            array.copy_(packed[name])

    def reserve(self, tiles: int, exact: bool = False) -> None:
        """Make room for `tiles` tiles, and for some more unless `exact`, so that growing rarely copies."""
        if tiles <= self.capacity:
            return
        capacity = tiles if exact else tiles + max(MIN_SPARE_TILES, tiles // SPARE_SHARE)
        grown = {}
        for name in list(self.arrays):
            array = self.arrays.pop(name)  # only one array at a time is held twice
            grown[name] = array.new_empty((*array.shape[:2], capacity, *array.shape[3:]))
            if self.count:
                grown[name][:, :, : self.count] = array[:, :, : self.count]
        self.arrays = grown

    def view(self, start: int = 0, stop: int | None = None) -> dict[str, torch.Tensor]:
        """Tiles [start, stop) without a copy; all stored tiles by default."""
        stop = self.count if stop is None else stop
        return {name: array[:, :, start:stop] for name, array in self.arrays.items()}

    def resident(self) -> dict[str, torch.Tensor]:
        """All stored tiles where they are kept: on the host if they are offloaded."""
        return self.view()

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every array by fn(array); fn may change the batch, never the other dimensions."""
        self.arrays = {name: fn(array) for name, array in self.arrays.items()}

    @property
    def tile_nbytes(self) -> int:
        """Bytes of one tile of all heads and sequences."""
        return sum(array[:, :, :1].nbytes for array in self.arrays.values())

    @property
    def nbytes(self) -> int:
        return self.count * self.tile_nbytes

    @property
    def spare_nbytes(self) -> int:
        return (self.capacity - self.count) * self.tile_nbytes


class Tail:
    """Raw tokens behind the packed tiles: `count` tokens in `arrays` of keys and values, [B, H, slots, D] each."""

    arrays: Sides
    count: int

    @property
    def slots(self) -> int:
        return self.arrays.keys.shape[2]

    def crop(self, tokens: int) -> None:
        """Keep the oldest `tokens`."""
        self.count = tokens

    @property
    def nbytes(self) -> int:
        return self.count * self._token_nbytes

    @property
    def spare_nbytes(self) -> int:
        return (self.slots - self.count) * self._token_nbytes

    @property
    def _token_nbytes(self) -> int:
        return sum(array[:, :, :1].nbytes for array in self.arrays)


class TailBuffer(Tail):
    """The tail of a growing layer: tokens in order, from slot 0 on.

    Args:
        keys, values: give batch, heads, head dims, dtype and device.
        capacity: the standard capacity. More tokens are held only until the next `drop_front`.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> None:
        self.count = 0
        self.standard = capacity
        room = min(capacity, FIRST_TOKENS)
        self.arrays = Sides(keys, values).map(lambda x: x.new_empty((*x.shape[:2], room, x.shape[3])))
        self._borrowed = False

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens. A long first block is kept without a copy until `drop_front` or `own`."""
        added = keys.shape[2]
        if self.count == 0 and added > self.slots:
            self.arrays, self.count, self._borrowed = Sides(keys, values), added, True
            return
        if self.count + added > self.slots or self._borrowed:
            self._resize(self._room_for(self.count + added))
        for array, new in zip(self.arrays, (keys, values), strict=True):
            array[:, :, self.count : self.count + added] = new
        self.count += added

    def drop_front(self, tokens: int) -> None:
        """Forget the oldest `tokens` and return to the standard capacity.

        The rest moves to new arrays, because attention may still read views of the old ones.
        """
        rest = self.arrays.map(lambda array: array[:, :, tokens : self.count])
        self.count -= tokens
        self._take(rest, self._room_for(self.count))

    def own(self) -> None:
        """Copy a block that was kept without a copy, because it may be a view into a larger tensor."""
        if self._borrowed:
            self._resize(self._room_for(self.count))

    def _room_for(self, tokens: int) -> int:
        """Capacity for `tokens`: an eighth more, at most the standard capacity; rounded up if they exceed it."""
        if tokens > self.standard:
            return -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
        return min(self.standard, max(FIRST_TOKENS, tokens + tokens // 8))

    def _resize(self, capacity: int) -> None:
        self._take(self.view(), capacity)

    def _take(self, parts: Sides, capacity: int) -> None:
        grown = parts.map(lambda part: part.new_empty((*part.shape[:2], capacity, part.shape[3])))
        for array, part in zip(grown, parts, strict=True):
            array[:, :, : self.count] = part
        self.arrays, self._borrowed = grown, False

    def view(self) -> Sides:
        """Keys and values [B, H, count, D], without a copy."""
        return self.arrays.map(lambda array: array[:, :, : self.count])

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.arrays, self._borrowed = self.arrays.map(fn), False
