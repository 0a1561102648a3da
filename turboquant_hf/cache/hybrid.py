"""A layer with a recurrent state and full attention (Falcon-H1, Zamba2): only its keys and values are packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from turboquant_hf.cache.copies import DecodedProperty
from turboquant_hf.cache.layer import TurboQuantLayer

OF_ATTENTION = ("keys", "values", "is_initialized")
RECURRENT = ("conv_states", "recurrent_states")
"""The attributes in which transformers' layers keep their recurrent states."""


def _of_both_parts(name: str) -> Callable[..., None]:
    """A method that calls `name` for the recurrent state, and then for the keys and values."""

    def method(self: HybridLayer, *args: Any) -> None:
        getattr(LinearAttentionLayer, name)(self, *args)
        getattr(self.packed, name)(*args)

    return method


class HybridLayer(LinearAttentionAndFullAttentionLayer):
    """A `LinearAttentionAndFullAttentionLayer` whose keys and values are kept by a `TurboQuantLayer`.

    Args:
        layer: an empty layer of transformers, whose recurrent part is taken over.
        packed: the layer that holds the keys and values.
    """

    is_compileable = False

    def __init__(self, layer: LinearAttentionAndFullAttentionLayer, packed: TurboQuantLayer) -> None:
        vars(self).update({name: value for name, value in vars(layer).items() if name not in OF_ATTENTION})
        self.packed = packed

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Upstream passes keys and values by position, and states of the recurrent part by name."""
        if args:
            self.packed.lazy_initialization(*args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        return self.packed.update(key_states, value_states, *args, **kwargs)

    @property
    def is_initialized(self) -> bool:
        return self.packed.is_initialized

    @DecodedProperty
    def keys(self) -> torch.Tensor | None:
        return self.packed.keys

    @DecodedProperty
    def values(self) -> torch.Tensor | None:
        return self.packed.values

    def get_seq_length(self, *args: Any) -> int:
        return self.packed.get_seq_length()

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.packed.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    crop, reset, offload, prefetch, reorder_cache = map(
        _of_both_parts, ("crop", "reset", "offload", "prefetch", "reorder_cache")
    )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_states(lambda x: x.repeat_interleave(repeats, dim=0))
        self.packed.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_states(lambda x: x[indices.to(x.device) if isinstance(indices, torch.Tensor) else indices])
        self.packed.batch_select_indices(indices)

    def _map_states(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply fn to the recurrent states: upstream does not, in these two operations."""
        for name in RECURRENT:
            setattr(self, name, map_state(fn, getattr(self, name, None)))


def map_state(fn: Callable[[torch.Tensor], Any], held: Any) -> Any:
    """`held` with fn(x) for every tensor x. Early versions hold one state, later ones a dict by number."""
    if isinstance(held, dict):
        return {name: map_state(fn, x) for name, x in held.items()}
    return fn(held) if isinstance(held, torch.Tensor) else held


def packed_part(layer: Any) -> TurboQuantLayer | None:
    """The part of a cache's layer that holds packed tiles, or None."""
    if isinstance(layer, HybridLayer):
        return layer.packed
    return layer if isinstance(layer, TurboQuantLayer) else None
