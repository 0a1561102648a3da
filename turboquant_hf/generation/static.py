"""A `TurboQuantStaticCache` for recorded steps: its arrays never move, and its ops count and encode on the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from turboquant_hf.cache import TurboQuantStaticCache


class FixedStatic:
    """The interface of `cache.fixed_cache.FixedCache` for a cache that is fixed by itself."""

    room = 0

    def __init__(self, cache: TurboQuantStaticCache) -> None:
        self.cache = cache
        self._filled = False

    def holds_tokens(self) -> bool:
        """Whether a prompt is in: looked up on the device until there is one."""
        self._filled = self._filled or int(self.cache.packed_layers[0].get_seq_length()) > 0
        return self._filled

    def why_not(self) -> str | None:
        if any(getattr(layer, "is_sliding", False) for layer in self.cache.layers):
            return "its preallocated sliding-window layers ask the host for their position"
        return None

    def prepare(self, tokens: int, expected: int) -> tuple:
        return tuple(layer.arena.data_ptr() for layer in self.cache.packed_layers)

    def step(self, tokens: int, padding: torch.Tensor | None) -> AbstractContextManager:
        return nullcontext()

    def replayed(self, tokens: int) -> None:
        """The ops have counted."""

    def release(self) -> None:
        """Nothing was changed."""

    def snapshot(self) -> list[tuple[Any, Any]]:
        return []
