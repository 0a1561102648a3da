"""The mask function behind attn_implementation="turboquant"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import causal_mask_function, sdpa_mask

from turboquant_hf.attention.fixed_mask import fixed_mask
from turboquant_hf.cache.fixed import current_step

MAX_QUERIES = 16
"""Queries that the kernels take at once; longer chunks are worth decoding the history for."""


class CausalMask(torch.Tensor):
    """The causal rule for the newest q of kv tokens and nothing else: bool [B, 1, q, kv], True where a query attends.

    None cannot say this: transformers passes None for an empty static cache too, whose queries see the oldest keys.
    The object holds no memory. The registered attention asks for its type and shape; any torch function that takes it
    gets the tensor, which is made once: slower, never wrong.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    _turboquant_keys = None
    """No key is padding (`packed_attention`)."""

    @staticmethod
    def __new__(cls, batch: int, q_length: int, kv_length: int, device: torch.device | str) -> CausalMask:
        shape = batch, 1, q_length, kv_length
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask._dense = None
        return mask

    def dense(self) -> torch.Tensor:
        """The plain tensor [B, 1, q, kv], a view of [1, 1, q, kv]."""
        if self._dense is None:
            q_length, kv_length = self.shape[2:]
            ones = torch.ones(q_length, kv_length, dtype=torch.bool, device=self.device)
            self._dense = ones.tril(kv_length - q_length).expand(self.shape)
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moved = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and moved is not None and kwargs.get("dtype") in (None, torch.bool):
            batch, _, q_length, kv_length = args[0].shape  # models spread over devices move their masks
            return cls(batch, q_length, kv_length, moved)
        return func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={list(self.shape)}, device={self.device})"


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
    is passed on as a view. A chunk behind a history without padding gets a `CausalMask`, which is no tensor until
    somebody reads it. Everything else is `sdpa_mask`'s work.
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
    if plain and _is_chunk(q_length, kv_length, attention_mask, **kwargs):
        return CausalMask(batch_size, q_length, kv_length, kwargs.get("device", "cpu"))
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


def _is_chunk(
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None,
    q_offset: Any = 0,
    kv_offset: int = 0,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> bool:
    """Whether these are the newest of `kv_length` tokens, none of which is padding. Waits for the device if it must.

    A cache whose last query is its last key has no free slots: it grows, or it is full. Static caches count on the
    device, and in Python only while they are empty.
    """
    if q_length <= MAX_QUERIES or not allow_is_causal_skip or torch.compiler.is_compiling():
        return False
    counted = isinstance(q_offset, int) and isinstance(kv_length, int) and kv_offset == 0
    if not counted or q_offset <= 0 or q_offset + q_length != kv_length:
        return False
    if attention_mask is None:
        return True
    return attention_mask.shape[-1] >= kv_length and bool(attention_mask[:, :kv_length].all())


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
