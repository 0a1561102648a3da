"""Attention over a preallocated layer in code that torch.compile traces: one operator, which runs on the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from turboquant_hf.attention.dense import dense_attention, densified
from turboquant_hf.attention.packed import layer_attention
from turboquant_hf.attention.plain import is_plain
from turboquant_hf.cache import PackedHandle, TracedHandle
from turboquant_hf.cache.traced import host_op, layer_of


def traced_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: TracedHandle,
    value: torch.Tensor | TracedHandle,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [B, Hq, q, D], handles of a `TurboQuantStaticLayer` -> ([B, q, Hq, Dv], weights or None)."""
    if isinstance(value, PackedHandle) and is_plain(options) and getattr(module, "is_causal", True):
        scaling, softcap, s_aux = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
        return attend(query, value.new, attention_mask, s_aux, scaling, softcap, key.layer.number), None
    return dense_attention(module, query, key.dense(), densified(value), attention_mask, **options)


@host_op("attend")
def attend(
    query: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    s_aux: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    number: torch.Tensor,
) -> torch.Tensor:
    """Plain causal attention of the newest q tokens: [B, Hq, q, D] -> [B, q, Hq, Dv]. The layer then encodes.

    values: those of the newest tokens, [B, H, q, Dv]. mask: [B, 1, q, max_len], bool or additive.
    """
    module = SimpleNamespace(is_causal=True, training=False, num_key_value_groups=query.shape[1] // values.shape[1])
    options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, "output_attentions": False}
    return layer_attention(module, query, *layer_of(number).handles(), mask, **options)[0].contiguous()


@attend.register_fake
def _(query, values, mask, s_aux, scaling, softcap, number):
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, values.shape[3]))
