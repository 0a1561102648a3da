"""From packed rows to codes and levels, inside a kernel (`primitives.packing` describes a row)."""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.kernels.common.spec import coefficient, plane_count, plane_of, term_count


@triton.jit
def load_scales(p_scale, mask, SHIFT: tl.constexpr):
    """Stored scales as float32, without their unit (`codes.load_scale`)."""
    stored = tl.load(p_scale, mask=mask, other=0)
    if SHIFT:
        stored = (stored.to(tl.int16) << SHIFT).to(tl.float16, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def _unpack_field(p_rows, GROUP: tl.constexpr, PLANE: tl.constexpr, index: tl.constexpr):
    """The bits of chunk `index` that lie in one plane, moved to their place in the code: int32 [R, chunk]."""
    WIDTH: tl.constexpr = plane_of(GROUP, PLANE, 0)
    SHIFT: tl.constexpr = plane_of(GROUP, PLANE, 1)
    BYTES: tl.constexpr = plane_of(GROUP, PLANE, 2)
    MASK: tl.constexpr = (1 << WIDTH) - 1
    i = tl.arange(0, GROUP.chunk)
    p_plane = p_rows + plane_of(GROUP, PLANE, 3)
    if GROUP.aligned:
        RUNS: tl.constexpr = BYTES // GROUP.chunk
        byte = tl.load(p_plane + (index % RUNS * GROUP.chunk + i)[None, :]).to(tl.int32)
        field = (byte >> (index // RUNS * WIDTH)) & MASK
    else:
        code = index * GROUP.chunk + i
        byte = tl.load(p_plane + (code % BYTES)[None, :]).to(tl.int32)
        field = (byte >> tl.minimum(code // BYTES * WIDTH, 8)[None, :]) & MASK
    return field << SHIFT


@triton.jit
def unpack_chunk(p_rows, GROUP: tl.constexpr, index: tl.constexpr):
    """Codes [index * chunk, ...) of packed rows whose first bytes are p_rows [R, 1]: int32 [R, chunk].

    Codes past the end of a row are arbitrary, but read from inside the row.
    """
    codes = _unpack_field(p_rows, GROUP, 0, index)
    for plane in tl.static_range(1, plane_count(GROUP)):
        codes |= _unpack_field(p_rows, GROUP, plane, index)
    return codes


@triton.jit
def decode_levels(codes, p_levels, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """Codebook levels divided by GROUP.lead, of DTYPE (float16 or float32)."""
    TERMS: tl.constexpr = term_count(GROUP)
    if TERMS == 0:
        return tl.load(p_levels + GROUP.table + codes).to(DTYPE)
    else:
        # Integer to float by writing the code into a mantissa: exact, and at full rate where a conversion is not.
        if DTYPE == tl.float16:
            x = ((codes * 2) | ((25 - GROUP.bits) << 10)).to(tl.int16).to(tl.float16, bitcast=True)
            x -= 2.0 ** (10 - GROUP.bits) + 1.0 - 0.5**GROUP.bits
        else:
            x = ((codes * 2) | ((150 - GROUP.bits) << 23)).to(tl.float32, bitcast=True)
            x -= 2.0 ** (23 - GROUP.bits) + 1.0 - 0.5**GROUP.bits
        if TERMS == 1:
            return x
        else:
            square = x * x
            rest = square * coefficient(GROUP, TERMS - 1)
            for term in tl.static_range(TERMS - 2):
                rest = (rest + coefficient(GROUP, TERMS - 2 - term)) * square
            return x + x * rest
