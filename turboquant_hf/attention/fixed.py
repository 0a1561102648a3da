"""Attention of a decode step over fixed arrays (`cache.fixed`): nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import torch

from turboquant_hf.attention.dense import dense_attention, densified
from turboquant_hf.attention.plain import is_plain
from turboquant_hf.cache import PackedHandle
from turboquant_hf.cache.fixed import FixedStep


def fixed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: PackedHandle,
    value: torch.Tensor | PackedHandle,
    attention_mask: torch.Tensor | None,
    step: FixedStep,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a step's queries [B, Hq, q, D] over a fixed layer -> ([B, q, Hq, Dv], None).

    The kernels know which slots are in use and the causal order. The step tells them which positions are padding. Calls
    that the kernels do not serve read dense tensors with the step's whole mask.
    """
    fixed = key.layer.fixed
    key.layer.observe(query)
    same = isinstance(value, PackedHandle) and value.layer is key.layer
    if same and fixed.reads_packed and is_plain(options):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        known = {name: options.get(name) for name in ("softcap", "s_aux")}
        output = fixed.attend(query, scaling=scaling, mask=step.padding, **known)
        return output.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        attention_mask = step.full_mask()
    return dense_attention(module, query, key.dense(), densified(value), attention_mask, scaling=scaling, **options)
