"""Plain torch: the definition of attention over packed tiles, sinks and tail. Fast versions are tested against it.

scores = scaling * q . k          for all stored tokens
p      = softmax(scores)          over the tokens that the query sees
output = sum of p * v
"""

from __future__ import annotations

import torch

from turboquant_hf.kernels.decode.inputs import History, Scoring


def decode_attention(
    query: torch.Tensor, history: History, scoring: Scoring, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention of the newest Q tokens over all stored tokens, the newest included.

    Args:
        query: [B, Hq, Q, D]; query j stands at position length - Q + j and sees tokens up to its own position.
        history: H heads, Hq a multiple of H.
        mask: bool [B, length] or longer; False hides a position, in addition to `History.starts`.

    Returns:
        [B, Hq, Q, Dv] in the query's dtype. A row that sees no token (a padded query) gives zeros.
    """
    history = history.in_use()
    keys, values, sinks, tail = history.keys, history.values, history.sinks, history.tail
    packed, length = history.packed, history.length
    mask = None if mask is None else mask[:, :length]
    batch, query_heads, count, dim = query.shape
    heads = keys.codes.shape[1]
    rows = query.reshape(batch, heads, query_heads // heads * count, dim)

    means = (
        torch.zeros(*rows.shape[:3], packed, dtype=torch.float32, device=query.device)
        if keys.mean is None
        else (rows.float() @ keys.mean.float().transpose(-1, -2)).repeat_interleave(keys.scale.shape[-1], dim=-1)
    )
    scores = torch.cat(
        [
            keys.rotate_query(rows) @ keys.rotated(channel_major=False).transpose(-1, -2) + means,
            rows.float() @ sinks.keys.float().transpose(-1, -2),
            rows.float() @ tail.keys.float().transpose(-1, -2),
        ],
        dim=-1,
    )
    scores = scores.unflatten(2, (-1, count)) * scoring.scaling
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    visible = _visible(history.starts, packed, length, sinks.keys.shape[2], count, mask)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if scoring.s_aux is not None:
        extra = scoring.s_aux.float().reshape(1, heads, -1, 1, 1).expand(batch, -1, -1, count, 1)
        scores = torch.cat([scores, extra], dim=-1)
    # A softmax over no token is NaN.
    seen = visible.any(dim=-1)[:, None, None, :, None]
    probabilities = torch.where(seen, scores.softmax(dim=-1), 0.0).flatten(2, 3)
    split = [packed, sinks.keys.shape[2], length - packed]
    p_packed, p_sinks, p_tail = probabilities[..., : sum(split)].split(split, dim=-1)
    if scoring.sparse_v_threshold:
        peak = probabilities[..., : sum(split)].amax(dim=-1)
        by_tile = p_packed.unflatten(-1, (values.codes.shape[2], -1))
        likely = (by_tile.amax(dim=-1) >= scoring.sparse_v_threshold * peak[..., None]).any(dim=2, keepdim=True)
        p_packed = torch.where(likely[..., None], by_tile, 0.0).flatten(-2)
    out = values.unrotate(p_packed @ values.rotated(channel_major=True))
    if values.mean is not None:
        weight = p_packed.unflatten(-1, (values.codes.shape[2], -1)).sum(-1)
        out = out + weight @ values.mean.float()
    out = out + p_sinks @ sinks.values.float() + p_tail @ tail.values.float()
    return out.reshape(batch, query_heads, count, -1).to(query.dtype)


def _visible(
    starts: torch.Tensor, packed: int, length: int, sinks: int, queries: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Which of packed | sink slots | tail each query sees: bool [B, Q, packed + sinks + tail]."""
    position = torch.arange(length, device=starts.device)
    slots = starts[:, None] + torch.arange(sinks, device=starts.device)
    first = torch.where(position < packed, starts[:, None] + sinks, starts[:, None])
    seen = position >= first
    seen_slots = slots < packed
    if mask is not None:
        seen = seen & mask
        seen_slots = seen_slots & mask.gather(1, slots.clamp(max=length - 1))
    newest = length - queries + torch.arange(queries, device=starts.device)
    positions = position.expand(len(starts), -1)
    everywhere = torch.cat([positions[:, :packed], slots, positions[:, packed:]], dim=1)
    kept = torch.cat([seen[:, :packed], seen_slots, seen[:, packed:]], dim=1)
    return kept[:, None] & (everywhere[:, None] <= newest[:, None])
