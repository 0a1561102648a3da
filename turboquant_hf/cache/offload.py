"""Packed tiles in host memory, fetched one layer ahead of the attention that reads them.

- Tiles live in (pinned) host memory. Sinks, tail and statistics stay on the device.
- The device has two staging buffers. When a layer is updated, its tiles are copied into one of them, unless they are
  there already.
- At the same moment, the copy of the next layer's tiles into the other buffer starts on a stream of its own. It runs
  while this layer attends.
- A device therefore never holds more than two layers' tiles, and only packed bytes travel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from turboquant_hf.cache.store import TileStore
from turboquant_hf.quantizers import Quantizer

ALIGNMENT = 256
"""Bytes: an array begins at a multiple of this in a staging buffer."""


class HostTileStore(TileStore):
    """A `TileStore` whose arrays are on the host. `view` gives tiles on the device, which `owner` stages."""

    def __init__(self, fields, batch: int, heads: int, device: torch.device, owner: Offloader) -> None:
        super().__init__(fields, batch, heads, torch.device("cpu"))
        self.device, self.owner = torch.device(device), owner
        self.staged: dict[str, torch.Tensor] | None = None

    def view(self, start: int = 0, stop: int | None = None) -> dict[str, torch.Tensor]:
        self.owner.fetch(self)
        stop = self.count if stop is None else stop
        return {name: array[:, :, start:stop] for name, array in self.staged.items()}

    def resident(self) -> dict[str, torch.Tensor]:
        return super().view()

    def encode(
        self, quantizer: Quantizer, tiles: torch.Tensor, state: dict, weight: torch.Tensor, flag: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        lead = tiles.shape[:3]
        packed = {n: tiles.new_empty((*lead, *field.shape), dtype=field.dtype) for n, field in self.fields.items()}
        quantizer.encode_into(tiles, state, weight, packed, flag)
        self.append(packed)
        return packed

    def make_room(
        self, quantizer: Quantizer, tiles: torch.Tensor, state: dict, weight: torch.Tensor, packed: dict
    ) -> dict:
        older = {name: array[:, :, : -tiles.shape[2]] for name, array in self.resident().items()}
        widened = quantizer.make_room(tiles, state, weight, packed, older)
        if widened is not state:
            self.owner.forget(self)
            for name, array in self.resident().items():
                array[:, :, -tiles.shape[2] :].copy_(packed[name])
        return widened

    def write(self, rows: torch.Tensor, packed: dict[str, torch.Tensor]) -> None:
        self.owner.forget(self)
        super().write(rows, packed)

    def append(self, packed: dict[str, torch.Tensor]) -> None:
        first, capacity = self.count, self.capacity
        self.reserve(first + next(iter(packed.values())).shape[2])
        self.count = first + next(iter(packed.values())).shape[2]
        targets = [super().view(first)]
        if self.staged is not None and self.capacity == capacity:
            self.owner.wait(self)
            targets.append({name: array[:, :, first : self.count] for name, array in self.staged.items()})
        else:
            self.owner.forget(self)
        for target in targets:
            for name, array in target.items():
                array.copy_(packed[name])

    def reserve(self, tiles: int, exact: bool = False) -> None:
        super().reserve(tiles, exact)
        self._pin()

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the batch on the host. A function that moves arrays to a device has no effect here."""
        self.owner.forget(self)
        super().map(lambda array: fn(array).to("cpu"))
        self._pin()

    def _pin(self) -> None:
        if self.device.type == "cuda":
            self.arrays = {n: x if x.is_pinned() else x.contiguous().pin_memory() for n, x in self.arrays.items()}

    def __deepcopy__(self, memo: dict) -> HostTileStore:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(self.__dict__, staged=None)
        new.owner = copy.deepcopy(self.owner, memo)
        new.arrays = {name: array.clone() for name, array in self.arrays.items()}
        new._pin()
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "staged": None}


class Slot:
    """One staging buffer: bytes on a device, and the stores whose tiles it holds or is receiving."""

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.stores: tuple[HostTileStore, ...] = ()
        self.ready: Any = None

    def release(self) -> None:
        for store in self.stores:
            store.staged = None
        self.stores, self.ready = (), None


class Offloader:
    """Stages the tiles of a cache's packed layers, in the order of the layers. A cache has one offloader."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self._devices: dict[torch.device, tuple[list[Slot], Any]] = {}

    def store(self, fields, batch: int, heads: int, device: torch.device) -> HostTileStore:
        """Make the store that replaces a `TileStore`."""
        return HostTileStore(fields, batch, heads, device, self)

    def enter(self, layer) -> None:
        """Prepare a layer that is about to attend: stage its tiles, and start to copy those of the next layer."""
        for current in (layer, self._after(layer)):
            if current is not None and current.is_initialized and current.tiles[0].count:
                self._stage(current.tiles, keep=layer.tiles)

    def fetch(self, store: HostTileStore) -> None:
        """Make `store.staged` readable on its device's current stream."""
        if store.staged is None:
            layer = next(layer for layer in self.layers if layer.tiles is not None and store in layer.tiles)
            self._stage(layer.tiles, keep=())
        self.wait(store)

    def wait(self, store: HostTileStore) -> None:
        slots, _ = self._of(store.device)
        for slot in slots:
            if store in slot.stores and slot.ready is not None:
                torch.cuda.current_stream(store.device).wait_event(slot.ready)
                slot.ready = None

    def forget(self, store: HostTileStore) -> None:
        """Drop the staged tiles of a layer whose existing tiles change."""
        slots, _ = self._of(store.device)
        for slot in slots:
            if store in slot.stores:
                self.wait(store)
                slot.release()
                slot.buffer = None

    @property
    def staging_nbytes(self) -> int:
        """Bytes of the staging buffers on all devices."""
        slots = [slot for pair, _ in self._devices.values() for slot in pair]
        return sum(slot.buffer.numel() for slot in slots if slot.buffer is not None)

    def _after(self, layer) -> Any:
        index = next(i for i, other in enumerate(self.layers) if other is layer)
        following = self.layers[(index + 1) % len(self.layers)]
        return None if following is layer else following

    def _of(self, device: torch.device) -> tuple[list[Slot], Any]:
        if device not in self._devices:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            self._devices[device] = ([Slot(), Slot()], stream)
        return self._devices[device]

    def _stage(self, stores: tuple[HostTileStore, ...], keep: tuple[HostTileStore, ...]) -> None:
        device = stores[0].device
        slots, stream = self._of(device)
        if any(slot.stores and slot.stores[0] is stores[0] for slot in slots):
            return
        free = [slot for slot in slots if not (slot.stores and keep and slot.stores[0] is keep[0])]
        slot = next((slot for slot in free if not slot.stores), free[0])
        slot.release()
        places, size = [], 0
        for store in stores:
            for name, array in store.arrays.items():
                places.append((store, name, array, size))
                size += -(-array.numel() * array.itemsize // ALIGNMENT) * ALIGNMENT
        if stream is not None:
            # Earlier readers of this buffer, and the copies to the host, were launched on the device's current stream.
            stream.wait_stream(torch.cuda.current_stream(device))
        if slot.buffer is None or slot.buffer.numel() < size:
            slot.buffer = None
            slot.buffer = torch.empty(size, dtype=torch.uint8, device=device)
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(device))
        for store in stores:
            store.staged = {}
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for store, name, array, start in places:
                part = slot.buffer[start : start + array.numel() * array.itemsize]
                store.staged[name] = part.view(array.dtype).view(array.shape)
                store.staged[name].copy_(array, non_blocking=True)
            slot.ready = stream.record_event() if stream is not None else None
        slot.stores = tuple(stores)

    def __deepcopy__(self, memo: dict) -> Offloader:
        memo[id(self)] = new = Offloader()
        new.layers = copy.deepcopy(self.layers, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_devices": {}}
