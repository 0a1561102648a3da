"""Prunes, then quantizes: packs what kvpress leaves of a prompt, and reads the following text through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.evaluation.harness import fidelity
from turboquant_hf.evaluation.harness.models import forward
from turboquant_hf.evaluation.presets.memory import bits_per_channel
from turboquant_hf.evaluation.presets.named import check_packed, resolve_presets


@torch.inference_mode()
def measure_pruned(
    model,
    window: torch.Tensor,
    *,
    press: str,
    compression_ratio: float,
    presets: Sequence[str],
    chunk: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Prune the first half of a window with kvpress, pack the rest with each preset, score the second half.

    `bits` are real bits per channel and original token, pruned tokens included.

    - kvpress 0.5.5 requires transformers below 5.3, because it reads a `cache_position` that later versions do not
      pass. With `cache_position` passed here, it runs up to the version that renames `past_key_values`, which raises
      KeyError.
    - kvpress assigns a layer's `keys` and `values`, which a packed layer does not allow. It therefore prunes a
      DynamicCache, and the remaining tokens are packed afterwards.
    """  # fmt: skip
    import kvpress

    tokens = window.to(model.device)
    half = tokens.shape[1] // (2 * chunk) * chunk

    def prefill(press=None) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        if press is None:
            forward(model, tokens[:, :half], cache)
        else:
            with press(model):
                forward(model, tokens[:, :half], cache, cache_position=torch.arange(half, device=tokens.device))
        return cache

    reference = _score(model, tokens, prefill(), half, chunk)
    pruned = prefill(getattr(kvpress, press)(compression_ratio=compression_ratio))
    kept = sum(layer.keys.shape[2] for layer in pruned.layers) / (half * len(pruned.layers))
    survivors = min(layer.keys.shape[2] for layer in pruned.layers)
    rows = []
    for preset in resolve_presets(presets, **options):
        enough = min(preset.min_statistics, survivors // preset.tile * preset.tile)
        preset = preset.with_overrides(min_statistics=enough)
        check_packed({preset.name: preset}, survivors)
        cache = TurboQuantCache(model.config, preset)
        for index, layer in enumerate(pruned.layers):
            cache.update(layer.keys, layer.values, index)
            cache.packed_layers[index].commit()
        found = _score(model, tokens, cache, half, chunk)
        kl = fidelity.divergences(reference, found).mean().item()
        bits = bits_per_channel(preset, pruned.layers[0].keys.shape[-1], len(cache.packed_layers))
        rows.append({"pruned by": press, "preset": preset.name, "kl": kl, "kept": kept, "bits": sum(bits) / 2 * kept})
    return rows


def _score(model, tokens: torch.Tensor, cache, start: int, chunk: int) -> torch.Tensor:
    """Log-probabilities after each token from `start` on; positions are those of the whole text."""
    parts = []
    for position in range(start, tokens.shape[1], chunk):
        piece = tokens[:, position : position + chunk]
        positions = torch.arange(position, position + piece.shape[1], device=tokens.device)[None]
        logits = forward(model, piece, cache, position_ids=positions).logits[0]
        parts.append(logits.float().log_softmax(-1))
    return torch.cat(parts)
