"""The mean of a tile's tokens. Encoding subtracts it, and statistics of centred keys leave it out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def masked_mean(x, weight, T: tl.constexpr, WEIGHT: tl.constexpr):
    """Mean over the tokens (axis 0) of float32 x, rounded to half as it is stored; NaN where a half cannot hold it."""
    if WEIGHT:
        mean = tl.sum(x * weight[:, None], axis=0) / tl.maximum(tl.sum(weight, axis=0), 1.0)
    else:
        mean = tl.sum(x, axis=0) / T
    return tl.where(tl.abs(mean) <= 65504.0, mean, float("nan")).to(tl.float16)
