"""Attention over a preallocated layer: the same ops whatever it holds, so that one compiled graph serves every step."""

from __future__ import annotations

from typing import Any

import torch

from turboquant_hf.attention.dense import dense_attention
from turboquant_hf.attention.mask import left_padding
from turboquant_hf.attention.plain import is_plain
from turboquant_hf.cache import StaticHandle, TurboQuantStaticLayer
from turboquant_hf.cache.static_ops import attend

NOT_CAUSAL = (
    "is_causal=False is not supported by a preallocated cache for a few tokens at a time; allowed: None, True, or a "
    "mask [B, 1, q, max_cache_len] that says what each token sees. TurboQuantCache serves is_causal=False."
)


def static_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: StaticHandle,
    value: StaticHandle,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, q, D], handles of a `TurboQuantStaticLayer` -> ([B, q, Hq, Dv], None).

    attention_mask: [B, 1, q, max_len] bool or additive; None is the plain causal rule without padding.
    """
    layer = key.layer
    if not torch.compiler.is_compiling():
        layer.read_by_us = True
    if key.pending is not None:
        return _chunk_attention(module, query, key, attention_mask, **options)
    if options.get("is_causal") is False and query.shape[2] > 1 and getattr(module, "is_causal", True):
        if attention_mask is None or hasattr(attention_mask, "_turboquant_keys"):
            raise ValueError(NOT_CAUSAL)
    served, mask = _key_mask(layer, query, attention_mask, options)
    if served:
        scaling, softcap, s_aux = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        buffers = layer.arena, layer.counts, layer.workspace
        return attend(query, *buffers, mask, s_aux, scaling, softcap, layer.plan_name), None
    if attention_mask is None:
        attention_mask = layer.visible(query.shape[2])
    output = dense_attention(module, query, *layer.dense(), attention_mask, **options)
    layer.commit(query)
    return output


def _key_mask(
    layer: TurboQuantStaticLayer, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> tuple[bool, torch.Tensor | None]:
    """(whether the packed reader serves the call, its mask [B, max_len])."""
    if not layer.reads_packed or not is_plain(options):
        return False, None
    if mask is None:
        return True, None
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return False, None
    if query.shape[2] > 1:
        if not hasattr(mask, "_turboquant_keys"):
            return False, None
        # The newest query sees whatever is not hidden from all; the kernel knows the causal order of the others.
        mask = mask[:, :, -1:]
    return True, mask[:, 0, 0].expand(query.shape[0], -1)


def _chunk_attention(
    module: torch.nn.Module, query: torch.Tensor, key: StaticHandle, mask: torch.Tensor | None, **options: Any
) -> tuple[torch.Tensor, None]:
    """A chunk of more than a step's tokens: on an empty cache over the raw tensors, exactly; then it is stored."""
    layer, pending, tokens = key.layer, key.pending, query.shape[2]
    # In traced code nobody can say whether the cache is empty: everything is read as if it were not.
    length = None if torch.compiler.is_compiling() else int(layer.get_seq_length())
    if pending.attended is None:
        if length == 0:
            pending.attended = pending.keys, pending.values
        else:
            stop = None if length is None else length + tokens
            pending.attended = tuple(x[:, :, :stop] for x in pending.dense())
    keys, values = pending.attended
    if mask is None and keys.shape[2] > tokens:
        mask = layer.visible(tokens, pending=0 if pending.stored else tokens)
    if mask is not None:
        mask = mask[..., : keys.shape[2]]
    starts = None
    if mask is not None and layer.noted_starts is None and not length:
        starts = left_padding(mask).expand(query.shape[0]).contiguous()
    output = dense_attention(module, query, keys, values, mask, **options)
    pending.store(query, starts)
    return output
