"""Attention over dense tensors: SDPA where it can, plain torch for what SDPA ignores or refuses."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, q, D], key [B, H, T, D], value [B, H, T, Dv] -> ([B, q, Hq, Dv], None).

    softcap: scores become softcap * tanh(scores / softcap) (gemma2). s_aux: [Hq] extra logits that take
    probability and carry no value (attention sinks, gpt-oss). attention_mask: bool (True: attend) or additive.
    """
    q_length, kv_length = query.shape[2], key.shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and causal and q_length > 1:
        # Aligned to the upper left as in SDPA: the rest is room that a static cache has not filled yet.
        attention_mask = torch.ones(q_length, kv_length, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask[..., :kv_length]
    if s_aux is not None:
        extra = s_aux.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        probabilities = torch.cat([scores, extra], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        probabilities = scores.softmax(dim=-1)
    probabilities = torch.nn.functional.dropout(probabilities.to(value.dtype), p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), None
