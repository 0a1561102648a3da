"""Device memory that a launch needs: counters of finished blocks, and the blocks' parts of each result."""

from __future__ import annotations

import threading

import torch

from turboquant_hf.kernels.decode.cuda import geometry
from turboquant_hf.kernels.decode.cuda.source import ARRIVALS, Shape, max_warps

MAX_WORKSPACES = 64
"""Streams that keep a workspace; when there are more, the oldest is dropped. torch's pools have 32 streams each."""
_WORKSPACES: dict[tuple, torch.Tensor] = {}
_LOCK = threading.Lock()


def workspace_size(blocks: int, shape: Shape, warps: int) -> int:
    """Words of a workspace: counters, every block's rows with maxima and sums, every warp's sums over raw tokens."""
    return ARRIVALS + blocks * shape.rows * (shape.dim + 2 + warps * shape.dim)


def largest_workspace(batch_heads: int, rows: int, dim: int, device: torch.device) -> int:
    """Words that are enough for any call with up to `rows` query rows per KV head, whatever its splits."""
    blocks = max(batch_heads * -(-rows // geometry.ROWS_PER_BLOCK), 4 * geometry.multiprocessors(device))
    return ARRIVALS + blocks * geometry.ROWS_PER_BLOCK * (dim + 2 + max_warps(dim) * dim)


def cleared(words: int, device: torch.device) -> torch.Tensor:
    """A new workspace. Its counters are zeros. The kernel writes everything else before it reads it."""
    workspace = torch.empty(words, dtype=torch.int32, device=device)
    workspace[:ARRIVALS].zero_()
    return workspace


def of_stream(words: int, device: torch.device, stream: int) -> torch.Tensor:
    """The stream's workspace, of at least `words` words. Calls on one stream share it.

    Another thread may still launch with a smaller one that this call replaces. That thread holds it until its launch.
    The memory was allocated on this stream, so it is used again only after that launch.
    """
    kept = _WORKSPACES.get((device, stream))
    if kept is not None and kept.numel() >= words:
        return kept
    with _LOCK:
        kept = _WORKSPACES.get((device, stream))
        if kept is None or kept.numel() < words:
            larger = cleared(words, device)
            if kept is not None:
                larger[ARRIVALS - 1] = kept[ARRIVALS - 1]
            kept = _WORKSPACES[device, stream] = larger
            while len(_WORKSPACES) > MAX_WORKSPACES:
                del _WORKSPACES[next(iter(_WORKSPACES))]
        return kept


def unread_tiles() -> int:
    """How many tiles' values sparse V left unread since the last call, per KV head and chunk of query rows.

    Waits for the devices. Calls with a workspace of their own are not counted.
    """
    total = 0
    with _LOCK:
        workspaces = list(_WORKSPACES.values())
    for workspace in workspaces:
        torch.cuda.synchronize(workspace.device)
        total += int(workspace[ARRIVALS - 1])
        with torch.inference_mode():  # the workspace may have been made in it
            workspace[ARRIVALS - 1] = 0
    return total
