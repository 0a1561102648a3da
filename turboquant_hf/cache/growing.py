"""Layers of transformers' that keep every token and are not packed, in an estimate of memory.

Sparse attention (DeepSeek V3.2, GLM-5) has them. An indexer chooses the tokens that a query reads, and keeps one small
key per token beside keys and values: [B, T, index head dim], and for some models positions [dims, B, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from turboquant_hf.cache.hybrid import packed_part

INDEXED = ("indexer_keys", "indexer_position_ids")


def is_indexed(layer: Any) -> bool:
    """Whether a layer belongs to sparse attention with an indexer."""
    return hasattr(layer, INDEXED[0])


def fill_indexers(layers: Sequence[Any], probed: Sequence[Any], batch: int, tokens: int) -> None:
    """Give layers the indexer keys of a prompt, as those of probed layers but `tokens` long, without numbers.

    Args:
        layers: of a new cache.
        probed: the same layers after a short prompt, on the meta device.
        batch: sequences.
        tokens: of every sequence.
    """
    for layer, seen in zip(layers, probed, strict=False):
        keys, positions = (getattr(seen, name, None) for name in INDEXED)
        if isinstance(keys, torch.Tensor):
            layer.update_indexer(keys.new_empty((batch, tokens, keys.shape[2])))
        if isinstance(positions, torch.Tensor):
            layer.indexer_position_ids = positions.new_empty((positions.shape[0], batch, tokens))


def unpacked(layers: Sequence[Any], probed: Sequence[Any]) -> list[Any]:
    """Those of the probed layers of which a cache packs nothing."""
    return [seen for layer, seen in zip(layers, probed, strict=False) if packed_part(layer) is None]


def token_nbytes(layer: Any) -> int:
    """Bytes of one token of one sequence in a probed layer: keys, values, and the indexer's. Windows do not grow: 0."""
    if getattr(layer, "sliding_window", None) or not isinstance(getattr(layer, "keys", None), torch.Tensor):
        return 0
    held = [getattr(layer, name, None) for name in ("keys", "values", *INDEXED)]
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor)) // layer.keys.shape[2]
