"""The registered attention function."""

from __future__ import annotations

from typing import Any

import torch

from turboquant_hf.attention.dense import dense_attention, densified
from turboquant_hf.attention.fixed import fixed_attention
from turboquant_hf.attention.packed import layer_attention
from turboquant_hf.attention.traced import traced_attention
from turboquant_hf.cache import PackedHandle, TracedHandle
from turboquant_hf.cache.fixed import current_step
from turboquant_hf.cache.layer import NO_TRAINING

try:
    from transformers.utils.output_capturing import _active_collector as collector
except ImportError:  # another version of transformers: attentions are seen only where the model passes the option on
    collector = None

REFUSED = ("head_mask", "layer_head_mask", "cross_attn_head_mask")
"""Options that no attention of transformers 5 honours; a forward hands whatever it is given on to the attention."""


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
    """Attend, then let the cache encode what is old enough.

    Args:
        query: [B, Hq, q, D].
        key, value: dense [B, H, T, D], or the handles that a `TurboQuantLayer` returned.
        attention_mask: [B, 1 or Hq, q, T] bool or additive, or None.

    Returns:
        ([B, q, Hq, D], weights [B, Hq, q, T] where somebody asks for attentions, or None).

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
    if query.dtype != key.dtype:  # under torch.autocast rotary embeddings leave it in float32
        query = query.to(key.dtype)
    if key.layer.in_step:
        return fixed_attention(module, query, key, value, attention_mask, current_step(), **options)
    if isinstance(key, TracedHandle) and torch.compiler.is_compiling():
        return traced_attention(module, query, key, value, attention_mask, **options)
    return layer_attention(module, query, key, value, attention_mask, **options)


def wants_weights(options: dict[str, Any]) -> bool:
    """Whether the attention weights are asked for, in so many words or by transformers' collector of outputs."""
    if options.get("output_attentions"):
        return True
    # Traced code can ask the collector only where the whole model is traced.
    if collector is None or (torch.compiler.is_compiling() and not collector.compiling):
        return False
    return any("attentions" in name for name in collector.get() or ())
