"""Plain torch: the definition of the kernel that appends tokens while only the device knows how many there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_hf.kernels.decode.inputs import RawTokens


@dataclass(frozen=True, eq=False)
class FixedTokens:
    """Where a layer of fixed arrays keeps its raw tokens, and how many it has.

    Attributes:
        ring: [B, H, R, D]. Position p has slot p % R.
        sinks: [B, H, S, D]. Slot s of sequence b holds position starts[b] + s.
        starts: int64 [B], the position of each sequence's first real token.
        counts: int32 [2], (tiles, length), on the arrays' device.
        ticket: int32 [1], 0 between two calls. The last program of the kernel recognises itself by this counter.
        max_len: tokens at this position and later are dropped and not counted.
    """

    ring: RawTokens
    sinks: RawTokens
    starts: torch.Tensor
    counts: torch.Tensor
    ticket: torch.Tensor
    max_len: int


def append_tokens(keys: torch.Tensor, values: torch.Tensor, held: FixedTokens) -> None:
    """Write q new tokens to their slots of the ring, to the sinks where they are sinks, and count them.

    Args:
        keys, values: [B, H, q, D] and [B, H, q, Dv], with q <= R. They stand at positions length, length + 1, ...
        held: its arrays are changed in place, and `length` becomes `length + q`.
    """
    counts = held.counts
    length = int(counts[1])
    stop = min(length + keys.shape[2], held.max_len)
    position = torch.arange(length, stop, device=keys.device)
    slots = (held.starts[:, None] + torch.arange(held.sinks.keys.shape[2], device=keys.device)) - length
    inside = (slots >= 0) & (slots < stop - length)
    slots = slots.clamp(0, keys.shape[2] - 1)[:, None, :, None]
    for new, raw, first in ((keys, held.ring.keys, held.sinks.keys), (values, held.ring.values, held.sinks.values)):
        raw.index_copy_(2, position % raw.shape[2], new[:, :, : stop - length])
        picked = new.gather(2, slots.expand(-1, new.shape[1], -1, new.shape[3]))
        first.copy_(torch.where(inside[:, None, :, None], picked, first))
    counts[1] = stop
