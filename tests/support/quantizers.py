"""Every quantizer with its options, and the tiles that tests of quantizers encode."""

from __future__ import annotations

import torch

from turboquant_hf.quantizers import QUANTIZERS

TILE = 32
CASES = [
    ("conditioned", {}),
    ("conditioned", {"widths": ((0.5, 4), (0.5, 2)), "scale_format": "e3m5"}),
    ("conditioned", {"widths": ((0.125, 4), (0.625, 2), (0.25, 1)), "channel_major": True}),
    ("conditioned", {"center": False, "balance": "key"}),
    ("conditioned", {"balance": "none", "bits": 3}),
    ("conditioned", {"widths": ((0.5, 5), (0.5, 3)), "codebook": "trellis", "scale_format": "e3m5"}),
    ("conditioned", {"widths": ((0.25, 4), (0.5, 2), (0.25, 1)), "codebook": "trellis"}),
    ("kivi", {}),
    ("kivi", {"bits": 2, "axis": "token"}),
    ("kivi", {"bits": 1, "group": 8}),
    ("kivi", {"bits": 8, "axis": "token", "group": 128}),
    ("lossless", {}),
    ("mse", {}),
    ("mse", {"bits": 3, "scale": "norm-corrected", "channel_major": True}),
    ("mse", {"bits": 8, "codebook": "uniform", "scale": "mse"}),
    ("mse", {"bits": 1, "scale": "unbiased", "rotation": "qr", "per_head": True}),
    ("mse", {"bits": 4, "codebook": "trellis", "scale": "norm-corrected", "channel_major": True}),
    ("mse", {"bits": 3, "codebook": "trellis", "scale_format": "e4m4", "block": 32}),
    ("mse", {"bits": 2, "codebook": "trellis-64", "channel_major": True}),
    ("mse", {"bits": 5, "block": 32, "rounds": 2, "rotation": "qr", "seed": 7}),
    ("outlier", {}),
    ("outlier", {"bits": 3, "outlier_bits": 4, "scale": "norm-corrected", "channel_major": True}),
    ("outlier", {"outlier_fraction": 0.5, "per_head": True}),
    ("polar", {}),
    ("polar", {"rotation": "identity"}),
    ("prod", {}),
    ("prod", {"bits": 2, "sketch": "orthogonal", "scale": "unbiased"}),
    ("prod", {"block": 32, "scale": "norm-corrected", "rotation": "qr"}),
    ("prod", {"sketch": "orthogonal", "sketch_size": 150}),
    ("prod", {"bits": 6, "sketch_size": 20}),
    ("qjl", {}),
    ("qjl", {"bits": 3, "sketch": "orthogonal", "seed": 3}),
    ("uniform", {}),
    ("uniform", {"bits": 3, "group": 50}),
    ("uniform", {"bits": 8, "codebook": "symmetric"}),
    ("uniform", {"codebook": "nf4", "group": 32}),
]


def make(name, options):
    options = dict(options)
    if name == "conditioned" and "bits" in options:
        options["widths"] = ((1.0, options.pop("bits")),)
    return QUANTIZERS[name](**options)


def id_of(case):
    name, options = case
    return "-".join([name, *(f"{key}={value}".replace(" ", "") for key, value in options.items())])


def tiles_of(head_dim, batch=2, heads=2, count=3, tile=TILE, dtype=torch.float32, seed=0):
    """Tiles with channels of unlike strength, and a weight that drops padding and sinks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, count, tile, head_dim, generator=generator)
    x = x * torch.linspace(0.2, 3.0, head_dim) + torch.randn(heads, 1, 1, head_dim, generator=generator)
    weight = torch.ones(batch, count, tile)
    weight[:, 0, :4] = 0
    return x.to(dtype), weight


def query_rms_of(x):
    return torch.linspace(2.0, 0.5, x.shape[-1]).expand(x.shape[0], x.shape[1], -1)


def fit(quantizer, x, weight):
    return quantizer.fit(x, weight, query_rms_of(x))


def round_trip(quantizer, x, state, weight=None, dtype=torch.float32):
    return quantizer.decode(quantizer.encode(x, state, weight), state, x.shape[-1], dtype)
