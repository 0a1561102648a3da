"""Triton kernels that encode and decode whole tiles, and the unpacking that the attention kernel shares.

One program takes one tile of one KV head: the transform is a matrix product, codes are counts of thresholds below a
coordinate, and bytes are gathered plane by plane (`primitives.packing` describes them).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import SCALE_FORMATS, CodeGroup, tile_bytes
from turboquant_hf.primitives import Codebook, packed_size, planes

MAX_CHUNK = 128
MAX_COEFFICIENTS = 6
FP16_TOLERANCE = 2.0**-13


# ---------------------------------------------------------------- what a kernel is told about the codes


@dataclass(frozen=True)
class GroupSpec:
    """One `CodeGroup` inside a tile. Everything a kernel is compiled for is a field, so that compiled code is never
    taken for another layout's.

    Attributes:
        size, bits: as in `CodeGroup`; block is the power of two >= 16 that holds `size`.
        start: the group's first channel.
        offset: its first byte, in a token's row (token-major) or in the tile (channel-major).
        length: codes of a packed row: one token's channels, or one channel's tokens when channel-major.
        row_bytes: bytes of one packed row of this group.
        row_stride: from one row to the next: a whole token when token-major.
        root: square root of `size`.
        planes: of every plane its width, shift of the field in the code, bytes, first byte in the row, and the power
            of two that holds the bytes.
        chunk, chunks: codes of a row that are unpacked together (a power of two from 16), and how often.
        first_chunk: chunks of the groups before.
        aligned: whether fields are runs of whole chunks: a chunk then has one shift and neighbouring bytes.
        coefficients: () for a table look-up, else (1, c1, ...): level = lead * x * (1 + c1 x^2 + ...) with
            x = (2 code + 1) / 2^bits - 1.
        lead: factor of the levels.
        table: where the group's levels start in the levels tensor.
    """

    size: int
    block: int
    bits: int
    start: int
    offset: int
    length: int
    row_bytes: int
    row_stride: int
    root: float
    planes: tuple[tuple[int, int, int, int, int], ...]
    chunk: int
    chunks: int
    first_chunk: int
    aligned: bool
    coefficients: tuple[float, ...]
    lead: float
    table: int


@dataclass(frozen=True)
class TileSpec:
    """The groups of a tile, the bytes of one token's row (token-major only), and how scales are stored.

    A stored scale is shifted left by `shift` to be a half (0: it is one), and multiplied by `unit`.
    """

    groups: tuple[GroupSpec, ...]
    row_bytes: int
    shift: int
    unit: float


@lru_cache(maxsize=256)
def tile_spec(
    groups: tuple[CodeGroup, ...], tile: int, scale_format: str, *, channel_major: bool, exact: bool
) -> TileSpec:
    """What kernels are compiled for; `exact` reads levels from the table unless a polynomial hits them in float32."""
    specs, start, offset, table, first_chunk = [], 0, 0, 0, 0
    token_bytes = tile_bytes(groups, tile, channel_major) // tile
    for group in groups:
        length = tile if channel_major else group.size
        octets = packed_size(length, 1)
        rows, row_bytes = [], 0
        for width, shift in planes(group.bits):
            rows.append((width, shift, octets * width, row_bytes, triton.next_power_of_2(octets * width)))
            row_bytes += octets * width
        run = rows[-1][2]
        aligned = length % 8 == 0 and run >= 16 and run & (run - 1) == 0
        whole = run if octets & (octets - 1) == 0 else octets * 8 & -(octets * 8)
        chunk = max(16, min(whole, MAX_CHUNK, padded_size(length)))
        # The other operand of a channel-major tile, padded to a power of two, is cut in chunks too.
        chunks = (padded_size(length) if channel_major else length + chunk - 1) // chunk
        lead, coefficients = odd_polynomial(group.codebook, 1e-7 if exact else FP16_TOLERANCE)
        specs.append(
            GroupSpec(
                size=group.size, block=padded_size(group.size), bits=group.bits, start=start, offset=offset,
                length=length, row_bytes=row_bytes, row_stride=row_bytes if channel_major else token_bytes,
                root=group.size**0.5, planes=tuple(rows), chunk=chunk, chunks=chunks, first_chunk=first_chunk,
                aligned=aligned, coefficients=coefficients, lead=lead, table=table,
            )  # fmt: skip
        )
        start += group.size
        offset += row_bytes * (group.size if channel_major else 1)
        table += 2**group.bits
        first_chunk += chunks
    return TileSpec(tuple(specs), token_bytes, *SCALE_FORMATS[scale_format])


def padded_size(size: int) -> int:
    """The power of two >= 16 that holds `size`."""
    return max(16, triton.next_power_of_2(size))


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def level_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The levels of all groups one after the other, float32."""
    return torch.cat([group.codebook.tensor(device) for group in groups])


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def threshold_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The thresholds of all groups, each followed by one +inf, so that offsets are those of the levels."""
    rows = [torch.tensor((*group.codebook.thresholds, float("inf")), dtype=torch.float32) for group in groups]
    return torch.cat(rows).to(device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def odd_polynomial(codebook: Codebook, tolerance: float) -> tuple[float, tuple[float, ...]]:
    """(lead, (1, c1, c2, ...)) with level = lead * x * (1 + c1 x^2 + ...), or (1, ()) where none fits.

    x = (2 code + 1) / 2^bits - 1. `Codebook.coefficients`, where a codebook has them, are taken as they are; else the
    fit's largest error relative to a level is at most `tolerance`, with at most MAX_COEFFICIENTS terms, beyond which
    a table is as fast.
    """
    if codebook.coefficients:
        # Theirs is the polynomial in 2 code + 1 - 2^bits.
        scaled = [c * 2.0 ** (codebook.bits * (2 * i + 1)) for i, c in enumerate(codebook.coefficients)]
        return scaled[0], tuple(c / scaled[0] for c in scaled)
    levels = torch.tensor(codebook.levels, dtype=torch.float64, device="cpu")
    if (levels + levels.flip(0)).abs().max() > 1e-6 * levels.abs().max():
        return 1.0, ()
    count = len(levels)
    x = (2 * torch.arange(count, dtype=torch.float64, device="cpu") + 1) / count - 1
    for terms in range(1, min(MAX_COEFFICIENTS, count // 2) + 1):
        basis = torch.stack([x ** (2 * i + 1) for i in range(terms)], dim=1) / levels.abs()[:, None]
        fit = torch.linalg.lstsq(basis, levels.sign()[:, None]).solution
        if (basis @ fit - levels.sign()[:, None]).abs().max() <= tolerance:
            fit = fit.flatten().tolist()
            return fit[0], tuple(c / fit[0] for c in fit)
    return 1.0, ()


@triton.constexpr_function
def group_count(spec):
    return len(spec.groups)


@triton.constexpr_function
def group_of(spec, index):
    return spec.groups[index]


@triton.constexpr_function
def plane_count(group):
    return len(group.planes)


@triton.constexpr_function
def plane_of(group, index, entry):
    return group.planes[index][entry]


@triton.constexpr_function
def coefficient(group, index):
    return group.coefficients[index]


@triton.constexpr_function
def term_count(group):
    return len(group.coefficients)


# ---------------------------------------------------------------- unpacking


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


# ---------------------------------------------------------------- means


@triton.jit
def _mean_kernel(
    p_x, p_weight, p_out, x_b, x_h, x_n, x_t, w_b, w_n, w_t, H, N,
    T: tl.constexpr, D: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    b = head // H
    h = head % H
    d = tl.arange(0, BLOCK_D)
    m_d = d < D
    sum = tl.zeros((BLOCK_D,), tl.float32)
    total = tl.zeros((), tl.float32)
    for low in tl.static_range(0, T, BLOCK_T):
        t = low + tl.arange(0, BLOCK_T)
        o_x = b * x_b + h * x_h + n * x_n + (t * x_t)[:, None] + d[None, :]
        x = tl.load(p_x + o_x, mask=(t < T)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        if WEIGHT:
            w = tl.load(p_weight + b * w_b + n * w_n + t * w_t, mask=t < T, other=0.0).to(tl.float32)
            x *= w[:, None]
            total += tl.sum(w, axis=0)
        sum += tl.sum(x, axis=0)
    if WEIGHT:
        mean = sum / tl.maximum(total, 1.0)
    else:
        mean = sum / T
    mean = tl.clamp(mean, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_out + (head * N + n) * D + d, mean.to(tl.float16), mask=m_d)


def tile_mean(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Equivalent to `reference.tile_mean`."""
    batch, heads, tiles, tile, dim = x.shape
    x = _rows_contiguous(x)
    out = torch.empty((batch, heads, tiles, dim), dtype=torch.float16, device=x.device)
    strides = (0, 0, 0) if weight is None else weight.stride()
    if out.numel():
        _mean_kernel[(batch * heads, tiles)](
            x, x if weight is None else weight, out, *x.stride()[:4], *strides, heads, tiles,
            T=tile, D=dim, WEIGHT=weight is not None, BLOCK_T=min(32, padded_size(tile)), BLOCK_D=padded_size(dim),
        )  # fmt: skip
    return out


# ---------------------------------------------------------------- encode


@triton.jit
def _pack_plane(
    codes, p_rows, GROUP: tl.constexpr, PLANE: tl.constexpr, T: tl.constexpr, CHANNEL_MAJOR: tl.constexpr
):  # fmt: skip
    """Store one plane of codes [tokens, channels]; p_rows points to row 0's first byte."""
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
def _encode_group(
    p_x, p_mean, p_transform, p_thresholds, p_levels, p_codes, p_scale, gain,
    x_t, GROUP: tl.constexpr, SPEC: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, MEAN: tl.constexpr, RULE: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    BLOCK_C: tl.constexpr = GROUP.block
    BITS: tl.constexpr = GROUP.bits
    t = tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    m_c = c < GROUP.size
    y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for low in range(0, D, BLOCK_K):
        k = low + tl.arange(0, BLOCK_K)
        m_x = (t < T)[:, None] & (k < D)[None, :]
        x = tl.load(p_x + (t * x_t)[:, None] + k[None, :], mask=m_x, other=0.0).to(tl.float32)
        if MEAN:
            x -= tl.load(p_mean + k, mask=k < D, other=0.0).to(tl.float32)[None, :]
        o_matrix = (GROUP.start + c)[None, :] * D + k[:, None]
        matrix = tl.load(p_transform + o_matrix, mask=m_c[None, :] & (k < D)[:, None], other=0.0).to(tl.float32)
        y = tl.dot(x, matrix, y, input_precision="tf32x3")

    square = tl.sum(y * y, axis=1)
    norm = tl.sqrt_rn(square)
    unit = tl.maximum(norm / GROUP.root, 1e-30)
    point = tl.div_rn(y, unit[:, None] + tl.zeros_like(y))
    codes = tl.zeros((BLOCK_T, BLOCK_C), tl.int32)
    for step in tl.static_range(BITS):
        higher = codes + (1 << (BITS - 1 - step))
        codes = tl.where(point > tl.load(p_thresholds + GROUP.table + higher - 1), higher, codes)

    level = tl.where(m_c[None, :], tl.load(p_levels + GROUP.table + codes), 0.0)
    if RULE == "norm":
        scale = norm / GROUP.root
    elif RULE == "norm-corrected":
        scale = norm / tl.sqrt(tl.sum(level * level, axis=1))
    elif RULE == "mse":
        scale = tl.sum(y * level, axis=1) / tl.sum(level * level, axis=1)
    else:
        scale = square / tl.maximum(tl.sum(y * level, axis=1), 1e-30)
    scale = scale / gain
    if SPEC.shift:
        half = tl.where(scale == scale, tl.clamp(scale / SPEC.unit, 0.0, 65504.0), 65504.0).to(tl.float16)
        bits = half.to(tl.int16, bitcast=True).to(tl.int32)
        stored = tl.minimum((bits + (1 << (SPEC.shift - 1))) >> SPEC.shift, 255).to(tl.uint8)
    else:
        stored = tl.minimum(scale, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    tl.store(p_scale + t, stored, mask=t < T)

    for plane in tl.static_range(plane_count(GROUP)):
        _pack_plane(codes, p_codes + GROUP.offset, GROUP, plane, T, CHANNEL_MAJOR)


@triton.jit
def _encode_kernel(
    p_x, p_mean, p_transform, p_thresholds, p_levels, p_gain, p_codes, p_scale,
    x_b, x_h, x_n, x_t, a_b, a_h, H, N, BYTES,
    SPEC: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    MEAN: tl.constexpr, GAIN: tl.constexpr, RULE: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    b = head // H
    h = head % H
    tile = head * N + n
    gain = 1.0
    if GAIN:
        gain = tl.load(p_gain + head)
    for g in tl.static_range(group_count(SPEC)):
        _encode_group(
            p_x + b * x_b + h * x_h + n * x_n, p_mean + tile * D, p_transform + b * a_b + h * a_h,
            p_thresholds, p_levels, p_codes + tile * BYTES, p_scale + (tile * group_count(SPEC) + g) * T, gain,
            x_t, group_of(SPEC, g), SPEC, T, D, BLOCK_T, BLOCK_K, MEAN, RULE, CHANNEL_MAJOR,
        )  # fmt: skip


def encode_tiles(
    x: torch.Tensor,
    transform: torch.Tensor,
    groups: tuple[CodeGroup, ...],
    *,
    scale_rule: str,
    scale_format: str = "fp16",
    gain: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    channel_major: bool = False,
) -> dict[str, torch.Tensor]:
    """Equivalent to `reference.encode_tiles`; products are float32 to within a few units in the last place."""
    batch, heads, tiles, tile, dim = x.shape
    x, device = _rows_contiguous(x), x.device
    spec = tile_spec(groups, tile, scale_format, channel_major=channel_major, exact=True)
    size = tile_bytes(groups, tile, channel_major)
    codes = torch.empty((batch, heads, tiles, size), dtype=torch.uint8, device=device)
    scale_dtype = torch.float16 if scale_format == "fp16" else torch.uint8
    scale = torch.empty((batch, heads, tiles, len(groups), tile), dtype=scale_dtype, device=device)
    matrix = transform.float().contiguous()
    if codes.numel():
        _encode_kernel[(batch * heads, tiles)](
            x, x if mean is None else mean.contiguous(), matrix, threshold_table(groups, device),
            level_table(groups, device), x if gain is None else gain.contiguous(), codes, scale,
            *x.stride()[:4], *_head_strides(matrix), heads, tiles, size,
            SPEC=spec, T=tile, D=dim, BLOCK_T=padded_size(tile), BLOCK_K=32, MEAN=mean is not None,
            GAIN=gain is not None, RULE=scale_rule, CHANNEL_MAJOR=channel_major,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    return {"codes": codes, "scale": scale}


# ---------------------------------------------------------------- decode


@triton.jit
def _unpack_elements(p_rows, row, code, GROUP: tl.constexpr):
    """Codes `code` of packed rows `row` (index tensors that broadcast): int32."""
    codes = tl.zeros_like(row + code)
    for plane in tl.static_range(plane_count(GROUP)):
        o_byte = code % plane_of(GROUP, plane, 2) + plane_of(GROUP, plane, 3)
        byte = tl.load(p_rows + row * GROUP.row_stride + o_byte).to(tl.int32)
        field = (byte >> (code // plane_of(GROUP, plane, 2) * plane_of(GROUP, plane, 0))) & (
            (1 << plane_of(GROUP, plane, 0)) - 1
        )
        codes |= field << plane_of(GROUP, plane, 1)
    return codes


@triton.jit
def _decode_group(
    acc, p_codes, p_scale, p_levels, p_inverse, d, GROUP: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    t = tl.arange(0, BLOCK_T)
    token = tl.minimum(t, T - 1)[:, None]
    scale = load_scales(p_scale + t, t < T, SHIFT)
    for low in range(0, GROUP.size, BLOCK_C):
        c = low + tl.arange(0, BLOCK_C)
        channel = tl.minimum(c, GROUP.size - 1)[None, :]
        if CHANNEL_MAJOR:
            codes = _unpack_elements(p_codes + GROUP.offset, channel, token, GROUP)
        else:
            codes = _unpack_elements(p_codes + GROUP.offset, token, channel, GROUP)
        y = tl.load(p_levels + GROUP.table + codes) * scale[:, None]
        m_matrix = (c < GROUP.size)[:, None] & (d < D)[None, :]
        matrix = tl.load(p_inverse + d[None, :] * D + (GROUP.start + c)[:, None], mask=m_matrix, other=0.0)
        acc = tl.dot(y, matrix, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _decode_kernel(
    p_codes, p_scale, p_levels, p_inverse, p_gain, p_mean, p_out,
    c_b, c_h, c_n, s_b, s_h, s_n, m_b, m_h, m_n, a_b, a_h, H, N,
    SPEC: tl.constexpr, T: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, MEAN: tl.constexpr, GAIN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64)
    b = head // H
    h = head % H
    t = tl.arange(0, BLOCK_T)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for g in tl.static_range(group_count(SPEC)):
        acc = _decode_group(
            acc, p_codes + b * c_b + h * c_h + n * c_n, p_scale + b * s_b + h * s_h + n * s_n + g * T, p_levels,
            p_inverse + b * a_b + h * a_h, d, group_of(SPEC, g), SPEC.shift, T, D, BLOCK_T, BLOCK_C, CHANNEL_MAJOR,
        )  # fmt: skip
    acc *= SPEC.unit
    if GAIN:
        acc *= tl.load(p_gain + head)
    if MEAN:
        mean = tl.load(p_mean + b * m_b + h * m_h + n * m_n + d, mask=d < D, other=0.0)
        acc += mean.to(tl.float32)[None, :]
    o_out = (head * N + n) * T * D + t[:, None] * D + d[None, :]
    tl.store(p_out + o_out, acc, mask=(t < T)[:, None] & (d < D)[None, :])


def decode_tiles(
    packed: dict[str, torch.Tensor],
    inverse: torch.Tensor,
    groups: tuple[CodeGroup, ...],
    *,
    scale_format: str = "fp16",
    gain: torch.Tensor | None = None,
    channel_major: bool = False,
) -> torch.Tensor:
    """Equivalent to `reference.decode_tiles`; products are float32 to within a few units in the last place."""
    codes, scale, mean = _rows_contiguous(packed["codes"]), packed["scale"], packed.get("mean")
    batch, heads, tiles = codes.shape[:3]
    tile, dim, device = scale.shape[-1], inverse.shape[-1], codes.device
    scale = scale if scale.stride()[3:] == (tile, 1) else scale.contiguous()
    mean = mean if mean is None else _rows_contiguous(mean)
    spec = tile_spec(groups, tile, scale_format, channel_major=channel_major, exact=True)
    matrix = inverse.float().contiguous()
    out = torch.empty((batch, heads, tiles, tile, dim), dtype=torch.float32, device=device)
    if out.numel():
        block = min(MAX_CHUNK, padded_size(dim))
        _decode_kernel[(batch * heads, tiles, triton.cdiv(dim, block))](
            codes, scale, level_table(groups, device), matrix, out if gain is None else gain.contiguous(),
            out if mean is None else mean, out, *codes.stride()[:3], *scale.stride()[:3],
            *((0, 0, 0) if mean is None else mean.stride()[:3]), *_head_strides(matrix), heads, tiles,
            SPEC=spec, T=tile, D=dim, BLOCK_T=padded_size(tile), BLOCK_D=block, BLOCK_C=32,
            MEAN=mean is not None, GAIN=gain is not None, CHANNEL_MAJOR=channel_major, num_warps=8,
        )  # fmt: skip
    return out


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _head_strides(matrix: torch.Tensor) -> tuple[int, int]:
    """Steps from one sequence's and one head's matrix to the next, of [D, D] or [B or 1, H, D, D]."""
    if matrix.dim() == 2:
        return 0, 0
    return (0 if matrix.shape[0] == 1 else matrix.stride(0)), matrix.stride(1)
