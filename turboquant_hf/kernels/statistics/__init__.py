"""Statistics that quantizers take before the first encode: sums of squares, and the state that follows from them."""

from turboquant_hf.kernels.statistics.reference import (
    balance_channels,
    beyond_half,
    borrow,
    centred_energy,
    effective_rank,
    power_of_two,
    query_energy,
    tile_energy,
    typical_scale,
)

__all__ = [
    "balance_channels", "beyond_half", "borrow", "centred_energy", "effective_rank", "power_of_two", "query_energy",
    "tile_energy", "typical_scale",
]  # fmt: skip
