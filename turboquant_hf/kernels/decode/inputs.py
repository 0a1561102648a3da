"""The arguments of attention over packed tiles: the stored history, and how it is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from turboquant_hf.kernels.codes import CodeGroup, TileCoding
from turboquant_hf.kernels.encode.reference import decode_rotated


@dataclass(frozen=True)
class PackedSide:
    """The packed tiles of keys or of values, N tiles of T tokens, and what undoes their transform.

    A stored vector is x = diag(1 / balance) P^T R^T y + mean: y is the coded vector, and P puts channel order[j] in
    place j. R is a rotation, or the inverse of the transpose of any matrix that made y. Keys are token-major, values
    channel-major (see `kernels.codes.tile_bytes`).

    Attributes:
        codes: uint8 [B, H, N, bytes].
        scale: [B, H, N, G, T], stored as `scale_format` says and divided by `gain`.
        groups: how y is cut.
        rotation: R, float32 [D, D] or [1, H, D, D].
        order: int16 [B, H, D], or None for the identity.
        balance: float32 [B, H, D], or None for ones.
        mean: fp16 (float32 where that does not hold it) [B, H, N, D], or None for zeros.
        scale_format: see `kernels.codes.store_scale`.
        gain: float32 [B, H], or None for ones.
        signs: float32 [D] or [1, H, D]: `rotation` multiplies each group by these signs, and by Sylvester's Hadamard
            matrix over the root of the group's size. None for any other rotation.
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
        how = {"scale_format": self.scale_format, "gain": self.gain, "channel_major": channel_major}
        packed = {"codes": self.codes, "scale": self.scale}
        return decode_rotated(packed, TileCoding(self.rotation, self.groups, **how)).flatten(2, 3)


@dataclass(frozen=True)
class RawTokens:
    """Keys and values in the model's dtype, [B, H, T, D] each (a view may be strided)."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, eq=False)
class History:
    """Everything that one layer stores: N tiles of T tokens, and L raw tokens behind them.

    Tile n holds positions [n T, (n + 1) T), and the tail holds the positions behind the tiles. The real tokens of
    sequence b begin at starts[b], and the first S of them are its sinks. Inside the tiles, positions below
    starts[b] + S are not read. A sink counts only while its position lies inside the tiles.

    Attributes:
        keys, values: packed tiles of H heads.
        sinks, tail: raw tokens, [B, H, S, D] and [B, H, L, D].
        starts: int64 [B].
        counts: int32 [2], (tiles in use, length), for buffers of fixed size: the arrays of `keys` and `values` then
            have room for more tiles, and `tail` is a ring in which position p has slot p % L. None: everything given
            is in use.
    """

    keys: PackedSide
    values: PackedSide
    sinks: RawTokens
    tail: RawTokens
    starts: torch.Tensor
    counts: torch.Tensor | None = None

    def in_use(self) -> History:
        """The same history without `counts`: only what is filled, the ring unrolled. Waits for the device."""
        if self.counts is None:
            return self
        tiles, length = self.counts.tolist()
        keys, values = (
            replace(
                side,
                codes=side.codes[:, :, :tiles],
                scale=side.scale[:, :, :tiles],
                mean=None if side.mean is None else side.mean[:, :, :tiles],
            )
            for side in (self.keys, self.values)
        )
        ring = self.tail
        slots = torch.arange(tiles * keys.scale.shape[-1], length, device=ring.keys.device) % ring.keys.shape[2]
        tail = RawTokens(ring.keys.index_select(2, slots), ring.values.index_select(2, slots))
        return replace(self, keys=keys, values=values, tail=tail, counts=None)

    @property
    def packed(self) -> int:
        """Tokens in tiles, N T."""
        return self.keys.codes.shape[2] * self.keys.scale.shape[-1]

    @property
    def length(self) -> int:
        """Positions held, N T + L."""
        return self.packed + self.tail.keys.shape[2]


@dataclass(frozen=True, eq=False)
class Scoring:
    """How scores become weights.

    Attributes:
        scaling: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [Hq] logits, one per query head, that take probability and carry no value.
        sparse_v_threshold: the values of a tile are left out where all its probabilities are below this threshold. A
            probability is relative to the largest of its query row, and all rows of the KV head count. 0 reads all
            values. Kernels leave out fewer tiles, because they compare with the largest probability seen so far.
    """

    scaling: float
    softcap: float | None = None
    s_aux: torch.Tensor | None = None
    sparse_v_threshold: float = 0.0
