"""Launch geometry: how query rows, KV heads and tiles are dealt to blocks, and how many warps a block has.

The grid of a launch is (splits, H, B * chunks). A chunk is up to `ROWS_PER_BLOCK` query rows of one KV head. The tiles
of a head are dealt to `splits` blocks per chunk.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from turboquant_hf.kernels.decode.cuda.source import Shape, block_rows, most_warps
from turboquant_hf.kernels.decode.inputs import PackedSide

ROWS_PER_BLOCK = block_rows(wide=True)
"""The most query rows of one KV head that a block serves."""
MAX_SPLITS = 64
MAX_GRID = 65535
"""The most blocks in the second and in the third direction of a launch."""


def query_rows(query: torch.Tensor, keys: PackedSide) -> int:
    """Query rows per KV head: query heads of the KV head times new tokens."""
    return query.shape[1] // keys.codes.shape[1] * query.shape[2]


def is_wide(query: torch.Tensor, keys: PackedSide) -> bool:
    """Whether a KV head has more query rows than the narrow kernel serves per block."""
    return query_rows(query, keys) > block_rows(wide=False)


def grid(query: torch.Tensor, keys: PackedSide) -> tuple[int, int]:
    """The launch's second and third direction: KV heads, and sequences times chunks of query rows."""
    chunks = -(-query_rows(query, keys) // block_rows(is_wide(query, keys)))
    return keys.codes.shape[1], query.shape[0] * chunks


@lru_cache(maxsize=1024)
def splits(blocks: int, tiles: int, teams: int, processors: int) -> int:
    """The number of blocks that share the tiles of a chunk of query rows.

    The least cost has full waves of blocks, and the same number of tiles for every team of warps.
    """

    def cost(splits: int) -> float:
        # A block waits for its slowest team, and all its teams share the bandwidth: the mean of both is its time.
        mean = tiles / (splits * teams)
        tiles_of_team = (math.ceil(mean) + mean) / 2
        return -(-blocks * splits // processors) * (tiles_of_team * (1 + min(1.0, mean)) + 3) + 0.05 * splits

    most = max(1, min(MAX_SPLITS, 4 * processors // blocks, tiles))
    return min(range(1, most + 1), key=lambda splits: (cost(splits), splits))


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=256)
def warps(shape: Shape, device: torch.device) -> int:
    """Warps per block; one block fills a multiprocessor. 0 where the shared memory does not serve two warps."""
    properties = torch.cuda.get_device_properties(device)
    return most_warps(shape, getattr(properties, "shared_memory_per_block_optin", 48 * 1024))
