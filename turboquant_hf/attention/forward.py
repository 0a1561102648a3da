"""The registered attention function."""

from __future__ import annotations

from typing import Any

import torch

from turboquant_hf.attention.chunk import chunk_attention, layer_parts, serves
from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.attention.fixed import fixed_attention
from turboquant_hf.attention.mask import MAX_QUERIES, CausalMask, left_padding
from turboquant_hf.attention.packed import packed_attention
from turboquant_hf.attention.static import static_attention
from turboquant_hf.cache import PackedHandle, StaticHandle, TurboQuantLayer
from turboquant_hf.cache.fixed import current_step
from turboquant_hf.cache.layer import NO_TRAINING, refuse_backward

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
    if isinstance(key, StaticHandle):
        return static_attention(module, query, key, value, attention_mask, **options)
    return _dynamic_attention(module, query, key, value, attention_mask, **options)


@torch.compiler.disable  # the layer counts in Python
def _dynamic_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: PackedHandle,
    value: PackedHandle,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over handles of a `TurboQuantLayer`, which then encodes."""
    layer = key.layer
    causal = getattr(module, "is_causal", True) if options.get("is_causal") is None else options["is_causal"]
    if attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        # A growing layer has no free slots, so these are its newest tokens; SDPA's own rule aligns to the oldest.
        attention_mask = CausalMask(query.shape[0], query.shape[2], key.shape[2], query.device)
    note_padding(layer, attention_mask, query.shape[2])
    layer.observe(query)
    if layer.preset.encode_first:
        layer.commit()
    # Models may change one of the two on the way (differential attention): then it is a tensor.
    whole = isinstance(value, PackedHandle) and value.layer is layer and key.length == layer.get_seq_length()
    served = whole and not options["output_attentions"] and options.get("sinks") is None
    if attention_mask is not None and attention_mask.shape[1] != 1:
        served = False  # the kernels know one mask for all heads
    packed = packed_attention(layer, query, attention_mask, **options) if served else None
    if packed is not None:
        output = (packed, None)
    elif whole and _in_pieces(layer, query, attention_mask, options):
        output = (chunk_attention(query, layer_parts(layer, query.shape[2]), options["scaling"]), None)
    else:
        output = dense_attention(module, query, key.dense(), densified(value), attention_mask, **options)
    layer.commit()
    if query.requires_grad and torch.is_grad_enabled():
        output = (refuse_backward(output[0], query), output[1])
    return output


def wants_weights(options: dict[str, Any]) -> bool:
    """Whether the attention weights are asked for, in so many words or by transformers' collector of outputs."""
    if options.get("output_attentions"):
        return True
    # Traced code can ask the collector only where the whole model is traced.
    if collector is None or (torch.compiler.is_compiling() and not collector.compiling):
        return False
    return any("attentions" in name for name in collector.get() or ())


def densified(x: torch.Tensor | PackedHandle) -> torch.Tensor:
    return x.dense() if isinstance(x, PackedHandle) else x


def _in_pieces(
    layer: TurboQuantLayer, query: torch.Tensor, attention_mask: torch.Tensor | None, options: dict[str, Any]
) -> bool:
    """Whether a chunk is attended to without ever decoding all of the layer's history at once."""
    plain = serves(attention_mask, query, layer.get_seq_length(), options)
    # encode_first rounds the tail as well, by the tiles before it: `layer.dense` knows how.
    return plain and query.shape[2] > MAX_QUERIES and not layer.preset.encode_first


def note_padding(layer: TurboQuantLayer, attention_mask: torch.Tensor | None, q_length: int) -> None:
    """Learn the left padding from a prompt's mask, where nobody has told the layer before its first encode."""
    if attention_mask is None or q_length == 1 or layer.noted_starts is not None or layer.tiles[0].count:
        return
    starts = getattr(attention_mask, "_turboquant_starts", None)
    if starts is None:
        if isinstance(attention_mask, CausalMask):
            starts = [0] * layer.batch_size
        else:
            starts = left_padding(attention_mask).expand(layer.batch_size).tolist()
        attention_mask._turboquant_starts = starts  # the same mask serves every layer: one wait for the device
    layer.learn_padding(starts)
