"""`TurboQuantLayer`: the packed cache of one attention layer, behind the layer protocol of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin

from turboquant_hf.cache.copies import DecodedProperty
from turboquant_hf.cache.fixed import FixedLayer, current_step
from turboquant_hf.cache.handles import PackedHandle
from turboquant_hf.cache.offload import Offloader
from turboquant_hf.cache.ring import RingTail
from turboquant_hf.cache.sides import Side
from turboquant_hf.cache.storage import Storage
from turboquant_hf.cache.store import FIRST_TOKENS, TailBuffer
from turboquant_hf.config import CachePreset
from turboquant_hf.quantizers import Quantizer

NO_CAPTURE = (
    "a cache counts its tokens on the host, which a CUDA graph does not repeat: run the step outside the graph. "
    "generate records decode steps by itself, and torch.compile(mode='reduce-overhead') records what is between caches"
)
NO_TRAINING = "a packed cache keeps no gradients and serves no training: pass use_cache=False, or use torch.no_grad()"


def autocast(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in one dtype: under torch.autocast, rotary embeddings leave only the keys in float32."""
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
    """x itself, tied to the autograd graph of `source`, so that `backward` raises instead of losing terms."""
    return _RefuseBackward.apply(x, source)


class TurboQuantLayer(Storage, CacheLayerMixin):
    """Sinks | packed tiles | tail, for one KV layer.

    `update` appends; tiles are encoded in `commit`, which the registered attention calls after it has seen the
    queries. Any other attention gets dense tensors from `update`, which commits at once.

    Args:
        preset: sizes and limits.
        keys, values: this layer's quantizers.
        returns_handles: called at every `update`; says whether the live attention implementation reads packed tiles.
        offloader: keeps the tiles in host memory (`cache.offload`); None leaves them on the layer's device.
    """

    is_compileable = False
    is_sliding = False
    reads_parts = True
    """Whether attention may read tiles and tail separately, by kernels or in pieces."""
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
        self._returns_handles, self.fixed = returns_handles, None
        super().__init__(preset, keys, values, offloader)

    def clear(self) -> None:
        super().clear()
        self.fixed: FixedLayer | None = None

    def changed(self) -> None:
        super().changed()
        if self.fixed is not None:
            self.fixed.free = 0

    # ------------------------------------------------------------------ transformers' protocol: growing

    @torch.compiler.disable  # counters in Python: a graph break here, where tracing would compile every step anew
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append [B, H, T, D] keys and values; returns what attention reads, as handles or dense tensors."""
        self.append(key_states, value_states)
        if self._returns_handles():
            return self.handles()
        dense = self.dense("keys"), self.dense("values")
        if not self.in_step:
            self.commit()
        return tuple(refuse_backward(x, key_states) for x in dense) if key_states.requires_grad else dense

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Store [B, H, T, D] keys and values raw. `commit` encodes them later.

        In a `FixedStep`, keys and values are stored and counted on the device only; see `replayed`.
        """
        if key_states.is_cuda and not self.in_step and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NO_CAPTURE)
        key_states, value_states = autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.check(key_states, value_states)
        key_states, value_states = key_states.detach(), value_states.detach()
        if self.in_step:
            self.fixed.append(key_states, value_states)
            return
        self.unfix()
        self._leave_inference_mode()
        self.commit()
        if self.offloader is not None:
            self.offloader.enter(self)
        self.sinks.write(key_states, value_states, self.tokens)
        self.tail.append(key_states, value_states)

    def observe(self, query: torch.Tensor) -> None:
        """Count the queries [B, Hq, q, D] of the newest q tokens into the statistics, until the first encode."""
        _, heads, tokens, dim = query.shape
        if heads % self.num_heads or dim != self.head_dims.keys:
            return
        if self.in_step:
            self.fixed.observe(query)
        elif self.encoder.observes:
            self.encoder.observe(query, self.num_heads, self.sinks.starts, self.tokens - tokens)

    def handles(self) -> tuple[PackedHandle, PackedHandle]:
        """The handles that stand for the dense keys and values."""
        return PackedHandle(self, "keys"), PackedHandle(self, "values")

    # ------------------------------------------------------------------ steps at fixed addresses

    @property
    def in_step(self) -> bool:
        """Whether the forward pass that runs now is a `FixedStep` over this layer."""
        return self.fixed is not None and current_step() is not None

    def fix(self, tokens: int, ahead: int, workspaces: dict[tuple, torch.Tensor]) -> FixedLayer:
        """Keep every array at its address, with room for a step of `tokens` and for `ahead` tiles; see `cache.fixed`.

        Arrays with enough room stay where they are. A recorded step remains valid while this returns the same object.
        """
        self._leave_inference_mode()
        self.commit()
        tile, wanted = self.preset.tile, self.tail.count + tokens
        if not isinstance(self.tail, RingTail) or wanted > self.tail.slots:
            # Room for as many raw tokens as the layer usually holds, but at first only an eighth more than needed.
            waits = 0 if self.encoder.is_ready else self.preset.min_statistics + tile
            usual = max(waits, self.tail_capacity)
            slots = -(-max(wanted, min(usual, wanted + max(FIRST_TOKENS, wanted // 8))) // tile) * tile
            self.tail = RingTail(*self.tail.view(), self.stored, slots)
        for store in self.tiles:
            store.reserve(store.count + ahead, exact=True)
        if self.fixed is None or not self.fixed.holds(self):
            self.step = None
            self.fixed = FixedLayer(self, workspaces)
        self.fixed.tell(self)
        return self.fixed

    def unfix(self) -> None:
        """Go back to arrays that may move."""
        if self.fixed is not None:
            self.changed()
            self.fixed = None
            tail = TailBuffer(*self.tail.arrays, self.tail_capacity)
            tail.append(*self.tail.view())
            self.tail = tail

    def replayed(self, tokens: int) -> None:
        """Count the `tokens` that a step has stored on the device, and encode the tiles that are due."""
        self.tail.count += tokens
        self.fixed.replayed(tokens)
        if self.fixed.statistics is not None:
            self.encoder.queried += tokens
        if self.tail.count - self.preset.recent_window >= self.preset.tile:
            self.commit()

    # ------------------------------------------------------------------ reading

    def dense(self, side: Side) -> torch.Tensor:
        """All keys or values, decoded: [B, H, width, D] in the model's dtype."""
        return self.fixed.dense(side) if self.in_step else self.held(side)

    @DecodedProperty
    def keys(self) -> torch.Tensor | None:
        """All keys [B, H, width, D] in the model's dtype, decoded at every access; to be read, not edited."""
        return self.dense("keys") if self.is_initialized else None

    @DecodedProperty
    def values(self) -> torch.Tensor | None:
        """All values [B, H, width, D] in the model's dtype, decoded at every access; to be read, not edited."""
        return self.dense("values") if self.is_initialized else None

    def get_seq_length(self, *args) -> torch.Tensor | int:
        """Tokens per sequence. Inside a `FixedStep`: the tokens before the step, as a tensor on the device."""
        return current_step().length if self.in_step else self.tokens

    @property
    def width(self) -> int:
        """Length of the dense tensors, and of the handles that stand for them."""
        # A fixed step reads whole arrays, because only the device knows how much of them is in use.
        return self.fixed.room if self.in_step else self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width + (0 if self.in_step else query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    # ------------------------------------------------------------------ transformers' protocol: changing

    def crop(self, tokens: int) -> None:
        """Remove the newest -tokens tokens (tokens < 0), or keep the first `tokens` (> 0); 0 changes nothing."""
        length, tokens = self.tokens, int(tokens)  # early versions count accepted candidates on the device
        keep = length if tokens == 0 else (tokens if tokens > 0 else max(length + tokens, 0))
        if keep >= length:
            return
        if keep == 0:
            self.reset()
            return
        self._leave_inference_mode()
        self.commit()
        if keep < self.stored:
            self.unfix()
        self.cut(keep)

    def reset(self) -> None:
        """Forget everything, learned statistics and noted padding included."""
        self.noted_starts = None
        self.clear()

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
        if self.is_initialized:
            self.commit()
            self.map(fn)
        elif self.noted_starts is not None:
            self.noted_starts = fn(torch.tensor(self.noted_starts)).tolist()

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.unfix()
        super().map(fn)

    def _leave_inference_mode(self) -> None:
        """Copy arrays that were made under torch.inference_mode(): they cannot be written to outside that mode."""
        if not torch.is_inference_mode_enabled() and self.tail.arrays.keys.is_inference():
            self.map(torch.clone)

    def offload(self) -> None:
        """Move everything to the CPU."""
        if self.is_initialized:
            self.commit()
            self.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized and self.tail.arrays.keys.device != self.device:
            self.map(lambda x: x.to(self.device, non_blocking=True))

    def note_padding(self, starts: list[int] | None) -> None:
        """Note, before anything is stored, where the real tokens begin: one position per sequence, or None."""
        self.noted_starts = None if starts is None else list(starts)

    def learn_padding(self, starts: list[int]) -> None:
        """The same for a layer that already holds raw tokens. Nothing may be encoded yet."""
        if starts == self.sinks.first:
            return
        self.unfix()
        self.sinks.set_starts(starts, self.device)
        self.sinks.write(*self.tail.view(), position=0)

    def __repr__(self) -> str:
        names = "/".join(quantizer.name for quantizer in self.quantizers)
        return f"{type(self).__name__}({names}, tokens={self.get_seq_length()})"
