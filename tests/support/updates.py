"""Random keys and values, fed to a cache or to one layer without a model."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from tests.support.generating import TILES
from turboquant_hf.cache.static_layer import TurboQuantStaticLayer
from turboquant_hf.config import load_preset


def make_config(kind=LlamaConfig, **options):
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return kind(**{**sizes, **options})


def feed(cache, tokens, seed=0, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    for index in range(len(cache.layers)):
        cache.update(*(torch.randn(batch, 2, tokens, 16, generator=generator).to(dtype) for _ in range(2)), index)
    return cache


def held(cache):
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def states(tokens, batch=2, seed=0, dim=16, heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype) for _ in range(2))


def feed_layer(layer, keys, values, steps):
    """Update in pieces of the given sizes; returns what the last update returned."""
    position = 0
    for step in steps:
        result = layer.update(*(x[:, :, position : position + step] for x in (keys, values)))
        position += step
    return result


def make_static_layer(preset="lossless", max_len=200, **options):
    preset = load_preset(preset, **{**TILES, "min_statistics": 24, **options})
    return TurboQuantStaticLayer(preset, *preset.layer_quantizers(0, 1), max_len)
