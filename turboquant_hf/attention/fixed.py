"""Attention and masks of a decode step over fixed arrays (`cache.fixed`): nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.cache import PackedHandle
from turboquant_hf.cache.fixed import FixedStep

_SLIDING = sliding_window_causal_mask_function(2)
"""Only its code and the names in it are looked at."""


class UnknownMask(RuntimeError):
    """A mask that a fixed step cannot make on the device."""


def fixed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: PackedHandle,
    value: torch.Tensor | PackedHandle,
    attention_mask: torch.Tensor | None,
    step: FixedStep,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a step's queries [B, Hq, q, D] over a fixed layer -> ([B, q, Hq, Dv], None).

    The kernels know which slots are in use, the causal order and, from the step, which positions are padding. What they
    do not serve reads dense tensors with the step's whole mask.
    """
    fixed = key.layer.fixed
    fixed.observe(query)
    same = isinstance(value, PackedHandle) and value.layer is key.layer
    if same and fixed.reads_packed and is_plain(dropout, kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        options = {name: kwargs.get(name) for name in ("softcap", "s_aux")}
        output = fixed.attend(query, scaling=scaling, mask=step.padding, **options)
        return output.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        attention_mask = step.full_mask()
    dense = value.dense() if isinstance(value, PackedHandle) else value
    return dense_attention(
        module, query, key.dense(), dense, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


def is_plain(dropout: float, kwargs: dict) -> bool:
    """Causal attention over everything, nothing added to the scores."""
    return (
        dropout == 0.0
        and kwargs.get("sliding_window") is None
        and kwargs.get("position_bias") is None
        and kwargs.get("is_causal") is not False
        and not kwargs.get("output_attentions")
        and kwargs.get("sinks") is None
    )


def fixed_mask(step: FixedStep, kv_length: int, mask_function: Callable, local_size: int | None) -> torch.Tensor:
    """The mask [B or 1, 1, q, kv_length] of a fixed step (True: attend).

    Raises:
        UnknownMask: the model asks for another rule than the causal one or a sliding window.
    """
    if local_size is None and mask_function is causal_mask_function and kv_length == step.room:
        return step.full_mask()
    if local_size is not None and _is_sliding(mask_function):
        return step.window_mask(local_size, kv_length)
    raise UnknownMask(f"its mask follows a rule of its own ({getattr(mask_function, '__qualname__', mask_function)})")


def _is_sliding(mask_function: Callable) -> bool:
    """Whether this is what transformers makes of a sliding window and the causal rule, and nothing else."""
    parts = _parts(mask_function)
    return parts is not None and parts == _parts(_SLIDING)


def _parts(mask_function: Callable) -> list | None:
    cells = getattr(mask_function, "__closure__", None)
    if getattr(mask_function, "__code__", None) is not _SLIDING.__code__ or len(cells) != 1:
        return None
    return [part.__code__ for part in cells[0].cell_contents]
