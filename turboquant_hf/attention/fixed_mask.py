"""Masks of a decode step over fixed arrays (`cache.fixed`): nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from turboquant_hf.cache.fixed import FixedStep

_SLIDING = sliding_window_causal_mask_function(2)
"""A mask function to compare others with: only its code is looked at."""


class UnknownMask(RuntimeError):
    """A mask that a fixed step cannot make on the device."""


def fixed_mask(step: FixedStep, kv_length: int, mask_function: Callable, local_size: int | None) -> torch.Tensor:
    """The mask [B or 1, 1, q, kv_length] of a fixed step (True: attend).

    Raises:
        UnknownMask: the model's rule is neither the causal rule nor a sliding window.
    """
    if local_size is None and mask_function is causal_mask_function and kv_length == step.room:
        return step.full_mask()
    if local_size is not None and _is_sliding(mask_function):
        return step.window_mask(local_size, kv_length)
    raise UnknownMask(f"its mask follows a rule of its own ({getattr(mask_function, '__qualname__', mask_function)})")


def _is_sliding(mask_function: Callable) -> bool:
    """Whether this is exactly transformers' combination of a sliding window and the causal rule."""
    parts = _parts(mask_function)
    return parts is not None and parts == _parts(_SLIDING)


def _parts(mask_function: Callable) -> list | None:
    cells = getattr(mask_function, "__closure__", None)
    if getattr(mask_function, "__code__", None) is not _SLIDING.__code__ or len(cells) != 1:
        return None
    return [part.__code__ for part in cells[0].cell_contents]
