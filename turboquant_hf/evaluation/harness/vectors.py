"""Vectors to quantize, and the errors of their inner products. distortion, neighbours and qjl-lesson share them."""

from __future__ import annotations

from pathlib import Path

import torch

from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.config import load_preset
from turboquant_hf.evaluation.harness.models import forward
from turboquant_hf.quantizers import Quantizer

TILE = 128
SINKS = 4


def synthetic(tokens: int, dim: int, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Isotropic vectors, and vectors like keys: a shared mean and a few strong channels that queries do not share."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, tokens, dim, generator=generator)
    queries = torch.randn(4, 256, dim, generator=generator)
    strong = torch.ones(dim)
    strong[torch.randperm(dim, generator=generator)[: max(dim // 16, 1)]] = 8.0
    return {
        "isotropic": (queries, x),
        "key-like": (queries, strong * (x + torch.randn(4, 1, dim, generator=generator))),
    }


def load_vectors(path: Path) -> torch.Tensor:
    """The rows of a .npy or .pt file, float32 [rows, channels]."""
    if path.suffix == ".npy":
        import numpy

        x = torch.from_numpy(numpy.load(path))
    elif path.suffix == ".pt":
        x = torch.load(path, weights_only=True)
    else:
        raise ValueError(f"vectors={str(path)!r} is not supported; allowed: .npy and .pt files")
    if not isinstance(x, torch.Tensor) or x.dim() != 2:
        raise ValueError(f"vectors={str(path)!r} is not supported; allowed: one array of [rows, channels]")
    return x.float()


@torch.inference_mode()
def capture(model, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(queries, keys, values) of every packed layer as attention sees them, [heads, T, D] each, without sinks.

    The model's attention implementation must be "turboquant", which shows the queries to the cache. The queries of all
    query heads that read a KV head are concatenated, so queries have as many heads as keys.
    """
    cache = TurboQuantCache(model.config, load_preset("lossless", recent_window=tokens.shape[1]))
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(cache.packed_layers):
        layer.observe = lambda query, index=index: seen.__setitem__(index, query)
    forward(model, tokens.to(model.device), cache)
    result = []
    for index, layer in enumerate(cache.packed_layers):
        keys, values = (x[0, :, SINKS:].float().cpu() for x in (layer.keys, layer.values))
        queries = seen[index][0].float().cpu().unflatten(0, (len(keys), -1))[:, :, SINKS:].flatten(1, 2)
        result.append((queries, keys, values))
    return result


def directions(vectors: torch.Tensor) -> torch.Tensor:
    """Random queries, for vectors without queries of their own."""
    return torch.randn(vectors.shape[0], 256, vectors.shape[2], generator=torch.Generator().manual_seed(1))


def round_trip(quantizer: Quantizer, vectors: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """vectors [H, T, D] encoded in tiles and decoded; `queries` [H, n, D] give the quantizer its statistics."""
    count = vectors.shape[1]
    short = -count % TILE
    padded = torch.nn.functional.pad(vectors.float(), (0, 0, 0, short)).unflatten(1, (-1, TILE))[None]
    weight = torch.ones(count + short)
    weight[count:] = 0
    weight = weight.unflatten(0, (-1, TILE))[None]
    query_rms = None if queries is None else queries.float().square().mean(dim=1).sqrt()[None]
    state = quantizer.fit(padded, weight, query_rms)
    packed = quantizer.encode(padded, state, weight)
    return quantizer.decode(packed, state, vectors.shape[-1], torch.float32)[0].flatten(1, 2)[:, :count]


def errors(vectors: torch.Tensor, decoded: torch.Tensor, queries: torch.Tensor) -> dict[str, float]:
    """Relative errors of `decoded` [H, T, D], to be compared with the theory for unit vectors.

    mse: |k - k^|^2 / |k|^2. inner: D (q.k - q.k^)^2 / (|q|^2 |k|^2). bias: the slope of q.k^ over q.k, minus 1.
    At most 256 queries per head are used, evenly spaced.
    """
    step = max(queries.shape[1] // 256, 1)
    queries = queries[:, ::step].float()
    exact = queries @ vectors.float().transpose(1, 2)
    estimate = queries @ decoded.transpose(1, 2)
    energy = vectors.float().square().sum(-1)
    scale = queries.square().sum(-1).mean(1)[:, None, None] * energy.mean(1)[:, None, None]
    return {
        "mse": ((vectors - decoded).square().sum(-1).sum() / energy.sum()).item(),
        "inner": (vectors.shape[-1] * (estimate - exact).square() / scale).mean().item(),
        "bias": ((estimate * exact).sum() / exact.square().sum()).item() - 1,
    }
