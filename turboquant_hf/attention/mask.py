"""The mask function behind attn_implementation="turboquant"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from turboquant_hf.attention.fixed import fixed_mask
from turboquant_hf.cache.fixed import current_step

MAX_QUERIES = 16
"""Queries that the kernels take at once; longer chunks are worth decoding the history for."""


def turboquant_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask [B, 1, q, kv] (True: attend), or None where the plain causal rule needs none.

    A single query that sees everything needs no mask; with padding it needs only the padding mask itself, which
    is passed on as a view. Everything else is `sdpa_mask`'s work.
    """
    step = current_step()
    if step is not None:
        return fixed_mask(step, kv_length, mask_function, local_size)
    plain = local_size is None and mask_function is causal_mask_function and isinstance(q_length, int)
    if plain and q_length == 1 and kwargs.get("allow_is_causal_skip", True):
        if attention_mask is None:
            return None
        return _key_mask(attention_mask, kv_length, kwargs.get("kv_offset", 0))[:, None, None, :]
    if plain and q_length == 1 and attention_mask is None and counts_for_itself(kwargs.get("q_offset")):
        return None
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    if mask is not None and plain and q_length <= MAX_QUERIES:
        # The kernels know the causal order; what is left of the mask is which keys are padding.
        mask._turboquant_keys = (
            None if attention_mask is None else _key_mask(attention_mask, kv_length, kwargs.get("kv_offset", 0))
        )
    return mask


def counts_for_itself(offset: Any) -> bool:
    """Whether a cache says, by an int32 offset, that its reader knows which of its slots are in use."""
    return isinstance(offset, torch.Tensor) and offset.dtype == torch.int32


def _key_mask(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor:
    """The padding mask [B, kv] of the keys: generate's mask covers what was fed, what the cache held before counts."""
    seen = attention_mask.shape[-1]
    if seen < kv_length:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, kv_length - seen), value=True)
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def left_padding(mask: torch.Tensor) -> torch.Tensor:
    """int64 [B or 1]: how many of the oldest positions no query of a mask [B or 1, 1, q, kv] sees.

    What only the newest queries do not see may be seen by later ones: a mask of the user's own says nothing of padding.
    """
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return (~visible.any(dim=1)).int().cumprod(dim=-1).sum(dim=-1)
