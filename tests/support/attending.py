"""Random queries, keys and values, and attention over them by definition."""

from __future__ import annotations

import torch


def draw(queries, tokens, heads=(4, 2), dims=(16, 16), dtype=torch.float32, device="cpu", seed=0):
    """query [2, Hq, queries, D], key [2, H, tokens, D], value [2, H, tokens, Dv]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads[0], queries, dims[0]), (heads[1], tokens, dims[0]), (heads[1], tokens, dims[1])
    return [torch.randn(2, *shape, generator=generator).to(device, dtype) for shape in shapes]


def by_definition(query, key, value, scaling, causal):
    """Output and log-sum-exp in float64, aligned to the newest key."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)


def error(got, expected):
    """Relative RMS error."""
    return ((got.double() - expected).norm() / expected.norm()).item()
