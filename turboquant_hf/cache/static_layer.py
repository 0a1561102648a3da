"""`TurboQuantStaticLayer`: a layer with room for all tokens from the start, which torch.compile can trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from turboquant_hf.cache import traced
from turboquant_hf.cache.handles import PackedHandle
from turboquant_hf.cache.layer import TurboQuantLayer, autocast
from turboquant_hf.cache.sides import Side
from turboquant_hf.config import CachePreset
from turboquant_hf.quantizers import Quantizer


class TurboQuantStaticLayer(TurboQuantLayer):
    """A `TurboQuantLayer` whose tiles are allocated at once, and whose dense tensors keep one shape.

    Traced code calls the ops of `cache.traced`. It reads nothing that changes from step to step.

    Args:
        preset, keys, values, returns_handles: as of `TurboQuantLayer`.
        max_cache_len: tokens that fit.
    """

    is_compileable = True
    max_batch_size = TurboQuantLayer.batch_size

    def __init__(
        self,
        preset: CachePreset,
        keys: Quantizer,
        values: Quantizer,
        max_cache_len: int,
        returns_handles: Callable[[], bool] = lambda: False,
    ) -> None:
        if preset.encode_first:
            raise ValueError("encode_first=True is not supported by a static cache; allowed: False")
        super().__init__(preset, keys, values, returns_handles)
        self.max_cache_len = max_cache_len
        self.number = traced.new_number(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy, or a layer from another process, its own number."""
        vars(self).update(state)
        self.number = traced.new_number(self)

    @torch.compiler.disable
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for store in self.tiles:
            store.reserve(-(-self.max_cache_len // self.preset.tile), exact=True)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take [B, H, q, D] keys and values; returns what attention reads, as handles or dense [B, H, max_len, D].

        Raises:
            ValueError: the tokens do not fit, or the tensors do not continue this layer.
        """
        if not torch.compiler.is_compiling():
            return super().update(key_states, value_states)
        states = autocast(key_states, value_states)
        traced.append(*(x.detach() for x in states), self.number)
        handles = TracedHandle(self, "keys", states[0]), TracedHandle(self, "values", states[1])
        return handles if self._returns_handles() else tuple(handle.dense() for handle in handles)

    def check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().check(key_states, value_states)
        held, added = self.tokens, key_states.shape[2]
        if held + added > self.max_cache_len:
            raise ValueError(
                f"max_cache_len={self.max_cache_len} is not enough: {held} tokens are held and {added} more came"
            )

    def dense(self, side: Side) -> torch.Tensor:
        """All keys or values, [B, H, max_len, D] in the model's dtype; zeros behind the newest token."""
        if self.in_step:
            return super().dense(side)
        held = self.held(side)
        whole = held.new_zeros((*held.shape[:2], self.width, held.shape[3]))
        whole[:, :, : held.shape[2]] = held
        return whole

    def get_seq_length(self, *args) -> torch.Tensor | int:
        """Tokens held. In traced code this is a tensor on the device, except for an empty layer."""
        if torch.compiler.is_compiling():
            return traced.length(self.number, self.device) if self.is_initialized else 0
        return super().get_seq_length()

    @property
    def width(self) -> int:
        return super().width if self.in_step else self.max_cache_len

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.width, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length


class TracedHandle(PackedHandle):
    """A handle in traced code. It knows the new tokens [B, H, q, D], and nothing of the layer's arrays."""

    def __init__(self, layer: TurboQuantStaticLayer, side: Side, new: torch.Tensor) -> None:
        self.layer, self.side, self.new, self.length = layer, side, new, layer.max_cache_len

    def dense(self) -> torch.Tensor:
        return traced.dense(self.new, self.side, self.length, self.layer.number)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.new.shape[:2], self.length, self.new.shape[3]))

    @property
    def dtype(self) -> torch.dtype:
        return self.new.dtype

    @property
    def device(self) -> torch.device:
        return self.new.device
