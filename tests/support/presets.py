"""Packed caches of small tiles by kind, and what a model says with every preset.

`python -m tests.support.presets DTYPE FILE` saves those logits, computed while DTYPE is torch's default.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.generating import TILES
from turboquant_hf import TurboQuantCache, TurboQuantStaticCache
from turboquant_hf.config import preset_names

ROOM = 120
KINDS = {
    "growing": lambda config, preset="lossless": TurboQuantCache(config, preset, **TILES),
    "static": lambda config, preset="lossless": TurboQuantStaticCache(config, ROOM, preset, **TILES),
}


def logits_of_presets() -> dict[str, torch.Tensor]:
    """What a model says after a prompt that every preset has packed, whatever torch's default dtype is."""
    generator = torch.Generator().manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    for parameter in model.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32))
    model.set_attn_implementation("turboquant")
    ids = torch.randint(64, (1, 60), generator=generator)
    found = {}
    with torch.no_grad():
        for make, name in [(make, name) for make in KINDS.values() for name in preset_names()]:
            try:
                cache = make(config, name)
                model(ids, past_key_values=cache)
            except (NotImplementedError, ValueError):  # not for this cache
                continue
            found[f"{type(cache).__name__} {name}"] = model(ids[:, :2], past_key_values=cache).logits
    return found


if __name__ == "__main__":
    torch.set_default_dtype(getattr(torch, sys.argv[1]))
    torch.save(logits_of_presets(), sys.argv[2])
