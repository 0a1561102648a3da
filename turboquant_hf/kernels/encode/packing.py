"""Packing inside the encoder: a byte is the sum of its fields, each shifted to its place (`primitives.packing`).

byte[j] = sum over f of ((code[j + f * BYTES] >> SHIFT) & FIELD) << (f * WIDTH)        per plane of WIDTH bits
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_hf.kernels.common.spec import plane_of


@triton.jit
def pack_plane(
    codes, p_rows, GROUP: tl.constexpr, PLANE: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr
):  # fmt: skip
    """Store one plane of codes [tokens, channels] whose rows are of any length; p_rows points to row 0's first byte."""
    WIDTH: tl.constexpr = plane_of(GROUP, PLANE, 0)
    SHIFT: tl.constexpr = plane_of(GROUP, PLANE, 1)
    BYTES: tl.constexpr = plane_of(GROUP, PLANE, 2)
    BLOCK_P: tl.constexpr = plane_of(GROUP, PLANE, 4)
    AXIS: tl.constexpr = 0 if CHANNEL_MAJOR else 1
    R: tl.constexpr = GROUP.size if CHANNEL_MAJOR else T
    BLOCK_R: tl.constexpr = codes.shape[1 - AXIS]
    LAST: tl.constexpr = codes.shape[AXIS] - 1
    FIELD: tl.constexpr = (1 << WIDTH) - 1
    j = tl.arange(0, BLOCK_P)
    row = tl.arange(0, BLOCK_R)
    p_plane = p_rows + plane_of(GROUP, PLANE, 3)
    if AXIS == 1:
        index = j[None, :] + tl.zeros((BLOCK_R, 1), tl.int32)
        p_byte = p_plane + (row * GROUP.row_stride)[:, None] + j[None, :]
        m_byte = (row < R)[:, None] & (j < BYTES)[None, :]
    else:
        index = j[:, None] + tl.zeros((1, BLOCK_R), tl.int32)
        p_byte = p_plane + (row * GROUP.row_stride)[None, :] + j[:, None]
        m_byte = (row < R)[None, :] & (j < BYTES)[:, None]
    byte = tl.zeros_like(index)
    for f in tl.static_range(8 // WIDTH):
        code = tl.gather(codes, tl.minimum(index + f * BYTES, LAST), AXIS)
        # Codes between a row's length and the next multiple of 8 are zero in memory.
        code = tl.where(index + f * BYTES < GROUP.length, code, 0)
        byte |= ((code >> SHIFT) & FIELD) << (f * WIDTH)
    tl.store(p_byte, byte.to(tl.uint8), mask=m_byte)


@triton.jit
def pack_regular(
    codes, p_rows, GROUP: tl.constexpr, PLANE: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr
):  # fmt: skip
    """Equivalent to `pack_plane`, for rows of a power of two of codes: the fields have an axis of their own."""
    WIDTH: tl.constexpr = plane_of(GROUP, PLANE, 0)
    SHIFT: tl.constexpr = plane_of(GROUP, PLANE, 1)
    BYTES: tl.constexpr = plane_of(GROUP, PLANE, 2)
    FIELDS: tl.constexpr = 8 // WIDTH
    FIELD: tl.constexpr = (1 << WIDTH) - 1
    ROWS: tl.constexpr = codes.shape[0]
    COLUMNS: tl.constexpr = codes.shape[1]
    j = tl.arange(0, BYTES)
    p_plane = p_rows + plane_of(GROUP, PLANE, 3)
    f = tl.arange(0, FIELDS) * WIDTH
    field = (codes >> SHIFT) & FIELD
    if CHANNEL_MAJOR:
        byte = tl.sum(tl.reshape(field, (FIELDS, BYTES, COLUMNS)) << f[:, None, None], axis=0)
        c = tl.arange(0, COLUMNS)
        p_byte = p_plane + (c * GROUP.row_stride)[None, :] + j[:, None]
        mask = (c < GROUP.size)[None, :] & (j >= 0)[:, None]
    else:
        byte = tl.sum(tl.reshape(field, (ROWS, FIELDS, BYTES)) << f[None, :, None], axis=1)
        t = tl.arange(0, ROWS)
        p_byte = p_plane + (t * GROUP.row_stride)[:, None] + j[None, :]
        mask = (t < T)[:, None] & (j >= 0)[None, :]
    tl.store(p_byte, byte.to(tl.uint8), mask=mask)
