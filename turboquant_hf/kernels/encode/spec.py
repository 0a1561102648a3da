"""What Triton kernels are told about codes, and the unpacking that encode, dequantize and attention share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.codes import SCALE_FORMATS, CodeGroup, tile_bytes
from turboquant_hf.primitives import Codebook, packed_size, planes
from turboquant_hf.primitives.memo import once

MAX_CHUNK = 128
MAX_COEFFICIENTS = 6
FP16_TOLERANCE = 2.0**-13
MAX_ALIGNMENT = 16
"""Elements: what Triton would find out about an argument by itself, and what the widest loads need."""


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
        regular: whether a packed row holds a power of two of codes, 16 or more, so that packing is a reshape.
        edge, guess: the odd polynomial g0 p + g1 p^3 + ... of a coordinate p clamped to +-edge is within 0.4 of the
            number of thresholds below p, interpolated between them, less 2^(bits - 1); () for none.
        midpoints: (t0, t1, ...): the threshold that the centred number m stands for is t0 m + t1 m^3 + ...;
            () for a table look-up.
        levels: the same for levels, of 2 code + 1 - 2^bits.
        unit: what the levels are multiples of that a half holds exactly (`pair_table`), or 0.
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
    regular: bool
    edge: float
    guess: tuple[float, ...]
    midpoints: tuple[float, ...]
    levels: tuple[float, ...]
    unit: float
    coefficients: tuple[float, ...]
    lead: float
    table: int


@dataclass(frozen=True)
class TileSpec:
    """The groups of a tile, its bytes and those of one token's row (token-major only), and how scales are stored.

    A stored scale is shifted left by `shift` to be a half (0: it is one), and multiplied by `unit`.
    """

    groups: tuple[GroupSpec, ...]
    nbytes: int
    row_bytes: int
    shift: int
    unit: float


@lru_cache(maxsize=256)
def tile_spec(
    groups: tuple[CodeGroup, ...], tile: int, scale_format: str, *, channel_major: bool, exact: bool
) -> TileSpec:
    """What kernels are compiled for; `exact` reads levels from the table unless a polynomial hits them in float32."""
    specs, start, offset, table, first_chunk = [], 0, 0, 0, 0
    nbytes = tile_bytes(groups, tile, channel_major)
    token_bytes = nbytes // tile
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
        guess = code_guess(group.codebook)
        lead, coefficients = odd_polynomial(group.codebook, 1e-7 if exact else FP16_TOLERANCE)
        spec = GroupSpec(
            size=group.size, block=padded_size(group.size), bits=group.bits, start=start, offset=offset,
            length=length, row_bytes=row_bytes, row_stride=row_bytes if channel_major else token_bytes,
            root=group.size**0.5, planes=tuple(rows), chunk=chunk, chunks=chunks, first_chunk=first_chunk,
            aligned=aligned, regular=length >= 16 and length & (length - 1) == 0,
            edge=guess[0] if guess else 0.0, guess=guess[1:], midpoints=midpoints(group.codebook),
            levels=group.codebook.coefficients, unit=group.codebook.unit, coefficients=coefficients,
            lead=lead, table=table,
        )  # fmt: skip
        specs.append(spec)
        start += group.size
        offset += row_bytes * (group.size if channel_major else 1)
        table += 2**group.bits
        first_chunk += chunks
    return TileSpec(tuple(specs), nbytes, token_bytes, *SCALE_FORMATS[scale_format])


def padded_size(size: int) -> int:
    """The power of two >= 16 that holds `size`."""
    return max(16, triton.next_power_of_2(size))


def tiles_per_program(tiles: int, programs: int) -> int:
    """How many of `tiles` one program takes in turn: up to four, where that leaves `programs` of them."""
    return max(1, min(4, tiles // programs))


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, copied where its rows are not contiguous, or do not start where `row_offset` says."""
    unit = _alignment(x.shape[-1])
    starts = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    aligned = all(size == 1 or stride % unit == 0 for size, stride in starts)
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


@once(maxsize=256)
@torch.inference_mode(False)
def level_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The levels of all groups one after the other, float32."""
    return torch.cat([group.codebook.tensor() for group in groups]).to(device)


@once(maxsize=256)
@torch.inference_mode(False)
def threshold_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """The thresholds of all groups, each followed by one +inf, so that offsets are those of the levels."""
    rows = [torch.tensor((*group.codebook.thresholds, float("inf")), dtype=torch.float32) for group in groups]
    return torch.cat(rows).to(device)


@once(maxsize=256)
@torch.inference_mode(False)
def pair_table(groups: tuple[CodeGroup, ...], device: torch.device) -> torch.Tensor:
    """int32, offsets as in `level_table`: the levels of a code and the next as two halves, in the codebook's unit.

    Zeros where a codebook has no unit. With both levels at hand their threshold is known too: one load for a code.
    """
    rows = []
    for group in groups:
        steps = group.codebook.tensor() / (group.codebook.unit or torch.inf)
        rows.append(torch.stack([steps, steps.roll(-1)], dim=1).half().view(torch.int32)[:, 0])
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


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def code_guess(codebook: Codebook) -> tuple[float, ...]:
    """(edge, g0, g1, ...) as `GroupSpec` says, or () where four terms do not reach it.

    Rounding the guess gives one of the two thresholds around a coordinate, so that one comparison gives the code.
    """
    edges = torch.tensor(codebook.thresholds, dtype=torch.float64, device="cpu")
    if (edges + edges.flip(0)).abs().max() > 1e-6 * edges.abs().max():
        return ()
    if len(edges) == 1:
        return (1.0, 0.0)
    number = torch.arange(1, len(edges) + 1, dtype=torch.float64, device="cpu") - 2 ** (codebook.bits - 1)
    share = torch.arange(32, dtype=torch.float64, device="cpu") / 32
    point = torch.cat([(edges[:-1, None] + edges.diff()[:, None] * share).flatten(), edges[-1:]])
    wanted = torch.cat([(number[:-1, None] + share).flatten(), number[-1:]])
    for terms in range(1, 5):
        basis = torch.stack([point ** (2 * i + 1) for i in range(terms)], dim=1)
        weight = torch.ones_like(point)
        for _ in range(40):  # towards the smallest largest error
            fit = torch.linalg.lstsq(basis * weight[:, None], (wanted * weight)[:, None]).solution[:, 0]
            error = (basis @ fit - wanted).abs()
            if error.max() <= 0.4:
                return (float(edges[-1]), *fit.tolist())
            weight = weight * (error / error.max() + 1e-3).sqrt()
    return ()


def midpoints(codebook: Codebook) -> tuple[float, ...]:
    """`GroupSpec.midpoints`: the mean of the level polynomial at 2 m - 1 and 2 m + 1."""
    if not codebook.coefficients or len(codebook.coefficients) > 3:
        return ()
    a, b, c = (*codebook.coefficients, 0.0, 0.0)[:3]
    return (2 * a + 6 * b + 10 * c, 8 * b + 80 * c, 32 * c)[: len(codebook.coefficients)]


@triton.constexpr_function
def group_count(spec):
    return len(spec.groups)


@triton.constexpr_function
def group_of(spec, index):
    return spec.groups[index]


@triton.constexpr_function
def group_block(spec, index):
    return spec.groups[index].block


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


@triton.constexpr_function
def term_of(group, name, index):
    return getattr(group, name)[index]


@triton.constexpr_function
def terms_of(group, name):
    return len(getattr(group, name))


# ---------------------------------------------------------------- addresses


def _alignment(row: int) -> int:
    """The power of two that divides the starts of rows of `row` elements; `rows_contiguous` sees to it."""
    return min(row & -row, MAX_ALIGNMENT)


alignment = triton.constexpr_function(_alignment)


@triton.jit
def row_offset(index, stride, ROW: tl.constexpr):
    """Where rows of ROW elements start, relative to the first.

    Strides change with a cache's length and with who made a tensor. Triton must not build a kernel for each, so it is
    not shown their values (`do_not_specialize`); what wide loads need to know of them is said here.
    """
    return tl.multiple_of(index * stride, alignment(ROW))


@triton.jit
def head_offset(b, h, b_stride, h_stride, ROW: tl.constexpr):
    """Where the first row of head h of sequence b starts; `row_offset` says why."""
    return tl.multiple_of(b * b_stride + h * h_stride, alignment(ROW))


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
