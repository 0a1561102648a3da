"""Attention over a packed layer: by kernels, in pieces, or over dense tensors."""

from __future__ import annotations

from typing import Any

import torch

from turboquant_hf.attention.chunk import chunk_attention, layer_parts, serves
from turboquant_hf.attention.dense import dense_attention, densified
from turboquant_hf.attention.mask import MAX_QUERIES, CausalMask, left_padding
from turboquant_hf.attention.plain import is_plain
from turboquant_hf.attention.step import PreparedStep
from turboquant_hf.cache import PackedHandle, TurboQuantLayer
from turboquant_hf.cache.layer import refuse_backward
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.kernels.dispatch import backend, decode_attention
from turboquant_hf.quantizers.rotated import reads_packed


@torch.compiler.disable  # the layer counts its tokens in Python
def layer_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: PackedHandle,
    value: torch.Tensor | PackedHandle,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of query [B, Hq, q, D] over handles of a `TurboQuantLayer`. The layer then encodes.

    Returns ([B, q, Hq, Dv], weights [B, Hq, q, T] or None).
    """
    layer = key.layer
    tokens, length = query.shape[2], layer.get_seq_length()
    # A model may change keys or values before attention (differential attention); they are then tensors.
    whole = isinstance(value, PackedHandle) and value.layer is layer and key.length == layer.width
    causal = getattr(module, "is_causal", True) if options.get("is_causal") is None else options["is_causal"]
    if whole and attention_mask is not None and attention_mask.shape[-1] > length:
        attention_mask = attention_mask[..., :length]  # a preallocated layer has empty slots
    if attention_mask is None and causal and 1 < tokens < length:
        # The queries are the layer's newest tokens, but SDPA's own causal rule aligns them to the oldest.
        attention_mask = CausalMask(query.shape[0], tokens, length, query.device)
    learn_padding(layer, attention_mask, tokens)
    layer.observe(query)
    in_parts = whole and layer.reads_parts
    served = in_parts and not options["output_attentions"] and options.get("sinks") is None
    if attention_mask is not None and attention_mask.shape[1] != 1:
        served = False  # the kernels take one mask for all heads
    packed = packed_attention(layer, query, attention_mask, **options) if served else None
    if packed is not None:
        output = (packed, None)
    elif in_parts and serves(attention_mask, query, length, options):
        output = (chunk_attention(query, layer_parts(layer, tokens), options["scaling"]), None)
    else:
        keys, values = (layer.held("keys"), layer.held("values")) if in_parts else (key.dense(), densified(value))
        output = dense_attention(module, query, keys, values, attention_mask, **options)
    layer.commit()
    if query.requires_grad and torch.is_grad_enabled():
        output = (refuse_backward(output[0], query), output[1])
    return output


def learn_padding(layer: TurboQuantLayer, attention_mask: torch.Tensor | None, q_length: int) -> None:
    """Learn the left padding from a prompt's mask, if nobody has noted it and nothing is encoded yet.

    Calls of a model without `generate` need this: `PackedCache.note_padding` was then not called.
    """
    if attention_mask is None or q_length == 1 or layer.noted_starts is not None or layer.tiles.keys.count:
        return
    layer.learn_padding(left_padding(attention_mask).expand(layer.batch_size).tolist())


def packed_attention(
    layer: TurboQuantLayer,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None,
    **kwargs,
) -> torch.Tensor | None:
    """Attention by kernels: query [B, Hq, q, D] -> [B, q, Hq, D], or None if the call needs dense tensors.

    The kernels serve up to `MAX_QUERIES` queries of plain causal attention over rotated tiles. They apply the causal
    order themselves and take the padding of the keys. A mask for several queries must therefore be a `CausalMask`.
    """
    if isinstance(attention_mask, CausalMask):
        keys = attention_mask.keys
    elif attention_mask is None:
        keys = None
    elif query.shape[2] == 1 and attention_mask.dtype == torch.bool:
        keys = attention_mask[:, 0, 0, :].expand(query.shape[0], -1)
    else:
        return None
    options = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": kwargs.get("softcap"),
        "s_aux": kwargs.get("s_aux"),
    }
    single = query.shape[2] == 1 and is_plain(kwargs)
    if single and layer.step is not None and layer.step.serves(layer, query, keys, options):
        return layer.step(layer, query, keys)
    layer.step = None
    if not _applies(layer, query, kwargs):
        return None
    if single and backend(query.device) != "torch" and layer.offloader is None:
        layer.step = PreparedStep(layer, query, keys, options)
        if layer.step.serves(layer, query, keys, options):
            return layer.step(layer, query, keys)
    raw = RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.view())
    history = History(*layer.packed_sides(), *raw, layer.sinks.starts)
    scoring = Scoring(**options, sparse_v_threshold=layer.preset.sparse_v_threshold)
    output = decode_attention(query, history, scoring, mask=keys)
    return output.transpose(1, 2).contiguous()


def _applies(layer: TurboQuantLayer, query: torch.Tensor, kwargs: dict) -> bool:
    """Whether kernels serve this call. On a GPU without kernels, dense attention is faster than their reference."""
    return (
        query.shape[2] <= MAX_QUERIES
        and layer.tiles.keys.count > 0
        and query.shape[2] <= layer.tail.count
        and reads_packed(*layer.quantizers)
        and is_plain(kwargs)
        and (query.device.type == "cpu" or backend(query.device) != "torch")
    )
