"""One attention layer's cache behind transformers' layer protocol; the same class for every quantizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from turboquant_hf.cache.copies import DecodedProperty
from turboquant_hf.cache.fixed import FixedLayer, current_step
from turboquant_hf.cache.handles import PackedKeys, PackedValues
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.cache.ring import STEP_TOKENS, RingTail
from turboquant_hf.cache.store import FIRST_TOKENS, SinkBuffer, TailBuffer, TileStore
from turboquant_hf.cache.word import warn_of_nan
from turboquant_hf.config import CachePreset
from turboquant_hf.kernels.decode import PackedSide
from turboquant_hf.kernels.dispatch import bad_heads, query_energy
from turboquant_hf.quantizers import Quantizer

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NO_CAPTURE = (
    "a cache counts its tokens on the host, which a CUDA graph does not repeat: run the step outside the graph. "
    "generate records decode steps by itself, and torch.compile(mode='reduce-overhead') records what is between caches"
)
NO_TRAINING = "a packed cache keeps no gradients and serves no training: pass use_cache=False, or use torch.no_grad()"


def _nan_for_inf(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """Stored scales are clamped, which would make a plausible number of an infinity."""
    return x if quantizer.marks_infinity else torch.where(x.isinf(), torch.nan, x)


def check_pair(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise ValueError for a first block that no cache can be made of."""
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


def autocast(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in one dtype: under torch.autocast rotary embeddings leave keys in float32, values are narrow."""
    kind = keys.device.type
    if keys.dtype == values.dtype or not torch.is_autocast_enabled(kind):
        return keys, values
    dtype = torch.get_autocast_dtype(kind)
    return keys.to(dtype), values.to(dtype)


class _RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(NO_TRAINING)


def refuse_backward(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """x as it is, tied to the graph of `source`: `backward` then says why it cannot work, instead of losing terms."""
    return _RefuseBackward.apply(x, source)


class TurboQuantLayer(CacheLayerMixin):
    """Sinks | packed tiles | tail, for one KV layer.

    `update` appends; tiles are encoded in `commit`, which the registered attention calls after it has seen the
    queries. Any other attention gets dense tensors from `update`, which commits at once.

    Args:
        preset: sizes and limits.
        keys, values: this layer's quantizers.
        returns_handles: asked at every `update`: does the live attention implementation read packed tiles?
        offloader: keeps the tiles in host memory (`cache.offload`); None leaves them on the layer's device.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = True

    def __init__(
        self,
        preset: CachePreset,
        keys: Quantizer,
        values: Quantizer,
        returns_handles: Callable[[], bool] = lambda: False,
        offloader: Offloader | None = None,
    ) -> None:
        self.preset = preset
        self.quantizers = (keys, values)
        self._returns_handles = returns_handles
        self.offloader = offloader
        if offloader is not None:
            offloader.layers.append(self)
        self.tiles: tuple[TileStore, TileStore] | None = None
        self.noted_starts: list[int] | None = None
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        if self.offloader is not None and self.tiles is not None:
            self.offloader.forget(self.tiles[0])
        self.tiles = None
        self.tail: TailBuffer | RingTail | None = None
        self.fixed: FixedLayer | None = None
        self.sinks: SinkBuffer | None = None
        self.states: tuple[dict, dict] = ({}, {})
        self._fitted = False
        self._query_energy: torch.Tensor | None = None
        self._query_tokens = 0
        self.step: Any = None
        """What the attention keeps of one decode step for the next (`attention/step.py`)."""

    # ------------------------------------------------------------------ transformers' protocol: growing

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        value_states = key_states if value_states is None else value_states
        check_pair(key_states, value_states)
        for quantizer, x in zip(self.quantizers, (key_states, value_states), strict=True):
            quantizer.validate(x.shape[-1], self.preset.tile)
        batch, heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.head_dims = (key_states.shape[-1], value_states.shape[-1])
        store = TileStore if self.offloader is None else self.offloader.store
        self.tiles = tuple(
            store(q.layout(dim, self.preset.tile, self.dtype), batch, heads, self.device)
            for q, dim in zip(self.quantizers, self.head_dims, strict=True)
        )
        self.tail = TailBuffer(key_states, value_states, self._tail_capacity)
        starts = self.noted_starts if self.noted_starts is not None else [0] * batch
        if len(starts) != batch:
            raise ValueError(f"padding was noted for {len(starts)} sequences, but the batch has {batch}")
        self.sinks = SinkBuffer(key_states, value_states, self.preset.sinks, starts)
        self.is_initialized = True

    @torch.compiler.disable  # counters in Python: a graph break here, where tracing would compile every step anew
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append [B, H, T, D] keys and values; returns what attention reads, as handles or dense tensors."""
        handles = self._returns_handles()
        self.append(key_states, value_states)
        if handles:
            return self.handles()
        if self.preset.encode_first:
            self.commit()
        dense = self.dense(0), self.dense(1)
        if not self.in_step:
            self.commit()
        return tuple(refuse_backward(x, key_states) for x in dense) if key_states.requires_grad else dense

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Store [B, H, T, D] keys and values; nothing of them is encoded before `commit`.

        In a `FixedStep` they are stored and counted on the device only; see `replayed`.
        """
        if key_states.is_cuda and not self.in_step and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NO_CAPTURE)
        key_states, value_states = autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        key_states, value_states = key_states.detach(), value_states.detach()
        if self.in_step:
            self.fixed.append(key_states, value_states)
            return
        self.unfix()
        self._leave_inference_mode()
        self.commit()
        if self.offloader is not None:
            self.offloader.enter(self)
        self.sinks.write(key_states, value_states, self.get_seq_length())
        self.tail.append(key_states, value_states)

    def handles(self) -> tuple[PackedKeys, PackedValues]:
        """What stands for the dense keys and values."""
        return PackedKeys(self), PackedValues(self)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        leading = (self.batch_size, self.num_heads, key_states.shape[-2] if key_states.dim() > 1 else 0)
        for name, x, dim in zip(("keys", "values"), (key_states, value_states), self.head_dims, strict=True):
            if x.shape != (*leading, dim) or x.dtype != self.dtype or x.device != self.device:
                raise ValueError(
                    f"{name}: {x.dtype} {list(x.shape)} on {x.device} does not continue this layer's {self.dtype} "
                    f"{[*leading, dim]} on {self.device}"
                )

    # ------------------------------------------------------------------ encoding

    def observe(self, query: torch.Tensor) -> None:
        """Count the queries [B, Hq, q, D] of the newest q tokens into the statistics, until the first encode."""
        if self._fitted or not self.quantizers[0].needs_statistics:
            return
        batch, heads, tokens, dim = query.shape
        kv_heads = self.num_heads
        if heads % kv_heads or dim != self.head_dims[0]:
            return
        position = self.get_seq_length() - tokens
        energy, count = query_energy(query.detach(), kv_heads, self.sinks.starts, position)
        if self._query_energy is None:
            self._query_energy, self._query_count = energy, count
        else:
            self._query_energy, self._query_count = self._query_energy + energy, self._query_count + count
        self._query_tokens += tokens

    def commit(self) -> None:
        """Encode every tile that is full and older than the recent window, once enough tokens were seen."""
        if not self.is_initialized:
            return
        tile = self.preset.tile
        ready = max(self.tail.count - self.preset.recent_window, 0) // tile
        if ready == 0 or not (self._fitted or self._seen_enough()):
            self.tail.own()
            return
        self.step = None  # it would keep the arrays that are replaced here
        stored = self.get_seq_length() - self.tail.count
        fresh = [self._tiled(x[:, :, : ready * tile]) for x in self.tail.view()]
        weight = self._weight(stored, ready * tile).unflatten(1, (ready, tile))
        if not self._fitted:
            self._fit(stored)
        written, states = [], []
        for store, quantizer, x, state in zip(self.tiles, self.quantizers, fresh, self.states, strict=True):
            x = _nan_for_inf(x, quantizer)
            if self.offloader is None:
                packed = store.extend(ready)
                quantizer.encode_into(x, state, weight, packed)
                state = quantizer.make_room(x, state, weight, packed, store.view(0, store.count - ready))
            else:
                packed = quantizer.encode(x, state, weight)
                before, state = state, quantizer.make_room(x, state, weight, packed, store.resident())
                if state is not before:
                    self.offloader.forget(store)
                store.append(packed)
            written += (*packed.values(), *state.values())
            states.append(state)
        if any(new is not old for new, old in zip(states, self.states, strict=True)):
            self.states = tuple(states)
        self._mark_bad_heads(fresh, weight)
        warn_of_nan(written, self.quantizers)
        self.tail.drop_front(ready * tile)

    def _mark_bad_heads(self, fresh: list[torch.Tensor], weight: torch.Tensor) -> None:
        gains = [state["gain"] for state in self.states if "gain" in state]
        if gains:
            bad = bad_heads(fresh, weight)
            for gain in gains:
                gain.masked_fill_(bad, torch.nan)

    def _seen_enough(self) -> bool:
        if not any(quantizer.needs_statistics for quantizer in self.quantizers):
            return True
        return self.get_seq_length() - min(self.sinks.first, default=0) >= self.preset.min_statistics

    def _fit(self, stored: int) -> None:
        """Freeze the statistics of all whole tiles in the tail, the recent window included."""
        tile = self.preset.tile
        whole = self.tail.count // tile
        weight = self._weight(stored, whole * tile).unflatten(1, (whole, tile))
        query_rms = None
        if self._query_energy is not None and 2 * self._query_tokens >= self.get_seq_length():
            query_rms = self._query_rms()
        self.states = tuple(
            quantizer.fit(self._tiled(x[:, :, : whole * tile]), weight, query_rms)
            for quantizer, x in zip(self.quantizers, self.tail.view(), strict=True)
        )
        self._fitted, self._query_energy = True, None

    def _query_rms(self) -> torch.Tensor:
        pooled = self._query_energy.sum(0, keepdim=True) / self._query_count.sum(0, keepdim=True).clamp(min=1)
        own = self._query_energy / self._query_count.clamp(min=1)
        return torch.where(self._query_count > 0, own, pooled).sqrt()

    def _weight(self, start: int, tokens: int) -> torch.Tensor:
        """[B, tokens] float32: 0 for padding and sinks (which are kept apart), 1 elsewhere."""
        position = torch.arange(start, start + tokens, device=self.device)
        return (position >= self.sinks.starts[:, None] + self.preset.sinks).float()

    def _tiled(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, self.preset.tile))

    # ------------------------------------------------------------------ steps at fixed addresses

    @property
    def places(self) -> tuple:
        """What a step points to: the same objects for as long as the addresses stay."""
        keys, values = self.tiles
        return keys.arrays, values.arrays, self.states, self.tail.arrays, self.sinks.arrays, self.sinks.starts

    @property
    def is_fitted(self) -> bool:
        """Whether the statistics are frozen, or there are none to wait for."""
        return self._fitted or not any(quantizer.needs_statistics for quantizer in self.quantizers)

    @property
    def in_step(self) -> bool:
        """Whether the forward pass that runs now is a `FixedStep` over this layer."""
        return self.fixed is not None and current_step() is not None

    @property
    def _tail_capacity(self) -> int:
        """Raw tokens that steps need room for once tiles are encoded as soon as they are due."""
        return self.preset.recent_window + self.preset.tile + STEP_TOKENS

    def fix(self, tokens: int, ahead: int, workspaces: dict[tuple, torch.Tensor]) -> FixedLayer:
        """Keep every array at its address, with room for a step of `tokens` and for `ahead` tiles; see `cache.fixed`.

        What is in place already stays: a recorded step remains valid while this returns the same object.
        """
        self._leave_inference_mode()
        self.commit()
        tile, stored = self.preset.tile, self.tiles[0].count
        wanted = self.tail.count + tokens
        if not isinstance(self.tail, RingTail) or wanted > self.tail.slots:
            waits = 0 if self.is_fitted else self.preset.min_statistics + tile
            usual = max(waits, self._tail_capacity)
            slots = -(-max(wanted, min(usual, wanted + max(FIRST_TOKENS, wanted // 8))) // tile) * tile
            self.tail = RingTail(*self.tail.view(), stored * tile, slots)
        for store in self.tiles:
            store.reserve(stored + ahead, exact=True)
        if self.fixed is None or not self.fixed.holds(self):
            self.step = None
            self.fixed = FixedLayer(self, workspaces)
        self.fixed.tell(stored, self.get_seq_length())
        return self.fixed

    def unfix(self) -> None:
        """Back to arrays that may move."""
        if self.fixed is not None:
            self.fixed = None
            tail = TailBuffer(*self.tail.arrays, self._tail_capacity)
            tail.append(*self.tail.view())
            self.tail = tail

    def replayed(self, tokens: int) -> None:
        """Count what a step has stored on the device, and encode what is due by now."""
        self.tail.count += tokens
        self.fixed.replayed(tokens)
        if self.fixed.statistics is not None:
            self._query_tokens += tokens
        if self.tail.count - self.preset.recent_window >= self.preset.tile:
            self.commit()

    def query_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of squares of queries [B, H, D] and their numbers [B, 1 or H, 1], as buffers that steps add to."""
        shape = self.batch_size, self.num_heads, self.head_dims[0]
        energy = torch.zeros(shape, dtype=torch.float32, device=self.device)
        count = torch.zeros(*shape[:2], 1, dtype=torch.float32, device=self.device)
        if self._query_energy is not None:
            energy += self._query_energy
            count += self._query_count
        self._query_energy, self._query_count = energy, count
        return energy, count

    # ------------------------------------------------------------------ reading

    def dense(self, index: int) -> torch.Tensor:
        """All keys (index 0) or values (1), [B, H, width, D] in the model's dtype, for code that cannot read tiles."""
        return self.held(index)

    def held(self, index: int) -> torch.Tensor:
        """All keys (index 0) or values (1), [B, H, T, D] in the model's dtype; raw where nothing is packed."""
        if self.in_step:
            return self.fixed.dense(index)
        store, tail = self.tiles[index], self.tail.view()[index]
        if store.count == 0:
            return tail
        packed = self._decode(index, 0, store.count)
        if self.preset.encode_first:
            tail = self._rounded(index, packed, tail)
        dense = torch.cat([packed, tail], dim=2)
        return self.sinks.overlay(dense, index, 0, dense.shape[2])

    def _rounded(self, index: int, packed: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        """The tail [B, H, T, D] as if what is older than the recent window were encoded, though it fills no tile yet.

        The tile it is tried in is filled up with the packed tokens before it: a mean of few tokens would flatter.
        """
        count, tile = tail.shape[2] - self.preset.recent_window, self.preset.tile
        if count <= 0:
            return tail
        before = -count % tile
        tiles = self._tiled(torch.cat([packed[:, :, packed.shape[2] - before :], tail[:, :, :count]], dim=2))
        weight = self._weight(packed.shape[2] - before, before + count).unflatten(1, (-1, tile))
        quantizer, state = self.quantizers[index], self.states[index]
        codes = quantizer.encode(_nan_for_inf(tiles, quantizer), state, weight)
        decoded = quantizer.decode(codes, state, self.head_dims[index], self.dtype).flatten(2, 3)
        return torch.cat([decoded[:, :, before:], tail[:, :, count:]], dim=2)

    def _decode(self, index: int, start: int, stop: int) -> torch.Tensor:
        quantizer, store, dim = self.quantizers[index], self.tiles[index], self.head_dims[index]
        return quantizer.decode(store.view(start, stop), self.states[index], dim, self.dtype).flatten(2, 3)

    @DecodedProperty
    def keys(self) -> torch.Tensor | None:
        """All keys [B, H, T, D] in the model's dtype, decoded at every access; to be read, not edited."""
        return self.dense(0) if self.is_initialized else None

    @DecodedProperty
    def values(self) -> torch.Tensor | None:
        """All values [B, H, T, D] in the model's dtype, decoded at every access; to be read, not edited."""
        return self.dense(1) if self.is_initialized else None

    def get_seq_length(self, *args) -> torch.Tensor | int:
        """Tokens per sequence; inside a `FixedStep` those before the step, on the device."""
        if self.in_step:
            return current_step().length
        return self.tiles[0].count * self.preset.tile + self.tail.count if self.is_initialized else 0

    @property
    def width(self) -> int:
        """Tokens of the dense tensors, and of the handles that stand for them."""
        # A fixed step reads whole arrays: how much of them is in use is known on the device only.
        return self.fixed.room if self.in_step else self.get_seq_length()

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        # Upstream 5.0 passes the positions, later versions their number.
        if self.in_step:
            return self.fixed.room, 0
        query_length = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        if not self.is_initialized:
            raise AttributeError("batch_size is known after the first update")
        return self.tail.arrays[0].shape[0]

    @property
    def num_heads(self) -> int:
        """KV heads of this layer."""
        return self.tail.arrays[0].shape[1]

    def packed_sides(self, *, spare: bool = False) -> list[PackedSide]:
        """Keys and values of rotated quantizers as decode kernels read them; `spare`: and the room for more tiles."""
        parts = zip(self.quantizers, self.tiles, self.states, self.head_dims, strict=True)
        return [
            quantizer.packed_side(store.arrays if spare else store.view(), state, dim)
            for quantizer, store, state, dim in parts
        ]

    # ------------------------------------------------------------------ transformers' protocol: changing

    def crop(self, tokens: int) -> None:
        """Remove the newest -tokens tokens (tokens < 0), or keep the first `tokens` (> 0); 0 changes nothing.

        A cut inside a packed tile decodes the rest of that tile into the tail.
        """
        length = self.get_seq_length()
        tokens = int(tokens)  # early versions count accepted candidates on the device
        keep = length if tokens == 0 else (tokens if tokens > 0 else max(length + tokens, 0))
        if keep >= length:
            return
        if keep == 0:
            self.reset()
            return
        self._leave_inference_mode()
        self.commit()
        whole, part = divmod(keep, self.preset.tile)
        stored = self.tiles[0].count
        if whole >= stored:
            self.tail.crop(keep - stored * self.preset.tile)
            return
        self.unfix()
        cut = [self._decode(index, whole, whole + 1)[:, :, :part] for index in (0, 1)] if part else None
        for store in self.tiles:
            store.count = whole
        self.tail.crop(0)
        if cut is not None:
            start = whole * self.preset.tile
            self.tail.append(*(self.sinks.overlay(x.clone(), index, start, keep) for index, x in enumerate(cut)))

    def reset(self) -> None:
        """Forget everything, learned statistics and noted padding included."""
        self.noted_starts = None
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.fixed is not None:
            self.fixed.reorder(beam_idx.to(self.device))
            self.sinks.reordered()
            return
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_batch(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            if self.noted_starts is not None:
                self.noted_starts = fn(torch.tensor(self.noted_starts)).tolist()
            return
        self.commit()
        self._map(fn)

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.step = None
        self.unfix()
        for part in (*self.tiles, self.tail, self.sinks):
            part.map(fn)
        self.states = tuple({name: fn(x) for name, x in state.items()} for state in self.states)
        if self._query_energy is not None:
            self._query_energy, self._query_count = fn(self._query_energy), fn(self._query_count)

    def _leave_inference_mode(self) -> None:
        """Copy what was made under torch.inference_mode(), which nobody may write to outside it."""
        if not torch.is_inference_mode_enabled() and self.tail.is_inference():
            self._map(torch.clone)

    def offload(self) -> None:
        """Move everything to the CPU."""
        if self.is_initialized:
            self.commit()
            self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized and self.tail.arrays[0].device != self.device:
            self._map(lambda x: x.to(self.device, non_blocking=True))

    def note_padding(self, starts: list[int] | None) -> None:
        """Say where each sequence's real tokens begin, before anything is stored: one position a sequence, or None."""
        self.noted_starts = None if starts is None else list(starts)

    def learn_padding(self, starts: list[int]) -> None:
        """The same for a layer that holds raw tokens already; nothing may be encoded yet."""
        if starts == self.sinks.first:
            return
        self.unfix()
        self.sinks.set_starts(starts, self.device)
        self.sinks.write(*self.tail.view(), position=0)

    # ------------------------------------------------------------------ memory

    @property
    def nbytes(self) -> int:
        """Bytes that hold this layer's tokens and what is needed to read them."""
        if not self.is_initialized:
            return 0
        learned = [x for state in self.states for x in state.values()]
        if self._query_energy is not None:
            learned += [self._query_energy, self._query_count]
        state = sum(x.numel() * x.itemsize for x in learned)
        return sum(part.nbytes for part in (*self.tiles, self.tail, self.sinks)) + state

    @property
    def spare_nbytes(self) -> int:
        """Bytes allocated ahead for tokens to come."""
        if not self.is_initialized:
            return 0
        return sum(part.spare_nbytes for part in (*self.tiles, self.tail))

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens in a 16-bit cache."""
        if not self.is_initialized:
            return 0
        return 2 * self.batch_size * self.num_heads * self.get_seq_length() * sum(self.head_dims)

    def __repr__(self) -> str:
        names = "/".join(quantizer.name for quantizer in self.quantizers)
        return f"{type(self).__name__}({names}, tokens={self.get_seq_length()})"
