"""`RingSlidingLayer`: a sliding-window layer whose arrays stay at their addresses during decode steps."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from turboquant_hf.cache.fixed import current_step
from turboquant_hf.cache.ring import STEP_TOKENS


class RingSlidingLayer(DynamicSlidingWindowLayer):
    """The sliding-window layer of transformers with its tokens in a ring, for the steps of `cache.fixed`.

    A step writes its tokens to their slots and reads the whole ring, [B, H, window - 1 + STEP_TOKENS, D].
    `FixedStep.window_mask` hides what is outside the window. `release` makes an ordinary layer again.

    Args:
        layer: the layer to take over. It must hold tokens.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer) -> None:
        vars(self).update(vars(layer))
        slots = self.sliding_window - 1 + STEP_TOKENS
        first = self.cumulative_length - self.keys.shape[2]
        where = torch.arange(first, self.cumulative_length, device=self.keys.device) % slots
        self.ring = tuple(
            x.new_zeros((*x.shape[:2], slots, x.shape[3])).index_copy_(2, where, x) for x in (self.keys, self.values)
        )
        self.keys = self.values = None

    def release(self) -> DynamicSlidingWindowLayer:
        """An ordinary layer with the same tokens."""
        count = min(self.cumulative_length, self.sliding_window - 1)
        where = torch.arange(self.cumulative_length - count, self.cumulative_length, device=self.ring[0].device)
        layer = DynamicSlidingWindowLayer(self.sliding_window)
        vars(layer).update({name: x for name, x in vars(self).items() if name != "ring"})
        layer.keys, layer.values = (x.index_select(2, where % x.shape[2]) for x in self.ring)
        return layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Store [B, H, q, D] keys and values; returns both rings. Works only inside a fixed step."""
        where = current_step().positions() % self.ring[0].shape[2]
        for ring, new in zip(self.ring, (key_states, value_states), strict=True):
            ring.index_copy_(2, where, new)
        return self.ring

    def replayed(self, tokens: int) -> None:
        """Count the `tokens` that a step has stored."""
        self.cumulative_length += tokens

    def get_seq_length(self, *args: Any) -> torch.Tensor | int:
        step = current_step()
        return self.cumulative_length if step is None else step.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.ring[0].shape[2], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens. The ring still holds the tokens that the earlier window sees."""
        if tokens_to_remove < 0:
            self.cumulative_length += int(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        for ring in self.ring:
            ring.copy_(ring.index_select(0, beam_idx.to(ring.device)))
