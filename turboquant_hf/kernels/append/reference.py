"""Plain torch: the definition of the kernel that appends without asking the device how much it holds."""

from __future__ import annotations

import torch

from turboquant_hf.kernels.decode.inputs import RawTokens


def append_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    ring: RawTokens,
    sinks: RawTokens,
    starts: torch.Tensor,
    counts: torch.Tensor,
    ticket: torch.Tensor,
    max_len: int,
) -> None:
    """Write q new tokens to their slots and count them.

    Args:
        keys, values: [B, H, q, D] and [B, H, q, Dv].
        ring: [B, H, R, D], R >= q; position p is written to slot p % R.
        sinks: [B, H, S, D]; position starts[b] + s of sequence b is also written to slot s.
        starts: int64 [B].
        counts: int32 [2], (tiles, length); the tokens stand at positions length, length + 1, ... and length becomes
            length + q.
        ticket: int32 [1], 0 before and after: by it the kernel knows its last program.
        max_len: a position from here on is dropped, and not counted.
    """
    length = int(counts[1])
    stop = min(length + keys.shape[2], max_len)
    position = torch.arange(length, stop, device=keys.device)
    slots = (starts[:, None] + torch.arange(sinks.keys.shape[2], device=keys.device)) - length
    inside = (slots >= 0) & (slots < stop - length)
    slots = slots.clamp(0, keys.shape[2] - 1)[:, None, :, None]
    for new, raw, first in ((keys, ring.keys, sinks.keys), (values, ring.values, sinks.values)):
        raw.index_copy_(2, position % raw.shape[2], new[:, :, : stop - length])
        picked = new.gather(2, slots.expand(-1, new.shape[1], -1, new.shape[3]))
        first.copy_(torch.where(inside[:, None, :, None], picked, first))
    counts[1] = stop
