"""One layer of a preallocated cache behind transformers' layer protocol."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.utils import logging

from turboquant_hf.cache import static_ops
from turboquant_hf.cache.copies import DecodedProperty
from turboquant_hf.cache.fixed import WORKSPACE_ROWS
from turboquant_hf.cache.handles import PackedHandle
from turboquant_hf.cache.layer import autocast, check_pair
from turboquant_hf.cache.ring import STEP_TOKENS
from turboquant_hf.cache.static_due import DueState
from turboquant_hf.cache.static_plan import StaticPlan, plan_name
from turboquant_hf.cache.static_state import StaticState
from turboquant_hf.config import CachePreset
from turboquant_hf.kernels.dispatch import decode_workspace
from turboquant_hf.quantizers import Quantizer

logger = logging.get_logger(__name__)

ALLOCATION = (
    "a static cache cannot be allocated inside a compiled region; call cache.early_initialization(batch_size, "
    "num_heads, head_dim, dtype, device) before the first compiled forward"
)
"""With fullgraph=True this is the reason in the compiler's error; without, the graph breaks and it is a hint."""


class TurboQuantStaticLayer(CacheLayerMixin):
    """Sinks, packed tiles and a ring of raw tokens for `max_cache_len` tokens, at addresses that never change.

    Traced code calls ops on `arena` and `counts` and reads no other state that steps change. Up to 16 new tokens are
    stored raw in `update`; a longer chunk is attended to first and then stored by `store`.

    Args:
        preset: sizes and limits.
        keys, values: this layer's quantizers.
        max_cache_len: tokens that fit.
        returns_handles: asked at every `update`: does the live attention implementation read packed tiles?
        workspaces: by device, what all layers of a cache share.
    """

    is_compileable = True
    is_sliding = False
    in_step = False
    is_croppable = True
    supports_early_init = True

    def __init__(
        self,
        preset: CachePreset,
        keys: Quantizer,
        values: Quantizer,
        max_cache_len: int,
        returns_handles: Callable[[], bool] = lambda: False,
        workspaces: dict[torch.device, torch.Tensor] | None = None,
    ) -> None:
        if preset.encode_first:
            raise ValueError("encode_first=True is not supported by a static cache; allowed: False")
        self.preset, self.quantizers, self.max_cache_len = preset, (keys, values), max_cache_len
        self._returns_handles = returns_handles
        self._workspaces = {} if workspaces is None else workspaces
        self.noted_starts: list[int] | None = None
        self.read_by_us = False
        self.is_initialized = False

    # ------------------------------------------------------------------ transformers' protocol: growing

    @torch.compiler.disable(reason=ALLOCATION)
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate everything for the batch, heads, dtype and device of [B, H, T, D] states (T may be 0)."""
        value_states = key_states if value_states is None else value_states
        check_pair(key_states, value_states)
        for quantizer, x in zip(self.quantizers, (key_states, value_states), strict=True):
            quantizer.validate(x.shape[-1], self.preset.tile)
        batch, heads = key_states.shape[:2]
        if self.noted_starts is not None and len(self.noted_starts) != batch:
            raise ValueError(f"padding was noted for {len(self.noted_starts)} sequences, but the batch has {batch}")
        self.plan = StaticPlan(
            quantizers=self.quantizers,
            head_dims=(key_states.shape[-1], value_states.shape[-1]),
            batch=batch,
            heads=heads,
            max_len=self.max_cache_len,
            dtype=key_states.dtype,
            device=key_states.device,
            tile=self.preset.tile,
            sinks=self.preset.sinks,
            recent_window=self.preset.recent_window,
            min_statistics=self.preset.min_statistics,
            sparse_v_threshold=self.preset.sparse_v_threshold,
        )
        device = key_states.device
        with torch.inference_mode(False):  # what is made there cannot be written to outside it
            self.arena, self.counts = self.plan.allocate()
            if device not in self._workspaces:
                rows = batch * heads, WORKSPACE_ROWS
                self._workspaces[device] = decode_workspace(*rows, self.plan.head_dims[0], device)
        self.workspace, self.reads_packed = self._workspaces[device], self.plan.reads_packed
        self._make_known()
        self._set_starts()
        if device.type == "cuda":
            DueState(self.plan_name, self.arena, self.counts).warm(self.workspace)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = self.max_batch_size = batch
        self.num_heads = heads
        self.head_dims = self.plan.head_dims
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take [B, H, q, D] keys and values; returns what attention reads, as handles or dense [B, H, max_len, D]."""
        key_states, value_states = autocast(key_states, value_states)
        if not self.is_initialized:
            if torch.compiler.is_compiling():
                _allocate_between_graphs(self, key_states, value_states)
            else:
                self.lazy_initialization(key_states, value_states)
        if not torch.compiler.is_compiling():
            self._check(key_states, value_states)
        key_states, value_states = key_states.detach(), value_states.detach()
        chunk = key_states.shape[2] > STEP_TOKENS
        if not chunk:
            static_ops.append(key_states, value_states, self.arena, self.counts, self.plan_name)
        if self._returns_handles():
            pending = PendingChunk(self, key_states, value_states) if chunk else None
            return StaticKeys(self, pending), StaticValues(self, pending)
        if chunk:
            dense = self.dense_with(key_states, value_states)
            self.store(key_states, value_states)
        else:
            dense = self.dense()
            self.commit()
        return dense

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        leading = (self.batch_size, self.num_heads, key_states.shape[2] if key_states.dim() == 4 else 0)
        for name, x, dim in zip(("keys", "values"), (key_states, value_states), self.head_dims, strict=True):
            if x.shape != (*leading, dim) or x.dtype != self.dtype or x.device != self.device:
                raise ValueError(
                    f"{name}: {x.dtype} {list(x.shape)} on {x.device} does not continue this layer's {self.dtype} "
                    f"{[*leading, dim]} on {self.device}"
                )
        if key_states.shape[2] > STEP_TOKENS:
            self._state().check_room(int(self.counts[1]), key_states.shape[2])

    def store(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        query: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> None:
        """Store a chunk that attention has seen; `starts` [B] is the first one's left padding."""
        static_ops.store(key_states, value_states, query, starts, self.arena, self.counts, self.plan_name)

    def commit(self, query: torch.Tensor | None = None) -> None:
        """Encode what is old enough, after attention has seen it."""
        static_ops.commit(query, self.arena, self.counts, self.plan_name)

    # ------------------------------------------------------------------ reading

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, [B, H, max_len, D] in the model's dtype; zeros behind the newest token."""
        return static_ops.dense(self.arena, self.counts, self.plan_name)

    def dense_with(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`dense` with a chunk that is not stored yet behind the newest token."""
        return static_ops.dense_with(key_states, value_states, self.arena, self.counts, self.plan_name)

    def visible(self, tokens: int, pending: int = 0) -> torch.Tensor:
        """Mask [B, 1, tokens, max_len] of the newest `tokens`, `pending` of which are not stored yet: causal, padding
        hidden. Does not wait for the device.
        """
        return static_ops.visible(self.arena, self.counts, tokens, pending, self.plan_name)

    @DecodedProperty
    def keys(self) -> torch.Tensor | None:
        """All keys [B, H, max_len, D] in the model's dtype, decoded at every access; to be read, not edited."""
        return self.dense()[0] if self.is_initialized else None

    @DecodedProperty
    def values(self) -> torch.Tensor | None:
        """All values [B, H, max_len, D] in the model's dtype, decoded at every access; to be read, not edited."""
        return self.dense()[1] if self.is_initialized else None

    def get_seq_length(self, *args) -> torch.Tensor | int:
        """Tokens held: on the device, as upstream's static layer has it; 0 before the first update.

        int64 as upstream's, or int32 once our attention has read a handle of this layer: `turboquant_mask` then knows
        that a single query needs no mask.
        """
        if not self.is_initialized:
            return 0
        length = static_ops.length(self.counts)
        return length if self.read_by_us and self._returns_handles() else length.long()

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    # ------------------------------------------------------------------ transformers' protocol: changing

    def crop(self, tokens: int) -> None:
        """Remove the newest -tokens tokens (tokens < 0), or keep the first `tokens` (> 0); 0 changes nothing.

        A cut inside a packed tile decodes the rest of that tile into the ring. Waits for the device.
        """
        if not self.is_initialized:
            return
        state = self._state()
        tiles, length = state.read_counts()
        tokens = int(tokens)  # early versions count accepted candidates on the device
        keep = length if tokens == 0 else (tokens if tokens > 0 else max(length + tokens, 0))
        if keep == 0:
            self.reset()
        elif keep < length:
            state.crop(keep)

    def reset(self) -> None:
        """Forget everything, learned statistics and noted padding included; addresses stay."""
        self.noted_starts = None
        if self.is_initialized:
            self.plan.clear(self.arena, self.counts)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Pick sequences, in place."""
        if self.is_initialized:
            index = beam_idx.to(self.device)
            for name in self.plan.fields:
                view = self.plan.view(self.arena, name)
                view.copy_(view.index_select(0, index))

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("a static cache keeps its batch size; repeat the inputs, or use a dynamic cache")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise NotImplementedError("a static cache keeps its batch size; use a dynamic cache to drop sequences")

    def offload(self) -> None:
        raise NotImplementedError("a static packed cache stays where it is; use a dynamic cache to offload")

    def prefetch(self) -> None:
        """Nothing is ever offloaded."""

    def note_padding(self, starts: list[int] | None) -> None:
        """Say where each sequence's real tokens begin, before anything is stored: one position a sequence, or None."""
        self.noted_starts = None if starts is None else list(starts)
        if self.is_initialized:
            self._set_starts()

    def _set_starts(self) -> None:
        view = self.plan.view(self.arena, "starts")
        if self.noted_starts is None:
            view.zero_()
        else:
            view.copy_(torch.tensor(self.noted_starts, dtype=torch.int64))

    def __setstate__(self, state: dict) -> None:
        """A copy, or one from another process: the ops find its plan under a name of this process."""
        self.__dict__.update(state)
        if self.is_initialized:
            self._make_known()

    def _make_known(self) -> None:
        """Give ops the plan's name, and compilers the addresses that stay."""
        self.plan_name = plan_name(self.plan)
        for x in (self.arena, self.counts, self.workspace):
            torch._dynamo.mark_static_address(x)

    def _state(self) -> StaticState:
        return StaticState(self.plan_name, self.arena, self.counts)

    # ------------------------------------------------------------------ memory

    @property
    def nbytes(self) -> int:
        """Bytes in use: everything but the tiles and ring slots that no token has reached. Waits for the device."""
        if not self.is_initialized:
            return 0
        return self.arena.numel() + self.counts.numel() * self.counts.itemsize - self.spare_nbytes

    @property
    def spare_nbytes(self) -> int:
        """Bytes allocated ahead for tokens to come."""
        if not self.is_initialized:
            return 0
        tiles, length = self._state().read_counts()
        plan = self.plan
        slots = plan.ring - (length - tiles * plan.tile)
        row = plan.batch * plan.heads * sum(plan.head_dims) * plan.dtype.itemsize
        return (plan.capacity - tiles) * plan.tile_nbytes() + slots * row

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same tokens in a 16-bit cache."""
        if not self.is_initialized:
            return 0
        return 2 * self.batch_size * self.num_heads * int(self.get_seq_length()) * sum(self.head_dims)

    def __repr__(self) -> str:
        names = "/".join(quantizer.name for quantizer in self.quantizers)
        return f"{type(self).__name__}({names}, max_cache_len={self.max_cache_len})"


@torch.compiler.disable(reason=ALLOCATION)
def _allocate_between_graphs(layer: TurboQuantStaticLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Allocate in plain Python. The graph breaks in the loop over the layers, and later calls stay in such pieces."""
    logger.warning_once(f"turboquant_hf: one graph is broken into pieces because {ALLOCATION}.")
    layer.lazy_initialization(keys, values)


class PendingChunk:
    """A chunk that attention must see before it is stored; shared by the handles of its keys and values."""

    def __init__(self, layer: TurboQuantStaticLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values
        self.decoded: tuple[torch.Tensor, torch.Tensor] | None = None
        self.attended: tuple[torch.Tensor, torch.Tensor] | None = None  # layers that share keys read the same ones
        self.stored = False

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer held with the chunk behind it, [B, H, max_len, D]."""
        if self.decoded is None:
            self.decoded = self.layer.dense_with(self.keys, self.values)
        return self.decoded

    def store(self, query: torch.Tensor | None = None, starts: torch.Tensor | None = None) -> None:
        """Store it, once."""
        if not self.stored:
            self.stored = True
            self.layer.store(self.keys, self.values, query, starts)


class StaticHandle(PackedHandle):
    """Keys or values of a static layer, [B, H, max_len, D] with zeros behind the newest token.

    pending: the chunk that came with this handle, or None where it is stored already.
    """

    def __init__(self, layer: TurboQuantStaticLayer, pending: PendingChunk | None) -> None:
        self.layer, self.pending = layer, pending
        self.length = layer.max_cache_len

    def dense(self) -> torch.Tensor:
        """The decoded tensor [B, H, max_len, D]. Code that takes it does not call our attention: a chunk is stored."""
        if self.pending is None:
            return self.layer.dense()[self.index]
        dense = self.pending.dense()
        self.pending.store()
        return dense[self.index]


class StaticKeys(StaticHandle):
    """Handle of a layer's keys."""

    index = 0


class StaticValues(StaticHandle):
    """Handle of a layer's values."""

    index = 1
