"""Attention of a few queries over packed tiles, sinks and tail: plain torch, the definition of the fast kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.encode.reference import decode_rotated


@dataclass(frozen=True)
class PackedSide:
    """The packed tiles of keys or of values, N tiles of T tokens, and what undoes their transform.

    A stored vector is x = diag(1 / balance) P^T R^T y + mean: y is the coded vector, R the rotation, and P puts
    channel order[j] in place j. Keys are token-major, values channel-major (see `kernels.codes.tile_bytes`).

    Attributes:
        codes: uint8 [B, H, N, bytes].
        scale: [B, H, N, G, T], stored as `scale_format` says and divided by `gain`.
        groups: how y is cut.
        rotation: float32 [D, D] or [1, H, D, D].
        order: int16 [B, H, D], or None for the identity.
        balance: float32 [B, H, D], or None for ones.
        mean: fp16 (float32 where that does not hold it) [B, H, N, D], or None for zeros.
        scale_format: see `kernels.codes.store_scale`.
        gain: float32 [B, H], or None for ones.
        signs: float32 [D] or [1, H, D], another way to say `rotation` where each group is multiplied by these and by
            Sylvester's Hadamard matrix over the root of its size; None where it is not.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    groups: tuple[CodeGroup, ...]
    rotation: torch.Tensor
    order: torch.Tensor | None = None
    balance: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    scale_format: str = "fp16"
    gain: torch.Tensor | None = None
    signs: torch.Tensor | None = None

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        """q' with q.x = q'.y + q.mean: query [B, H, M, D] -> float32 [B, H, M, D]."""
        query = query.float()
        if self.balance is not None:
            query = query / self.balance.unsqueeze(2)
        if self.order is not None:
            query = query.gather(-1, self.order.long().unsqueeze(2).expand_as(query))
        return query @ self.rotation.float().transpose(-1, -2)

    def unrotate(self, y: torch.Tensor) -> torch.Tensor:
        """The transform undone, mean left out: y [B, H, M, D] -> float32 [B, H, M, D]."""
        x = y.float() @ self.rotation.float()
        if self.order is not None:
            x = torch.empty_like(x).scatter_(-1, self.order.long().unsqueeze(2).expand_as(x), x)
        return x if self.balance is None else x / self.balance.unsqueeze(2)

    def rotated(self, channel_major: bool) -> torch.Tensor:
        """y of every token, float32 [B, H, N * T, D]."""
        y = decode_rotated(
            self.codes,
            self.scale,
            self.groups,
            scale_format=self.scale_format,
            gain=self.gain,
            channel_major=channel_major,
        )
        return y.flatten(2, 3)


@dataclass(frozen=True)
class RawTokens:
    """Keys and values in the model's dtype, [B, H, T, D] each (a view may be strided)."""

    keys: torch.Tensor
    values: torch.Tensor


def decode_attention(
    query: torch.Tensor,
    keys: PackedSide,
    values: PackedSide,
    sinks: RawTokens,
    tail: RawTokens,
    starts: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sparse_v_threshold: float = 0.0,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of the newest Q tokens over everything that is stored, themselves included.

    Positions: tile n holds [n T, (n + 1) T), the tail what follows. Sequence b's real tokens begin at starts[b] and
    its first S of them are the sinks: inside the tiles, positions below starts[b] + S are not used, and a sink
    counts only while its position lies inside the tiles.

    Args:
        query: [B, Hq, Q, D]; query j of Q stands at position length - Q + j and sees up to itself.
        keys, values: packed tiles of H heads (Hq a multiple of H).
        sinks, tail: raw tokens, [B, H, S, D] and [B, H, L, D].
        starts: int64 [B].
        scaling: factor of the scores.
        mask: bool [B, N T + L], False hides a position; on top of `starts`.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [Hq] logits that take probability and carry no value.
        sparse_v_threshold: a tile's values are left out where all its probabilities, of every row of its head and
            relative to the largest of their row, are below it. Kernels leave out fewer: they compare with the largest
            that they have seen by then.
        counts: int32 [2], (tiles in use, length), for buffers of fixed size: the arrays of `keys` and `values` then
            have room for more tiles, `mask` for more positions, and `tail` is a ring in which position p has slot
            p % R. None: everything given is in use.

    Returns:
        [B, Hq, Q, Dv] in the query's dtype.
    """
    if counts is not None:
        keys, values, tail, mask = _in_use(keys, values, tail, mask, *counts.tolist())
    batch, query_heads, count, dim = query.shape
    heads = keys.codes.shape[1]
    packed = keys.codes.shape[2] * keys.scale.shape[-1]
    length = packed + tail.keys.shape[2]
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
    scores = scores.unflatten(2, (-1, count)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(starts, packed, length, sinks.keys.shape[2], count, mask)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if s_aux is not None:
        extra = s_aux.float().reshape(1, heads, -1, 1, 1).expand(batch, -1, -1, count, 1)
        scores = torch.cat([scores, extra], dim=-1)
    # A row that sees nothing (a padded query) gives zeros, not NaN.
    seen = visible.any(dim=-1)[:, None, None, :, None]
    probabilities = torch.where(seen, scores.softmax(dim=-1), 0.0).flatten(2, 3)
    split = [packed, sinks.keys.shape[2], length - packed]
    p_packed, p_sinks, p_tail = probabilities[..., : sum(split)].split(split, dim=-1)
    if sparse_v_threshold:
        peak = probabilities[..., : sum(split)].amax(dim=-1)
        by_tile = p_packed.unflatten(-1, (values.codes.shape[2], -1))
        likely = (by_tile.amax(dim=-1) >= sparse_v_threshold * peak[..., None]).any(dim=2, keepdim=True)
        p_packed = torch.where(likely[..., None], by_tile, 0.0).flatten(-2)
    out = values.unrotate(p_packed @ values.rotated(channel_major=True))
    if values.mean is not None:
        weight = p_packed.unflatten(-1, (values.codes.shape[2], -1)).sum(-1)
        out = out + weight @ values.mean.float()
    out = out + p_sinks @ sinks.values.float() + p_tail @ tail.values.float()
    return out.reshape(batch, query_heads, count, -1).to(query.dtype)


def _in_use(
    keys: PackedSide, values: PackedSide, ring: RawTokens, mask: torch.Tensor | None, tiles: int, length: int
) -> tuple[PackedSide, PackedSide, RawTokens, torch.Tensor | None]:
    """What `tiles` and `length` leave of buffers of fixed size, the ring unrolled."""
    keys, values = (
        replace(
            side,
            codes=side.codes[:, :, :tiles],
            scale=side.scale[:, :, :tiles],
            mean=None if side.mean is None else side.mean[:, :, :tiles],
        )
        for side in (keys, values)
    )
    first = tiles * keys.scale.shape[-1]
    slots = torch.arange(first, length, device=ring.keys.device) % ring.keys.shape[2]
    tail = RawTokens(ring.keys.index_select(2, slots), ring.values.index_select(2, slots))
    return keys, values, tail, None if mask is None else mask[:, :length]


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
