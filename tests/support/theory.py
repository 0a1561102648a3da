"""Tiles of random vectors, and the errors that quantizers make on them."""

from __future__ import annotations

import torch

TILE = 128
SPHERE = {  # bits 1 to 5
    64: (0.3584, 0.1145, 0.0334, 0.0091, 0.0024),
    128: (0.3609, 0.1160, 0.0340, 0.0093, 0.00245),
}


def gaussian_tiles(dim, count=64, seed=0):
    return torch.randn(1, 1, count, TILE, dim, generator=torch.Generator().manual_seed(seed))


def unit_tiles(dim, count=64, seed=0):
    x = gaussian_tiles(dim, count, seed)
    return x / x.norm(dim=-1, keepdim=True)


def fit(quantizer, x, query_rms=None):
    return quantizer.fit(x, torch.ones(1, *x.shape[2:4]), query_rms)


def round_trip(quantizer, x, state=None):
    state = fit(quantizer, x) if state is None else state
    return quantizer.decode(quantizer.encode(x, state), state, x.shape[-1], torch.float32)


def relative_mse(quantizer, x):
    return ((round_trip(quantizer, x) - x).square().sum() / x.square().sum()).item()


def mean_inner(left, right):
    return (left * right).sum(dim=-1).mean().item()
