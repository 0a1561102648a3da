"""The trellis codes that quantizers use, with levels for each width and number of channels."""

from __future__ import annotations

from .memo import once
from .trellis import SIXTEEN_STATES, Trellis

TRAINED: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {
    (1, 0): (0.0217164122, (13, 55)),
    (1, 16): (0.0199702121, (16, 59)),
    (1, 32): (0.0251995735, (12, 47)),
    (1, 64): (0.0195403844, (15, 61)),
    (2, 0): (0.0393606313, (4, 14, 26, 47)),
    (2, 16): (0.0318404585, (5, 18, 32, 55)),
    (2, 32): (0.0328479968, (5, 17, 31, 55)),
    (2, 64): (0.0344650634, (5, 16, 30, 53)),
    (3, 0): (0.0418580770, (2, 7, 12, 17, 23, 31, 42, 59)),
    (3, 16): (0.0435200110, (2, 6, 11, 16, 22, 29, 38, 51)),
    (3, 32): (0.0382592529, (2, 7, 13, 18, 25, 33, 44, 61)),
    (3, 64): (0.0391702503, (2, 7, 12, 18, 25, 33, 44, 61)),
    (4, 0): (0.0501293943, (0, 3, 5, 8, 9, 12, 14, 17, 20, 23, 25, 28, 33, 41, 50, 58)),
    (4, 16): (0.0420973201, (0, 3, 6, 9, 11, 14, 17, 20, 23, 26, 29, 32, 37, 45, 53, 61)),
    (4, 32): (0.0490552777, (0, 3, 5, 8, 9, 12, 14, 17, 20, 23, 25, 28, 33, 40, 48, 55)),
    (4, 64): (0.0493779063, (0, 3, 5, 8, 9, 12, 14, 17, 20, 23, 25, 28, 33, 41, 49, 57)),
    (5, 0): (0.0630014922, (*range(16), 17, 18, 19, 20, 22, 23, 24, 25, 28, 31, 35, 38, 42, 45, 49, 52)),
    (5, 16): (0.0642349977, (*range(20), 21, 22, 23, 24, 26, 28, 31, 33, 36, 38, 41, 43)),
    (5, 32): (0.0627462434, (*range(16), 17, 18, 19, 20, 22, 23, 24, 25, 27, 30, 33, 36, 40, 43, 46, 49)),
    (5, 64): (0.0629385336, (*range(16), 17, 18, 19, 20, 22, 23, 24, 25, 28, 31, 34, 37, 41, 44, 47, 50)),
}  # fmt: skip
"""(bits, dim) -> unit and steps above zero of the levels that `training.train` made; dim 0: the Gaussian limit."""
_CODES = {16: SIXTEEN_STATES, 64: (0o103, 0o024, 64)}
"""Number of states -> h0, h1 and word. Both codes are from Ungerboeck's table (`trellis`)."""


@once(maxsize=512)
def trellis_code(bits: int, dim: int | None = None, states: int = 16) -> Trellis:
    """The code of 16 or 64 states for a coordinate of a random point of the sphere, scaled to variance 1.

    Levels are on the grid of `codebook.grid`, so that kernels hold them as bytes. This file has them as numbers,
    because a cache that was saved on another machine must decode to the same tensors.

    Args:
        bits: 1..5.
        dim: the number of channels that are rotated together, or None for the Gaussian limit. Levels were trained for
            16, 32 and 64 channels and for the limit. Groups of up to 128 channels use the levels of the next smaller
            size, which adds at most .6 % of error. Larger groups use those of the limit. Levels of 4 and 5 bits are
            sums of two (`primitives.addends`), which adds 4 to 9 % of error.
        states: 16 in words of 32, or 64 in words of 64, with the same levels.

    Raises: ValueError for other widths or states, or a dim below 16, whose coordinates are too far from Gaussian.
    """
    if not 1 <= bits <= 5:
        raise ValueError(f"bits={bits}: must be from 1 to 5")
    if dim is not None and dim < 16:
        raise ValueError(f"dim={dim}: must be at least 16")
    if states not in _CODES:
        raise ValueError(f"states={states}: must be {' or '.join(map(str, _CODES))}")
    size = 0 if dim is None or dim > 128 else max(size for size in (16, 32, 64) if size <= dim)
    unit, steps = TRAINED[bits, size]
    levels = [(step + 0.5) * unit for step in steps]
    name = f"trellis_code(bits={bits}, dim={dim}, states={states})"
    return Trellis((*(-level for level in reversed(levels)), *levels), name, unit, *_CODES[states])
