"""Attention over dense tensors: by SDPA, or by plain torch for options that SDPA ignores or refuses."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from turboquant_hf.attention.chunk import chunk_attention, serves, tensor_parts
from turboquant_hf.attention.mask import CausalMask
from turboquant_hf.cache import PackedHandle

SDPA_TAKES_BIAS = "position_bias" in inspect.signature(sdpa_attention_forward).parameters
"""Whether transformers' SDPA applies a position bias. In early versions it ignores the bias."""


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [B, Hq, q, D], key [B, H, T, D], value [B, H, T, Dv] -> ([B, q, Hq, Dv], weights or None).

    Args:
        attention_mask: [1 or B, 1 or Hq, 1 or q, T] bool (True: attend) or additive, or None for the causal rule.
        softcap: scores become softcap * tanh(scores / softcap) (gemma2).
        s_aux: [Hq] extra logits that take probability and carry no value (attention sinks, gpt-oss).
        sinks: [B, Hq, q, 1], the same per query (inkling2).
        position_bias: [1 or B, Hq, q, T], added to the scores (t5).
        output_attentions: whether to return the weights [B, Hq, q, T], as eager attention does.

    Raises:
        ValueError: for a mask that is neither bool nor floating point.
    """
    q_length, kv_length = query.shape[2], key.shape[2]
    if isinstance(attention_mask, CausalMask):
        options = {
            "dropout": dropout, "softcap": softcap, "s_aux": s_aux, "sinks": sinks, "position_bias": position_bias,
            "output_attentions": output_attentions, **kwargs,
        }  # fmt: skip
        alike = query.dtype == key.dtype == value.dtype and query.shape[0] == key.shape[0]
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if alike and not trains and serves(attention_mask, query, kv_length, options):
            return chunk_attention(query, tensor_parts(q_length, key, value), scaling), None
        attention_mask = attention_mask.dense()
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is not None and attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask: dtype={attention_mask.dtype} is not supported for a mask of "
            f"{attention_mask.dim()} dimensions; allowed: torch.bool (True: attend), or floats that are added to scores"
        )
    if position_bias is not None:
        position_bias = position_bias[..., :kv_length]
        if SDPA_TAKES_BIAS:
            kwargs["position_bias"] = position_bias
    plain = softcap is None and s_aux is None and sinks is None and (position_bias is None or SDPA_TAKES_BIAS)
    if plain and not output_attentions:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None and causal and q_length > 1:
        # Aligned to the upper left, as in SDPA: the slots behind are room that a static cache has not filled yet.
        attention_mask = torch.ones(q_length, kv_length, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask[..., :kv_length]
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    if sinks is not None:
        weights = torch.cat([scores, sinks.float()], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    weights = torch.nn.functional.dropout(weights.to(value.dtype), p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights if output_attentions else None


def densified(x: torch.Tensor | PackedHandle) -> torch.Tensor:
    return x.dense() if isinstance(x, PackedHandle) else x
