"""Decode steps over arrays that stay at their addresses, so that a CUDA graph can record one step and replay it.

A growing cache counts its tokens in Python and moves its arrays when they grow. While a decoding loop runs
(`generation.steps`), the layers of the cache are fixed instead:

    tiles      as they are, with room for the tiles of the coming steps
    raw tail   a ring of R slots; the token at position p lies in slot p % R
    counts     int32 [3] on the device: tiles encoded, tokens held, and a counter of programs, by which the
               last program of `append` knows that it is the last

A step appends to the ring and attends by the counts, both on the device. Between two steps, the host encodes the tiles
that are due by the layer's own rule (`Storage.commit`). The host knows how many tokens were replayed.
"""

from __future__ import annotations

import itertools
import threading
from operator import is_
from typing import Any

import torch

from turboquant_hf.cache.ring import unrolled
from turboquant_hf.cache.sides import SIDES, Side, Sides
from turboquant_hf.kernels.append.reference import FixedTokens
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.kernels.dispatch import add_queries, append_tokens, decode_attention, decode_workspace
from turboquant_hf.primitives.memo import once
from turboquant_hf.quantizers import Quantizer
from turboquant_hf.quantizers.rotated import reads_packed

WORKSPACE_ROWS = 16
"""Query rows per KV head for which the shared workspace is made; a step with more rows gets its own memory."""
_LOCAL = threading.local()
_SERIALS = itertools.count()


def current_step() -> FixedStep | None:
    """The `FixedStep` that this thread's forward pass belongs to, or None."""
    return getattr(_LOCAL, "step", None)


class FixedStep:
    """A context around one forward pass over a fixed cache: positions and masks that never leave the device.

    Args:
        counts: int32 [3], the counts of any layer of the cache: all layers hold the same tokens.
        tokens: new tokens per sequence in this step.
        room: positions that the cache has room for.
        padding: bool [B, room], False hides a position; None hides nothing.

    Attributes:
        length: int64 [], tokens held before the step.
    """

    def __init__(self, counts: torch.Tensor, tokens: int, room: int, padding: torch.Tensor | None) -> None:
        self.counts, self.tokens, self.room, self.padding = counts, tokens, room, padding
        self._masks: dict[Any, torch.Tensor] = {}

    def __enter__(self) -> FixedStep:
        self._masks.clear()
        self.length = self.counts[1].long()
        _LOCAL.step = self
        return self

    def __exit__(self, *exc: Any) -> None:
        _LOCAL.step = None

    def positions(self) -> torch.Tensor:
        """Positions of the new tokens, int64 [tokens]."""
        return self.length + torch.arange(self.tokens, device=self.length.device)

    def full_mask(self) -> torch.Tensor:
        """The causal mask with the padding hidden, bool [B or 1, 1, tokens, room], for attention over dense tensors."""
        if None not in self._masks:
            seen = torch.arange(self.room, device=self.length.device) <= self.positions()[:, None]
            self._masks[None] = self._with_padding(seen, self.padding)
        return self._masks[None]

    def window_mask(self, window: int, slots: int) -> torch.Tensor:
        """bool [B or 1, 1, tokens, slots] for a ring of `slots` tokens whose newest are the step's own.

        A token sees itself and the window - 1 tokens before it.
        """
        if (window, slots) not in self._masks:
            positions = self.positions()[:, None]
            newest = self.length + self.tokens - 1
            # The position in each slot of the ring; negative where the slot is still empty.
            held = newest - (newest - torch.arange(slots, device=newest.device)) % slots
            seen = (held >= 0) & (held <= positions) & (held > positions - window)
            padding = None if self.padding is None else self.padding.index_select(1, held.clamp(min=0))
            self._masks[window, slots] = self._with_padding(seen, padding)
        return self._masks[window, slots]

    @staticmethod
    def _with_padding(seen: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        return seen[None, None] if padding is None else (seen[None] & padding[:, None])[:, None]


class FixedLayer:
    """The arrays of one `TurboQuantLayer` at fixed addresses, and what a step does with them on the device.

    Args:
        layer: a layer whose tail is a `RingTail`.
        workspaces: (device, B * H, D) -> the decode kernel's workspace, shared by the layers of a cache.

    Attributes:
        serial: a number that no other `FixedLayer` of this process has or had.
        room: positions that the arrays have room for.
        free: tokens that steps may store before the layer must be fixed again; 0 once anything but a step changed it.
    """

    def __init__(self, layer: Any, workspaces: dict[tuple, torch.Tensor]) -> None:
        self.quantizers, self.head_dims, self.tile = layer.quantizers, layer.head_dims, layer.preset.tile
        self.dtype, self.threshold = layer.dtype, layer.preset.sparse_v_threshold
        self._places = layer.places
        self.tiles = Sides(*self._places[:2])
        shape, where = (layer.batch_size, layer.num_heads, self.tile), layer.device
        self.states = layer.states.map(
            lambda state, *side: state or _first_state(*side, shape, where), self.quantizers, self.head_dims
        )
        self.ring, self.sinks, self.starts = layer.tail.arrays, layer.sinks.arrays, layer.sinks.starts
        self.room = layer.tiles.keys.capacity * self.tile + layer.tail.slots
        self.reads_packed = reads_packed(*self.quantizers)
        self.serial, self.free = next(_SERIALS), 0
        self.counts = torch.zeros(3, dtype=torch.int32, device=layer.device)
        self._known = (0, 0)
        where = (layer.device, layer.batch_size * layer.num_heads, self.head_dims.keys)
        if where not in workspaces:
            workspaces[where] = decode_workspace(where[1], WORKSPACE_ROWS, where[2], layer.device)
        self.workspace = workspaces[where]
        if layer.device.type == "cuda":
            self._warm(layer)
        self.statistics, self.unsettled = None, layer.encoder.unsettled
        if layer.encoder.observes:
            self.statistics = layer.encoder.buffers((*shape[:2], self.head_dims.keys), layer.device)

    def _warm(self, layer: Any) -> None:
        """Make the rotations and tables that kernels keep, once per kind of layer.

        They are copied from the host, and such a copy cannot be recorded.
        """
        kinds = self.quantizers.map(lambda quantizer: quantizer.kind)
        warmed = _warmed(kinds, self.head_dims, layer.num_heads, self.dtype, layer.device)
        if not warmed.is_set():
            for side in SIDES:
                self.dense(side)
            if self.reads_packed:
                self.attend(torch.zeros_like(self.ring.keys[:, :, :1]), scaling=1.0)
            warmed.set()

    def holds(self, layer: Any) -> bool:
        """Whether these are still the arrays of the layer."""
        return all(map(is_, self._places, layer.places))

    def tell(self, layer: Any) -> None:
        """Set the counts on the device to what the host knows."""
        tiles, length, self.free = layer.tiles.keys.count, layer.tokens, layer.tail.slots - layer.tail.count
        if self._known != (tiles, length):
            self.counts[0].fill_(tiles)
            self.counts[1].fill_(length)
            self._known = (tiles, length)

    def replayed(self, tokens: int) -> None:
        """Note that a step has counted `tokens` on the device."""
        self._known, self.free = (self._known[0], self._known[1] + tokens), self.free - tokens

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new tokens [B, H, q, D] in the ring, and in the sinks until those are full."""
        raw = RawTokens(*self.ring), RawTokens(*self.sinks)
        append_tokens(keys, values, FixedTokens(*raw, self.starts, self.counts[:2], self.counts[2:], self.room))

    def observe(self, query: torch.Tensor) -> None:
        """Count the new tokens' queries [B, Hq, q, D] into the statistics, until the first encode."""
        if self.statistics is not None:
            energy, count = self.statistics
            add_queries(query, energy, count[:, :, 0], self.counts[:2], self.starts)

    def attend(self, query: torch.Tensor, *, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """`decode_attention` over all tokens held: [B, Hq, q, D] -> [B, Hq, q, Dv]. Needs `reads_packed`."""
        # Made again in every step, because some quantizers put the means of all tiles together from two arrays.
        described = self.tiles, self.states, self.head_dims
        sides = self.quantizers.map(lambda quantizer, *side: quantizer.packed_side(*side), *described)
        raw = RawTokens(*self.sinks), RawTokens(*self.ring)
        history = History(*sides, *raw, self.starts, self.counts[:2])
        scoring = Scoring(**options, sparse_v_threshold=self.threshold)
        return decode_attention(query, history, scoring, mask=mask, workspace=self.workspace)

    def dense(self, side: Side) -> torch.Tensor:
        """All keys or values, [B, H, room, D] in the model's dtype; zeros behind the newest token."""
        arrays = (self.quantizers, self.tiles, self.states, self.head_dims, self.ring, self.sinks)
        quantizer, tiles, state, dim, ring, sinks = (x.of(side) for x in arrays)
        decoded = quantizer.decode(tiles, state, dim, self.dtype).flatten(2, 3)
        return unrolled(ring, decoded, sinks, self.starts, self.counts, self.tile, self.room)

    def reorder(self, index: torch.Tensor) -> None:
        """Replace the batch by the sequences `index` [B], in place: beams change between two replays."""
        arrays = [x for part in (*self.tiles, *self.states) for x in part.values()]
        arrays += [*self.ring, *self.sinks, self.starts, *(self.statistics or ())]
        arrays += [] if self.unsettled is None else [self.unsettled]
        for x in arrays:
            x.copy_(x.index_select(0, index))


@once(maxsize=512)
def _warmed(*kind: Any) -> threading.Event:
    """The same event for all layers of one kind. It is set once a layer of this kind has been warmed."""
    return threading.Event()


def _first_state(
    quantizer: Quantizer, dim: int, shape: tuple[int, int, int], device: torch.device
) -> dict[str, torch.Tensor]:
    """A state for steps before the first tile. shape: (sequences, heads, tokens per tile)."""
    batch, heads, tile = shape
    state = quantizer.empty_state(heads, dim, tile, device)
    return {name: x.expand(batch, *x.shape[1:]).contiguous() for name, x in state.items()}
