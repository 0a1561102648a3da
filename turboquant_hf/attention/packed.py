"""Attention that reads packed tiles, where the kernels can serve the call."""

from __future__ import annotations

import torch

from turboquant_hf.attention.mask import MAX_QUERIES
from turboquant_hf.attention.plain import is_plain
from turboquant_hf.attention.step import PreparedStep
from turboquant_hf.cache import TurboQuantLayer
from turboquant_hf.kernels.decode import History, RawTokens, Scoring
from turboquant_hf.kernels.dispatch import backend, decode_attention
from turboquant_hf.quantizers.rotated import reads_packed


def packed_attention(
    layer: TurboQuantLayer,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None,
    **kwargs,
) -> torch.Tensor | None:
    """[B, q, Hq, D] for query [B, Hq, q, D], or None where this call wants dense tensors.

    Up to 16 queries of plain causal attention over rotated tiles are served; `attention_mask` must come from
    `turboquant_mask` when there are several.
    """
    options = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": kwargs.get("softcap"),
        "s_aux": kwargs.get("s_aux"),
    }
    step = layer.step
    if step is not None and query.shape[2] == 1 and (attention_mask is None or attention_mask.dtype == torch.bool):
        keys = None if attention_mask is None else attention_mask[:, 0, 0, :].expand(query.shape[0], -1)
        if is_plain(kwargs) and step.fits(layer, query, keys, options):
            return step(layer, query, keys)
        layer.step = None
    if not _applies(layer, query, kwargs):
        return None
    keys = None
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            return None
        if query.shape[2] > 1:
            if not hasattr(attention_mask, "_turboquant_keys"):
                return None
            keys = attention_mask._turboquant_keys
        else:
            keys = attention_mask[:, 0, 0, :].expand(query.shape[0], -1)
    if query.shape[2] == 1 and backend(query.device) != "torch":
        layer.step = PreparedStep.of(layer, query, keys, options)
        if layer.step is not None:
            return layer.step(layer, query, keys)
    raw = RawTokens(*layer.sinks.arrays), RawTokens(*layer.tail.view())
    history = History(*layer.packed_sides(), *raw, layer.sinks.starts)
    scoring = Scoring(**options, sparse_v_threshold=layer.preset.sparse_v_threshold)
    output = decode_attention(query, history, scoring, mask=keys)
    return output.transpose(1, 2).contiguous()


def _applies(layer: TurboQuantLayer, query: torch.Tensor, kwargs: dict) -> bool:
    """Whether kernels serve this call; plain torch decodes the tiles once and leaves the rest to SDPA."""
    return (
        query.shape[2] <= MAX_QUERIES
        and layer.tiles[0].count > 0
        and query.shape[2] <= layer.tail.count
        and not (layer.preset.encode_first and layer.tail.count > layer.preset.recent_window)
        and reads_packed(*layer.quantizers)
        and is_plain(kwargs)
        and (query.device.type == "cpu" or backend(query.device) != "torch")
    )
