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
"""The most queries that the kernels take at once. For a longer chunk, decoding the history is faster."""


class CausalMask(torch.Tensor):
    """The causal mask of the newest q of kv tokens with padding: bool [B, 1, q, kv], True where a query attends.

    The object holds no memory. The registered attention reads its type, shape and fields. Any torch function gets the
    mask as a tensor, which is made once: this is slower and never wrong.

    None cannot stand for this mask: transformers also passes None for an empty static cache, whose queries are the
    oldest tokens.

    Attributes:
        keys: bool [B, kv], False hides a position from all queries; None hides nothing.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        batch: int,
        q_length: int,
        kv_length: int,
        device: torch.device | str,
        keys: torch.Tensor | None = None,
    ) -> CausalMask:
        shape = batch, 1, q_length, kv_length
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.keys, mask._dense = keys, None
        return mask

    def dense(self) -> torch.Tensor:
        """The plain tensor [B, 1, q, kv]."""
        if self._dense is None:
            q_length, kv_length = self.shape[2:]
            seen = torch.ones(q_length, kv_length, dtype=torch.bool, device=self.device).tril(kv_length - q_length)
            seen = seen if self.keys is None else seen & self.keys[:, None, None]
            self._dense = seen.expand(self.shape)
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moved = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and moved is not None and kwargs.get("dtype") in (None, torch.bool):
            mask = args[0]  # models that are spread over devices move their masks
            keys = None if mask.keys is None else mask.keys.to(moved)
            return cls(mask.shape[0], *mask.shape[2:], moved, keys)
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

    - A single query without padding needs no mask. With padding, it gets a view of the padding mask.
    - Up to `MAX_QUERIES` queries, and longer chunks without padding, get a `CausalMask`. It becomes a tensor only when
      other code reads it.
    - All other masks are made by `sdpa_mask`.
    """
    step = current_step()
    if step is not None:
        return fixed_mask(step, kv_length, mask_function, local_size)
    plain = local_size is None and mask_function is causal_mask_function and isinstance(q_length, int)
    offset, kv_offset = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)
    skips = kwargs.get("allow_is_causal_skip", True)
    if plain and q_length == 1 and skips:
        return None if attention_mask is None else _key_mask(attention_mask, kv_length, kv_offset)[:, None, None, :]
    if plain and skips and _follows(offset, q_length, kv_length) and kv_offset == 0:
        device = kwargs.get("device", "cpu")
        if q_length <= MAX_QUERIES and attention_mask is not None:
            return CausalMask(batch_size, q_length, kv_length, device, _key_mask(attention_mask, kv_length, 0))
        if attention_mask is None or _is_unpadded(attention_mask, kv_length):
            return CausalMask(batch_size, q_length, kv_length, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )


def _follows(offset: Any, q_length: int, kv_length: Any) -> bool:
    """Whether the queries are the newest of `kv_length` tokens, and there are older tokens.

    If the last query is the last key, the cache has no free slots: it grows, or it is full. The static caches of
    transformers have an offset on the device, and an offset in Python only while they are empty.
    """
    if torch.compiler.is_compiling() or not isinstance(offset, int) or not isinstance(kv_length, int):
        return False
    return 0 < offset == kv_length - q_length


def _is_unpadded(attention_mask: torch.Tensor, tokens: int) -> bool:
    """Whether a mask [B, T] hides none of the first `tokens` tokens. May wait for the device."""
    return attention_mask.shape[-1] >= tokens and bool(attention_mask[:, :tokens].all())


def _key_mask(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor:
    """The padding mask [B, kv] of the keys. Tokens that generate's mask does not cover are visible."""
    seen = attention_mask.shape[-1]
    if seen < kv_length:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, kv_length - seen), value=True)
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def left_padding(mask: torch.Tensor) -> torch.Tensor:
    """Left padding, int64 [B or 1]: the number of oldest positions that no query of a mask [B or 1, 1, q, kv] sees.

    A position counts only if all queries ignore it, because a user's own mask may hide positions from some queries.
    """
    if isinstance(mask, CausalMask) and mask.keys is None:
        return torch.zeros(1, dtype=torch.int64)
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return (~visible.any(dim=1)).int().cumprod(dim=-1).sum(dim=-1)
