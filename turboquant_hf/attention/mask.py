"""The mask function behind attn_implementation="turboquant"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask


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
    single = isinstance(q_length, int) and q_length == 1
    if single and local_size is None and mask_function is causal_mask_function and kwargs.get("allow_is_causal_skip", True):
        if attention_mask is None:
            return None
        seen = attention_mask.shape[-1]
        if seen < kv_length:
            # generate's mask covers what was fed; a cache that was filled before it counts as visible.
            attention_mask = torch.nn.functional.pad(attention_mask, (0, kv_length - seen), value=True)
        start = kwargs.get("kv_offset", 0)
        return attention_mask[:, None, None, start : start + kv_length].bool()
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
