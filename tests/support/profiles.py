"""Profiles of toy models, with maps of random moments."""

from __future__ import annotations

import torch

from turboquant_hf.cache.profiles import profile_fields
from turboquant_hf.primitives import rounding_map
from turboquant_hf.quantizers.profile import Profile
from turboquant_hf.quantizers.profiled import HeadMaps


def random_moment(heads: int, dim: int, seed: int, size: float = 1.0) -> torch.Tensor:
    """float64 [heads, dim, dim] of correlated vectors with channels of unlike strength."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, 4 * dim, dim, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.3, 3.0, dim, dtype=torch.float64)
    x = size * x @ (torch.eye(dim) + 0.2 * torch.randn(dim, dim, generator=generator)).double()
    return x.transpose(1, 2) @ x / x.shape[1]


def random_maps(heads: int, dim: int, seed: int = 0, size: float = 1.0) -> HeadMaps:
    """For vectors of `random_moment(heads, dim, seed, size)`."""
    matrix, energy = rounding_map(random_moment(heads, dim, seed, size), random_moment(heads, dim, seed + 1))
    return HeadMaps(matrix.float(), energy.float())


def random_profile(config, heads: int, dim: int, layers: int) -> Profile:
    """For any model of this shape."""
    maps = [(random_maps(heads, dim, 4 * n), random_maps(heads, dim, 4 * n + 2)) for n in range(layers)]
    return Profile(profile_fields(config), tuple(maps), {"tokens": 0})


def random_vectors(heads: int, dim: int, seed: int, tokens: int, batch: int = 1, size: float = 1.0) -> torch.Tensor:
    """float32 [batch, heads, tokens, dim] with the moments of `random_moment(heads, dim, seed, size)`."""
    root = torch.linalg.cholesky(random_moment(heads, dim, seed, size)).float()
    x = torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed + 100))
    return x @ root.transpose(1, 2)
