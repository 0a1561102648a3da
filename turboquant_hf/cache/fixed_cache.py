"""`FixedCache`: fixes all layers of a cache for decode steps, and says which caches cannot be fixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionLayer

from turboquant_hf.cache.copies import tensors_in
from turboquant_hf.cache.fixed import FixedLayer, FixedStep
from turboquant_hf.cache.fixed_sliding import RingSlidingLayer
from turboquant_hf.cache.hybrid import packed_part

SMALL_ROOM = 16
"""At most this many tiles are allocated ahead for a call, or a tenth of the tiles held if that is more."""


class FixedCache:
    """Fixes the layers of a `TurboQuantCache` for the steps of one decoding loop, and then releases them.

    Args:
        cache: a cache that holds a prompt before `prepare` is called, and for which `why_not` gives None.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.workspaces: dict[tuple, torch.Tensor] = {}
        self._fixed: list[FixedLayer] = []
        self._packed: list = []
        self._rings: list[RingSlidingLayer] = []
        self._recurrent: list[LinearAttentionLayer] = []

    def prepare(self, tokens: int, expected: int) -> tuple:
        """Make room for a step of `tokens` in every layer.

        Args:
            tokens: new tokens of the step.
            expected: tokens that the call may still bring. Their room is allocated at once, but no more than
                `SMALL_ROOM` says. If that is not enough, the room grows by as much each time that it is full.

        Returns:
            The addresses that a recorded step points to. A recording is valid while this value stays equal.
        """
        if not self._is_ready(tokens):
            self._fix(tokens, expected)
        return (*(fixed.serial for fixed in self._fixed), *(x.data_ptr() for x in self._states()))

    def _is_ready(self, tokens: int) -> bool:
        """Whether a step of `tokens` can be replayed as it is. Asked in every step."""
        return bool(self._fixed) and min(fixed.free for fixed in self._fixed) >= tokens

    def _fix(self, tokens: int, expected: int) -> None:
        layers = self.cache.layers
        for index, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer:
                layers[index] = RingSlidingLayer(layer)
        self._rings = [layer for layer in layers if type(layer) is RingSlidingLayer]
        self._recurrent = [layer for layer in layers if isinstance(layer, LinearAttentionLayer)]
        fixed, self._packed = [], self.cache.packed_layers
        for layer in self._packed:
            stored, tile = layer.tiles.keys.count, layer.preset.tile
            needed = -(-(layer.tail.count + expected) // tile)
            room = min(needed, max(SMALL_ROOM, stored // 10))
            enough = layer.fixed is not None and layer.tiles.keys.capacity > stored
            fixed.append(layer.fix(tokens, 0 if enough else max(room, 1), self.workspaces))
        self._fixed = fixed

    def step(self, tokens: int, padding: torch.Tensor | None) -> FixedStep:
        """The context of a forward pass with `tokens` new tokens."""
        return FixedStep(self._fixed[0].counts, tokens, self.room, padding)

    def holds_tokens(self) -> bool:
        """Whether all packed layers hold tokens."""
        return self._is_ready(1) or all(layer.tokens for layer in self.cache.packed_layers)

    def why_not(self) -> str | None:
        """Why the layers of this cache, which hold tokens, cannot be fixed; None if they can be, or are."""
        cache = self.cache
        if self._fixed:
            return None
        if cache.offloader is not None:
            return "its tiles are offloaded to host memory"
        if cache.preset.encode_first:
            return "encode_first decodes and encodes the newest tokens at every step"
        for layer in cache.layers:
            if getattr(layer, "record_past", False):
                return "its layers record what they would drop, for candidates that are taken back"
            if packed_part(layer) is not None:
                continue
            sliding = type(layer) is DynamicSlidingWindowLayer
            linear = isinstance(layer, LinearAttentionLayer) and not isinstance(layer, CacheLayerMixin)
            if sliding and not layer.is_initialized:
                return "a sliding-window layer is still empty"
            holds_tensors = next(tensors_in(vars(layer)), None) is not None
            if not sliding and not linear and getattr(layer, "is_initialized", True) and holds_tensors:
                return f"a {type(layer).__name__} moves what it holds"
        if len({layer.device for layer in cache.packed_layers}) > 1:
            return "its layers lie on several devices"
        return None

    @property
    def room(self) -> int:
        """Length of a padding mask: all positions that the cache has room for."""
        return self._fixed[0].room

    def replayed(self, tokens: int) -> None:
        """Count in every layer the `tokens` that a step has stored on the device."""
        for layer in (*self._packed, *self._rings):
            layer.replayed(tokens)

    def release(self) -> None:
        """Give the cache its ordinary layers back, which can grow."""
        self._fixed = []
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, RingSlidingLayer):
                self.cache.layers[index] = layer.release()
        for layer in self.cache.packed_layers:
            layer.unfix()

    def snapshot(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(array, copy) of the arrays that cannot be undone by a counter: recurrent states and statistics."""
        statistics = [x for layer in self.cache.packed_layers for x in layer.fixed.statistics or ()]
        return [(x, x.clone()) for x in (*self._states(), *statistics)]

    def _states(self) -> Iterator[torch.Tensor]:
        """The recurrent states of transformers' layers."""
        return tensors_in([(layer.conv_states, layer.recurrent_states) for layer in self._recurrent])
