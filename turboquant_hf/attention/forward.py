"""`turboquant_attention_forward`: the attention function behind attn_implementation="turboquant"."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.output_capturing import _active_collector as collector

from turboquant_hf.attention.dense import dense_attention, densified
from turboquant_hf.attention.fixed import fixed_attention
from turboquant_hf.attention.packed import layer_attention
from turboquant_hf.attention.traced import traced_attention
from turboquant_hf.cache import PackedHandle, TracedHandle
from turboquant_hf.cache.fixed import current_step
from turboquant_hf.cache.layer import NO_TRAINING

REFUSED = ("head_mask", "layer_head_mask", "cross_attn_head_mask")
"""Options that no attention of transformers 5 honours. A forward passes unknown options on to the attention."""


def turboquant_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PackedHandle,
    value: torch.Tensor | PackedHandle,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of new queries over a layer; the cache then encodes the tiles that are old enough.

    Args:
        query: [B, Hq, q, D].
        key, value: dense [B, H, T, D], or the handles that a `TurboQuantLayer` returned.
        attention_mask: [B, 1 or Hq, q, T] bool or additive, or None.

    Returns:
        ([B, q, Hq, D], weights [B, Hq, q, T] if attentions are asked for, else None).

    Raises:
        ValueError: for a head mask, an integer mask, and for training with a packed cache.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f'{name}={type(kwargs[name]).__name__} is not supported by attn_implementation="turboquant"; '
                "allowed: None. turboquant_hf.restore_attention(model) gives the model its own attention back."
            )
    options = {"dropout": dropout, "scaling": scaling, **kwargs, "output_attentions": wants_weights(kwargs)}
    if not isinstance(key, PackedHandle):
        return dense_attention(module, query, key, densified(value), attention_mask, **options)
    if module.training and torch.is_grad_enabled():
        raise ValueError(NO_TRAINING)
    if query.dtype != key.dtype:  # under torch.autocast, rotary embeddings leave the query in float32
        query = query.to(key.dtype)
    if key.layer.in_step:
        return fixed_attention(module, query, key, value, attention_mask, current_step(), **options)
    if isinstance(key, TracedHandle) and torch.compiler.is_compiling():
        return traced_attention(module, query, key, value, attention_mask, **options)
    return layer_attention(module, query, key, value, attention_mask, **options)


def wants_weights(options: dict[str, Any]) -> bool:
    """Whether the attention weights are asked for, by an option or by transformers' collector of outputs."""
    if options.get("output_attentions"):
        return True
    # Traced code can ask the collector only if the whole model is traced.
    if torch.compiler.is_compiling() and not collector.compiling:
        return False
    return any("attentions" in name for name in collector.get() or ())
