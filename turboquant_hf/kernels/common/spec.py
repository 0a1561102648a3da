"""What Triton kernels are told about codes: a `TileSpec`, and how a kernel reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton

from turboquant_hf.kernels.codes import SCALE_FORMATS, CodeGroup, group_places, tile_bytes
from turboquant_hf.kernels.common.polynomials import code_guess, midpoints, odd_polynomial
from turboquant_hf.kernels.common.words import word_planes
from turboquant_hf.primitives import packed_size, planes
from turboquant_hf.primitives.trellis import CELLS

MAX_CHUNK = 128
FP16_TOLERANCE = 2.0**-13


@dataclass(frozen=True)
class GroupSpec:
    """One `CodeGroup` inside a tile. Everything that a kernel is compiled for is a field, so that compiled code never
    serves another layout.

    Attributes:
        size, bits: as in `CodeGroup`; block is the power of two >= 16 that holds `size`.
        start: the group's first channel.
        offset: its first byte, in a token's row (token-major) or in the tile (channel-major).
        length: codes of a packed row: one token's channels, or one channel's tokens when channel-major.
        row_bytes: bytes of one packed row of this group.
        row_stride: bytes from one row to the next: a whole token when token-major.
        root: square root of `size`.
        planes: of every plane its width, shift of the field in the code, bytes, first byte in the row, and the power
            of two that holds the bytes.
        chunk, chunks: codes of a row that are unpacked together (a power of two from 16), and their number.
        first_chunk: chunks of all groups before this one.
        aligned: whether fields are runs of whole chunks: a chunk then has one shift and neighbouring bytes.
        regular: whether a packed row holds a power of two of codes, 16 or more, so that packing is a reshape.
        edge, guess: the odd polynomial g0 p + g1 p^3 + ... of a coordinate p clamped to +-edge is within 0.4 of the
            number of thresholds below p, interpolated between them, less 2^(bits - 1); () for none.
        midpoints: (t0, t1, ...): the threshold that the centred number m stands for is t0 m + t1 m^3 + ...;
            () for a table look-up.
        levels: the same for levels, a polynomial in 2 code + 1 - 2^bits.
        unit: the levels are multiples of it that a half holds exactly (`pair_table`); 0 where there is no such unit.
        coefficients: () for a table look-up, else (1, c1, ...): level = lead * x * (1 + c1 x^2 + ...) with
            x = (2 code + 1) / 2^bits - 1.
        lead: factor of the levels.
        table: where the group's levels start in the levels tensor.
        in_words: whether codes are packed in words (`CodeGroup.in_words`); rows and planes then mean nothing.
        words: `words.word_planes` of such a group.
        cells: where its cells start in the table of them (`tables.cell_table`).
        per_grid, price: its grid units per unit, and what the square of one costs in the search (`Trellis.price`).
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
    in_words: bool = False
    words: tuple[tuple[int, int, int], ...] = ()
    cells: int = 0
    per_grid: float = 0.0
    price: float = 0.0


@dataclass(frozen=True)
class TileSpec:
    """The groups of a tile, its bytes and those of one token's row (token-major only), and how scales are stored.

    A stored scale is shifted left by `shift` to become a half (0: it is a half already), and multiplied by `unit`.
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
    """What kernels are compiled for. With `exact`, levels come from a table unless a polynomial is exact in float32."""
    specs, start, table, first_chunk = [], 0, 0, 0
    nbytes = tile_bytes(groups, tile, channel_major)
    in_rows = tuple(group for group in groups if channel_major or not group.in_words)
    token_bytes = tile_bytes(in_rows, tile, channel_major) // tile
    for group, (offset, _) in zip(groups, group_places(groups, tile, channel_major), strict=True):
        length = tile if channel_major else group.size
        if group.in_words:
            cells = CELLS * sum(other.in_words for other in specs)
            spec = _word_spec(group, length, start, offset, table, first_chunk, channel_major, cells)
            specs.append(spec)
            start, table, first_chunk = (
                start + group.size,
                table + len(group.codebook.levels),
                first_chunk + spec.chunks,
            )
            continue
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
        table += 2**group.bits
        first_chunk += chunks
    return TileSpec(tuple(specs), nbytes, token_bytes, *SCALE_FORMATS[scale_format])


def _word_spec(
    group: CodeGroup,
    length: int,
    start: int,
    offset: int,
    table: int,
    first_chunk: int,
    channel_major: bool,
    cells: int,
) -> GroupSpec:
    """`GroupSpec` of a group in words: 32 codes of a row of `length` are unpacked together, or 16."""
    chunk = 16 if length % 32 else 32
    return GroupSpec(
        size=group.size, block=padded_size(group.size), bits=group.bits, start=start, offset=offset, length=length,
        row_bytes=0, row_stride=0, root=group.size**0.5, planes=(), chunk=chunk,
        chunks=(padded_size(length) if channel_major else length) // chunk,
        first_chunk=first_chunk, aligned=False, regular=False, edge=0.0, guess=(), midpoints=(), levels=(),
        unit=group.codebook.unit, coefficients=(), lead=1.0, table=table,
        in_words=True, words=word_planes(group.codebook), cells=cells,
        per_grid=1 / group.codebook.grid, price=group.codebook.price,
    )  # fmt: skip


def padded_size(size: int) -> int:
    """The power of two >= 16 that holds `size`."""
    return max(16, triton.next_power_of_2(size))


@triton.constexpr_function
def group_count(spec):
    return len(spec.groups)


@triton.constexpr_function
def any_rows(spec):
    return not all(group.in_words for group in spec.groups)


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
