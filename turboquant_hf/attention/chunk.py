"""Attention of a chunk of new tokens behind a history, without a mask tensor.

    softmax over [history | chunk]  =  the softmax over each part, weighted by the parts' sums of exponentials

- The queries of the chunk see all of the history, so that part needs no mask.
- Over the chunk itself, the causal rule is square: flash kernels apply it by `is_causal=True`.
- Every part gives its output and its log-sum-exp. `merge` combines two parts in float32.
- The history of a packed layer is decoded piece by piece, so its dense keys and values are never whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn.functional import pad

from turboquant_hf.attention.mask import MAX_QUERIES, CausalMask
from turboquant_hf.attention.plain import is_plain
from turboquant_hf.cache import TurboQuantLayer

PIECE_NUMBERS = 2**25
"""Numbers in the dense keys and values of one piece of history: 16,384 tokens of 8 heads with head dim 128."""

BLOCK_SCORES = 2**24
"""The most scores that `plain_attend` holds at once."""

Part = tuple[torch.Tensor, torch.Tensor]


def serves(mask: torch.Tensor | None, query: torch.Tensor, kv_length: int, options: dict[str, Any]) -> bool:
    """Whether `chunk_attention` serves query [B, Hq, q, D] over `kv_length` keys: only the plain causal rule."""
    return (
        isinstance(mask, CausalMask)
        and mask.keys is None
        and query.shape[2] > MAX_QUERIES
        and mask.shape[-2:] == (query.shape[2], kv_length)
        and options.get("softcap") is None
        and options.get("s_aux") is None
        and is_plain(options)
    )


@torch.no_grad()
def chunk_attention(query: torch.Tensor, parts: Iterable[Part], scaling: float | None = None) -> torch.Tensor:
    """Attention over several parts: query [B, Hq, q, D] -> [B, q, Hq, Dv].

    Args:
        query: the queries of the chunk.
        parts: pairs of keys [B, H, T, D] and values [B, H, T, Dv]. The first part holds the chunk's own q tokens, the
            others hold older tokens. Each part is read after attention over the part before.
        scaling: factor of the scores; None is D ** -0.5.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = total = None
    for key, value in parts:
        part, lse = attend(query, key, value, scaling, causal=output is None)
        del key, value  # before the next piece is decoded
        output, total = (part, lse) if output is None else merge(output, total, part, lse)
    return output.to(query.dtype).transpose(1, 2).contiguous()


def merge(output: torch.Tensor, total: torch.Tensor, part: torch.Tensor, lse: torch.Tensor) -> Part:
    """Combine attention over two sets of keys: outputs [B, Hq, q, Dv] and log-sum-exps [B, Hq, q] of each set.

    Returns output and log-sum-exp over both sets, float32. `output` is overwritten if it is float32.
    """
    weight = (lse - total).sigmoid().unsqueeze(-1)
    return output.float().lerp_(part.float(), weight), torch.logaddexp(total, lse)


# ---------------------------------------------------------------------- parts


def tensor_parts(queries: int, key: torch.Tensor, value: torch.Tensor) -> Iterator[Part]:
    """The newest `queries` tokens of dense keys and values, then all older tokens."""
    start = key.shape[2] - queries
    yield key[:, :, start:], value[:, :, start:]
    if start:
        yield key[:, :, :start], value[:, :, :start]


def layer_parts(layer: TurboQuantLayer, queries: int) -> Iterator[Part]:
    """The newest `queries` tokens of a layer, then the older tokens in equal pieces, decoded one at a time."""
    length = layer.get_seq_length()
    start = length - queries
    yield layer.held("keys", start, length), layer.held("values", start, length)
    if not start:
        return
    most = max(PIECE_NUMBERS // (layer.batch_size * layer.num_heads * sum(layer.head_dims)), 1)
    size = -(-start // -(-start // most))
    size += -size % layer.preset.tile  # whole tiles, so that none is decoded twice
    for first in range(0, start, size):
        last = min(first + size, start)
        yield layer.held("keys", first, last), layer.held("values", first, last)


# ---------------------------------------------------------------------- attention over one part


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> Part:
    """(output [B, Hq, q, Dv], float32 log-sum-exp [B, Hq, q]) of query [B, Hq, q, D] over key and value of H heads.

    causal: query i sees keys 0 to i (q = T); otherwise every query sees every key.

    This calls the operators behind F.scaled_dot_product_attention, because that function does not return the
    log-sum-exp. `plain_attend` serves what they do not.
    """
    width = max(key.shape[-1], value.shape[-1])
    width += -width % 8  # flash needs one head dim, a multiple of 8, for all three; zeros change no score
    padded = [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in (query, key, value)]
    found = _fused(*padded, scaling, causal)
    if found is None:
        return plain_attend(query, key, value, scaling, causal)
    output, lse = found
    return output[..., : value.shape[-1]], lse


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> Part | None:
    """`attend` by a fused kernel, for tensors of one head dim; None if no kernel serves or users turned it off."""
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled():
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return run(query, key, value, 0.0, causal, scale=scaling)
    if query.device.type != "cuda":
        return None
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, causal, groups > 1)
    if torch.backends.cuda.can_use_flash_attention(params):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)[:2]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, causal, False)
    if not torch.backends.cuda.can_use_efficient_attention(params):
        return None
    run = torch.ops.aten._scaled_dot_product_efficient_attention
    output, lse = run(query, key, value, None, True, 0.0, causal, scale=scaling)[:2]
    return output, lse[:, :, : query.shape[2]]  # this kernel pads the rows of its log-sum-exp


def plain_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, causal: bool) -> Part:
    """`attend` in plain torch and float32, for a few queries at a time."""
    heads, tokens = key.shape[1], key.shape[2]
    rows = max(BLOCK_SCORES // (query.shape[0] * query.shape[1] * tokens), 1)
    key, value = key.float().unsqueeze(2), value.float().unsqueeze(2)
    outputs, lses = [], []
    for first in range(0, query.shape[2], rows):
        block = query[:, :, first : first + rows].float().unflatten(1, (heads, -1))
        scores = block @ key.transpose(-1, -2) * scaling  # [B, H, queries per KV head, rows, T]
        if causal:
            seen = torch.ones(block.shape[3], tokens, dtype=torch.bool, device=key.device).tril(first)
            scores = scores.masked_fill(~seen, -torch.inf)
        lses.append(scores.logsumexp(dim=-1).flatten(1, 2))
        outputs.append((scores.softmax(dim=-1) @ value).flatten(1, 2))
    return torch.cat(outputs, dim=2).to(query.dtype), torch.cat(lses, dim=2)
