"""`Storage`: what a packed layer holds, and all operations on it. Every kind of packed layer is built on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from turboquant_hf.cache.encoder import Encoder
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.cache.ring import STEP_TOKENS, RingTail
from turboquant_hf.cache.sides import SIDES, Side, Sides
from turboquant_hf.cache.sinks import SinkBuffer
from turboquant_hf.cache.store import TailBuffer, TileStore
from turboquant_hf.config import CachePreset
from turboquant_hf.quantizers import Quantizer

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Storage:
    """Sinks | packed tiles | tail, and the encoder that turns the tail into tiles.

    Args:
        preset: sizes and limits.
        keys, values: this layer's quantizers.
        offloader: keeps the tiles in host memory (`cache.offload`); None leaves them on the layer's device.

    Attributes:
        tiles: a `TileStore` of keys and one of values; tile n holds positions [n * tile, (n + 1) * tile).
        tail: the raw tokens behind the tiles.
        sinks: the first real tokens of every sequence, raw.
        encoder: the quantizers, and what they have learned.
        step: the prepared kernel call of the next decode step (`attention/step.py`), or None.
        noted_starts: where the sequences begin, if somebody has noted it, else None.
    """

    def __init__(
        self, preset: CachePreset, keys: Quantizer, values: Quantizer, offloader: Offloader | None = None
    ) -> None:
        self.preset, self.quantizers, self.offloader = preset, Sides(keys, values), offloader
        if offloader is not None:
            offloader.layers.append(self)
        self.tiles: Sides | None = None
        self.noted_starts: list[int] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything except the noted padding."""
        self.changed()
        self.is_initialized = False
        if self.offloader is not None and self.tiles is not None:
            self.offloader.forget(self.tiles.keys)
        self.tiles = None
        self.tail: TailBuffer | RingTail | None = None
        self.sinks: SinkBuffer | None = None
        self.encoder = Encoder(self.quantizers, self.preset.min_statistics)

    def changed(self) -> None:
        """Note that tokens or arrays are about to change. A prepared step would keep the old arrays in memory."""
        self.step: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make empty arrays for the sizes, dtype and device of keys and values [B, H, T, D] (T may be 0)."""
        check_pair(key_states, value_states)
        for quantizer, x in zip(self.quantizers, (key_states, value_states), strict=True):
            quantizer.validate(x.shape[-1], self.preset.tile)
        batch, heads = key_states.shape[:2]
        starts = self.noted_starts if self.noted_starts is not None else [0] * batch
        if len(starts) != batch:
            raise ValueError(f"padding was noted for {len(starts)} sequences, but the batch has {batch}")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.head_dims = Sides(key_states.shape[-1], value_states.shape[-1])
        make = TileStore if self.offloader is None else self.offloader.store
        layouts = self.quantizers.map(lambda q, dim: q.layout(dim, self.preset.tile, self.dtype), self.head_dims)
        self.tiles = layouts.map(lambda layout: make(layout, batch, heads, self.device))
        self.tail = TailBuffer(key_states, value_states, self.tail_capacity)
        self.sinks = SinkBuffer(key_states, value_states, self.preset.sinks, starts)
        self.is_initialized = True

    # ------------------------------------------------------------------ sizes

    @property
    def stored(self) -> int:
        """Tokens in tiles."""
        return self.tiles.keys.count * self.preset.tile

    @property
    def tokens(self) -> int:
        """Tokens per sequence, as the host counts them."""
        return self.stored + self.tail.count if self.is_initialized else 0

    @property
    def states(self) -> Sides:
        """What the quantizers of keys and values have learned."""
        return self.encoder.states

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("batch_size is known after the first update")
        return self.tail.arrays.keys.shape[0]

    @property
    def num_heads(self) -> int:
        """KV heads of this layer."""
        return self.tail.arrays.keys.shape[1]

    @property
    def tail_capacity(self) -> int:
        """Raw tokens that the tail has room for: the recent window, a tile that fills up, and a step's tokens."""
        return self.preset.recent_window + self.preset.tile + STEP_TOKENS

    @property
    def places(self) -> tuple:
        """The objects that a step points to. They are the same objects as long as the addresses stay."""
        keys, values = self.tiles
        return keys.arrays, values.arrays, self.states, self.tail.arrays, self.sinks.arrays, self.sinks.starts

    @property
    def nbytes(self) -> int:
        """Bytes of this layer's tokens and of everything that is needed to read them."""
        return sum(part.nbytes for part in (*self.tiles, self.tail, self.sinks, self.encoder)) if self.tiles else 0

    @property
    def spare_nbytes(self) -> int:
        """Bytes allocated ahead for new tokens."""
        return sum(part.spare_nbytes for part in (*self.tiles, self.tail)) if self.tiles else 0

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens in a 16-bit cache."""
        return 2 * self.batch_size * self.num_heads * self.tokens * sum(self.head_dims) if self.tiles else 0

    # ------------------------------------------------------------------ writing

    def check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raise ValueError if keys and values do not continue these arrays."""
        leading = (self.batch_size, self.num_heads, key_states.shape[-2] if key_states.dim() > 1 else 0)
        for name, x, dim in zip(SIDES, (key_states, value_states), self.head_dims, strict=True):
            if x.shape != (*leading, dim) or x.dtype != self.dtype or x.device != self.device:
                raise ValueError(
                    f"{name}: {x.dtype} {list(x.shape)} on {x.device} does not continue this layer's {self.dtype} "
                    f"{[*leading, dim]} on {self.device}"
                )

    def commit(self) -> None:
        """Encode every tile that is full and older than the recent window, once enough tokens were seen."""
        if not self.is_initialized:
            return
        tile, stored, encoder = self.preset.tile, self.stored, self.encoder
        ready = max(self.tail.count - self.preset.recent_window, 0) // tile
        if ready == 0 or not encoder.has_seen_enough(self.tokens - min(self.sinks.first, default=0)):
            self.tail.own()  # nothing is encoded now, so the tail must not stay a view of the caller's tensors
            return
        self.changed()
        weight = self.weight(stored, self.tail.count // tile)
        seen = self._tail_tiles(weight.shape[1]), weight  # the recent window is measured too
        if not encoder.fitted:
            encoder.fit(*seen, self.tokens)
        elif encoder.unsettled is not None:
            encoder.fit_again(*seen, ready * tile, self.tiles, self.weight(0, stored // tile))
        encoder.encode(self._tail_tiles(ready), weight[:, :ready], self.tiles)
        self.tail.drop_front(ready * tile)

    def _tail_tiles(self, count: int) -> Sides:
        """The oldest tiles of the tail, [B, H, count, T, D]."""
        tile = self.preset.tile
        return self.tail.view().map(lambda x: x[:, :, : count * tile].unflatten(2, (count, tile)))

    def weight(self, start: int, tiles: int) -> torch.Tensor:
        """Weights [B, tiles, T] float32 from position `start` on: 0 for padding and sinks, else 1."""
        position = torch.arange(start, start + tiles * self.preset.tile, device=self.device)
        counts = position >= self.sinks.starts[:, None] + self.preset.sinks
        return counts.float().unflatten(1, (tiles, self.preset.tile))

    # ------------------------------------------------------------------ reading

    def held(self, side: Side, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Positions [start, stop) of keys or values, [B, H, stop - start, D] in the model's dtype; all by default.

        The result is a view of the raw tokens if none of the positions is packed.
        """
        tile, stored, parts = self.preset.tile, self.stored, []
        stop = self.tokens if stop is None else stop
        if start < min(stop, stored):
            low, high = start // tile, -(-min(stop, stored) // tile)
            packed = self.sinks.overlay(self.decode(side, low, high), side, low * tile, high * tile)
            parts.append(packed[:, :, start - low * tile : stop - low * tile])
        if stop > stored or not parts:
            parts.append(self.tail.view().of(side)[:, :, max(start - stored, 0) : max(stop - stored, 0)])
        if len(parts) == 1 and not (self.stored and stop - start == self.tokens):
            return parts[0]
        return torch.cat(parts, dim=2)  # a copy: some quantizers decode to a view of the tiles

    def decode(self, side: Side, start: int, stop: int) -> torch.Tensor:
        """Tiles [start, stop) of keys or values, decoded: [B, H, tokens, D]. At the sinks, the numbers mean nothing."""
        quantizer, store, dim = self.quantizers.of(side), self.tiles.of(side), self.head_dims.of(side)
        return quantizer.decode(store.view(start, stop), self.states.of(side), dim, self.dtype).flatten(2, 3)

    def packed_sides(self, *, spare: bool = False) -> Sides:
        """`PackedSide`s, as decode kernels read rotated quantizers. `spare` adds the room for more tiles."""
        tiles = self.tiles.map(lambda store: store.arrays if spare else store.view())
        return self.quantizers.map(
            lambda quantizer, *side: quantizer.packed_side(*side), tiles, self.states, self.head_dims
        )

    # ------------------------------------------------------------------ changing

    def cut(self, keep: int) -> None:
        """Keep the first `keep` tokens. A cut inside a tile decodes the part of the tile that is kept into the tail."""
        self.changed()
        if keep >= self.stored:
            self.tail.crop(keep - self.stored)
            return
        whole = keep // self.preset.tile
        rest = [self.held(side, whole * self.preset.tile, keep) for side in SIDES]
        for store in self.tiles:
            store.count = whole
        self.tail.crop(0)
        self.tail.append(*rest)

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every array by fn(array); fn changes the batch or the device."""
        self.changed()
        for part in (*self.tiles, self.tail, self.sinks, self.encoder):
            part.map(fn)

    # ------------------------------------------------------------------ files

    def export(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(description for JSON, arrays by name): what a file holds of this layer."""
        if not self.is_initialized:
            return {"noted": self.noted_starts, "filled": False}, {}
        self.commit()
        encoder, arrays = self.encoder, {}
        for number, side in enumerate(SIDES):
            arrays |= {f"tiles.{number}.{name}": x for name, x in self.tiles.of(side).resident().items()}
            arrays |= {f"tail.{number}": self.tail.view().of(side), f"sinks.{number}": self.sinks.arrays.of(side)}
            arrays |= {f"state.{number}.{name}": x for name, x in self.states.of(side).items()}
        if encoder.energy is not None:
            arrays |= {"query.energy": encoder.energy, "query.count": encoder.count}
        if encoder.unsettled is not None:
            arrays |= {"unsettled": encoder.unsettled}
        return {
            "noted": self.noted_starts,
            "filled": True,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "shape": [self.batch_size, self.num_heads, *self.head_dims],
            "tiles": self.tiles.keys.count,
            "tail": self.tail.count,
            "first": self.sinks.first,
            "fitted": encoder.fitted,
            "states": [sorted(state) for state in self.states],
            "query_tokens": encoder.queried,
            "query": encoder.energy is not None,
            "unsettled": encoder.unsettled is not None,
        }, arrays

    def restore(self, described: dict[str, Any], take: Callable[..., torch.Tensor], device: torch.device) -> None:
        """Fill an empty layer with what `export` gave.

        take: a function (name[, shape[, dtype]]) -> the array on `device`; checks its shape and dtype.
        """
        batch, heads, *dims = described["shape"]
        dtype, self.noted_starts = getattr(torch, described["dtype"]), described["first"]
        self.lazy_initialization(*(torch.empty(batch, heads, 0, dim, dtype=dtype, device=device) for dim in dims))
        self.noted_starts = described["noted"]
        tail, states = [], []
        for number, (side, dim) in enumerate(zip(SIDES, dims, strict=True)):
            lead, fields = (batch, heads, described["tiles"]), self.tiles.of(side).fields
            packed = {n: take(f"tiles.{number}.{n}", (*lead, *f.shape), f.dtype) for n, f in fields.items()}
            if described["tiles"]:
                self.tiles.of(side).append(packed)
            tail.append(take(f"tail.{number}", (batch, heads, described["tail"], dim), dtype))
            sinks = self.sinks.arrays.of(side)
            sinks.copy_(take(f"sinks.{number}", tuple(sinks.shape), dtype))
            states.append({name: take(f"state.{number}.{name}") for name in described["states"][number]})
        if any(x.shape[0] != batch for state in states for x in state.values()):
            raise ValueError(f"state: not of {batch} sequences")
        self.tail.append(*tail)
        queries = (take("query.energy"), take("query.count")) if described["query"] else (None, None)
        unsettled = take("unsettled", (batch,), torch.int8) if described.get("unsettled") else None
        self.encoder.restore(Sides(*states), described["fitted"], *queries, described["query_tokens"], unsettled)


def check_pair(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError if no arrays can be made for this first block of keys and values."""
    for name, x in (("keys", keys), ("values", values)):
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype={x.dtype} is not supported; allowed: {', '.join(map(str, DTYPES))}")
        if x.dim() != 4:
            raise ValueError(f"{name}: shape={list(x.shape)} is not supported; allowed: [B, H, tokens, D]")
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype:
        raise ValueError(
            f"values: {values.dtype} {list(values.shape)} do not belong to keys {keys.dtype} {list(keys.shape)}: "
            "only the last dimension may differ"
        )
