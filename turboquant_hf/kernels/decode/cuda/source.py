"""The source text that is compiled for one layer shape: constants, then the files. And the shared memory it needs."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from turboquant_hf.kernels.codes import SCALE_FORMATS
from turboquant_hf.kernels.decode.cuda.arguments import declaration
from turboquant_hf.primitives import packed_size
from turboquant_hf.primitives.addends import SUM_BITS, addends

FILES = (
    "instructions.cuh",
    "levels.cuh",
    "words.cuh",
    "layout.cuh",
    "warp.cuh",
    "rows.cuh",
    "copies.cuh",
    "query.cuh",
    "raw.cuh",
    "products.cuh",
    "tiles.cuh",
    "merge.cuh",
    "decode.cu",
)
"""The files of the text, in this order: a file uses what is defined above it."""
TILE = 128
LARGE_ROOM = 13 * 1024
"""Bytes of a tile above which two warps share it."""
ROW_CENTRE = {1: 63.5, 2: 63.5, 3: 63.5, 4: 63.5, 5: 191.5, 8: 127.5}
"""Width of a code in rows -> bias of its level's byte: byte = step + 1/2 + bias."""
WORD_CENTRE = 63.5
"""The same for codes in words of up to 4 bits; words of 5 bits have that of rows. From 4 bits on, the byte is a sum."""
ARRIVALS = 1 << 16
"""Counters at the start of a workspace, one per query row: how many of the blocks that share the row's tiles are done.
Blocks share tiles only where there are few heads (`geometry.splits`). The last counter is for `unread_tiles`."""


def row_layout(groups: Iterable[tuple[int, int]]) -> tuple[list[int], int]:
    """(first byte of every group, bytes of the row) of a token's row of keys, for groups (channels, bits) in rows."""
    ends = list(itertools.accumulate((packed_size(size, bits) for size, bits in groups), initial=0))
    return ends[:-1], ends[-1]


def main_width(bits: int) -> int:
    return max(width for width in (1, 2, 4, 8) if width <= bits)


def piece_size(size: int, bits: int) -> int:
    """Bytes that `Row` of levels.cuh loads at a time: a lane's part of a row if it is whole words, else less."""
    width = main_width(bits)
    part = size * width // 32
    whole = width > 1 and (part % 4 == 0 or (width, part) == (2, 2))
    return part if whole else 2 if width == 4 else 1


def block_rows(wide: bool) -> int:
    """Query rows per block. More rows are dealt to several blocks, and each of these reads all tiles."""
    return 8 if wide else 4


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for. Groups are (channels, bits, levels' unit, levels' steps).

    A group with 2**(bits + 1) levels follows a trellis, and is in words (`primitives.trellis`).
    """

    dim: int
    keys: tuple[tuple[int, int, float, tuple[int, ...]], ...]
    values: tuple[int, int, float, tuple[int, ...]]
    key_format: str = "fp16"
    value_format: str = "fp16"
    bf16: bool = False
    mean: bool = True
    masked: bool = False
    softcap: bool = False
    sparse: bool = False  # values are not read where no probability of a tile reaches a threshold
    wide: bool = False  # 8 query rows per block instead of 4
    hadamard: bool = True  # rotations are given by their signs

    @property
    def key_rows(self) -> tuple[list[int], int]:
        """`row_layout` of the keys in rows."""
        return row_layout((size, bits) for size, bits, _, steps in self.keys if level_bits(steps) == bits)

    @property
    def key_words(self) -> tuple[list[int], int]:
        """(first byte of every group in words, bytes of all) of the keys in words, behind all rows of a tile."""
        words = (TILE * packed_size(size, bits) for size, bits, _, steps in self.keys if level_bits(steps) > bits)
        ends = list(itertools.accumulate(words, initial=0))
        return ends[:-1], ends[-1]

    @property
    def own_tokens(self) -> int:
        """Neighbouring tokens of a tile that belong to one lane part: layout.cuh's `OWN_TOKENS`."""
        _, bits, _, steps = self.values
        return 32 if level_bits(steps) > bits else TILE * main_width(bits) // 32

    @property
    def rows(self) -> int:
        return block_rows(self.wide)

    @property
    def room(self) -> int:
        """Bytes of shared memory for one tile: layout.cuh's `ROOM`."""
        _, row = self.key_rows
        key_scale, value_scale = (1 if SCALE_FORMATS[x][0] else 2 for x in (self.key_format, self.value_format))
        pads = TILE // self.own_tokens * key_pad(self)
        codes, mean = TILE * row + pads + self.key_words[1], 2 * self.dim if self.mean else 0
        keys = codes + TILE * len(self.keys) * key_scale + mean
        values = self.dim * packed_size(TILE, self.values[1]) + TILE * value_scale
        return -(-keys // 128) * 128 + -(-values // 128) * 128

    @property
    def team(self) -> int:
        """Warps that share a tile. Two finish it sooner with fewer bytes in flight, but do some work twice."""
        large = self.room > LARGE_ROOM or self.dim == 64
        return 2 if large and not self.wide else 1


def max_warps(dim: int, team: int = 2) -> int:
    """The most warps per block that are of use: 12 where two share a tile of 64 channels, else 8. 16 would work."""
    return 12 if dim == 64 and team > 1 else 8


def most_warps(shape: Shape, limit: int) -> int:
    """How many warps `limit` bytes of shared memory serve; 0 where two do not fit."""
    team = shape.team
    counts = (n for n in range(max_warps(shape.dim, team), 1, -1) if n % team == 0)
    return next((n for n in counts if shared_bytes(shape, n) <= limit), 0)


def level_bits(steps: tuple[int, ...]) -> int:
    """Bits of a level's number: those of its code, and one more for a trellis."""
    return len(steps).bit_length() - 1


def level_bytes(bits: int, steps: tuple[int, ...]) -> list[int]:
    """The table of 24 bytes in which levels.cuh looks up the levels of codes of `bits` bits.

    Up to 16 levels, the table has all of them, below 128: byte = step + 1/2 + ROW_CENTRE (or WORD_CENTRE). With 5
    bits it has the positive half, top bit set. With 4 and 5 bits in words it has both addends, in the order of
    selectors; the first ones of 5 bits have their top bit set.
    """
    if bits == 8:
        table = []
    elif level_bits(steps) == bits:
        table = [int(step + 0.5 + ROW_CENTRE[bits]) for step in (steps[16:] if bits == 5 else steps)]
    elif bits in SUM_BITS:
        table = _addend_bytes(bits, steps)
    else:
        table = [int(step + 0.5 + WORD_CENTRE) for step in steps]
    return table + [0] * (24 - len(table))


def _addend_bytes(bits: int, steps: tuple[int, ...]) -> list[int]:
    sums = addends(steps)
    if sums is None:
        raise ValueError(f"steps={steps}: must be sums (primitives.addends)")
    first, second = sums
    if bits == 5:
        return [int(start + 0.5 + ROW_CENTRE[5]) for start in first] + list(second)
    # Selector (p2 = p1, p1, p0) of segment (p2, p1, p0), then (p2 = p1 = p0, z1, z0).
    segments = [4 * (p1 if agree else 1 - p1) + 2 * p1 + p0 for agree in (0, 1) for p1 in (0, 1) for p0 in (0, 1)]
    return [int(first[segment] + 0.5 + WORD_CENTRE) for segment in segments] + list(second)


def source_text(shape: Shape, warps: int) -> str:
    """Constants of one layer shape, then `FILES`. The first file names the types of the arguments, which follow it."""
    (in_rows, row), (in_words, words) = shape.key_rows, shape.key_words
    starts = iter(in_rows), iter(in_words)
    offsets = [next(starts[level_bits(steps) > bits]) for _, bits, _, steps in shape.keys]
    key_shift, key_unit = SCALE_FORMATS[shape.key_format]
    value_shift, value_unit = SCALE_FORMATS[shape.value_format]

    def array(kind: str, name: str, items) -> str:
        return f"__device__ constexpr {kind} {name}[] = {{{', '.join(map(str, items))}}};"

    def table(bits: int, steps: tuple[int, ...]) -> str:
        words = struct.unpack("<6I", bytes(level_bytes(bits, steps)))
        return "{" + ", ".join(f"0x{word:08X}u" for word in words) + "}"

    lines = [
        f"#define RAW_BF16 {int(shape.bf16)}",
        f"#define HAS_MEAN {int(shape.mean)}",
        f"#define MASKED {int(shape.masked)}",
        f"#define SOFTCAP {int(shape.softcap)}",
        f"#define SPARSE {int(shape.sparse)}",
        f"#define HADAMARD {int(shape.hadamard)}",
        f"#define WAIT_IN_SHARED {int(wait_in_shared(shape))}",
        f"constexpr int D = {shape.dim}, WARPS = {warps}, TEAM = {shape.team}, NT = {shape.rows // 4};",
        f"constexpr int KEY_GROUPS = {len(shape.keys)}, KEY_ROW_BYTES = {row}, KEY_WORD_BYTES = {words};",
        f"constexpr int KEY_FORMAT = {key_shift}, VALUE_FORMAT = {value_shift};",
        f"constexpr int KEY_PAD = {key_pad(shape)}, ARRIVALS = {ARRIVALS};",
        array("int", "KEY_SIZE", [group[0] for group in shape.keys]),
        array("int", "KEY_BITS", [group[1] for group in shape.keys]),
        array("int", "KEY_LEVEL_BITS", [level_bits(group[3]) for group in shape.keys]),
        array("int", "KEY_OFFSET", offsets),
        array("float", "KEY_UNIT", [f"{group[2] * key_unit!r}f" for group in shape.keys]),
        f"constexpr int VALUE_BITS = {shape.values[1]}, VALUE_LEVEL_BITS = {level_bits(shape.values[3])};",
        "__device__ constexpr unsigned int LEVELS[][6] = {"
        + ", ".join(table(group[1], group[3]) for group in (*shape.keys, shape.values))
        + "};",
        f"constexpr float VALUE_UNIT = {shape.values[2] * value_unit!r}f;",
        f"constexpr int SHARED_BYTES = {shared_bytes(shape, warps)};",
    ]
    types, *files = (Path(__file__).with_name(name).read_text() for name in FILES)
    return "\n".join([*lines, types, declaration(), *files])


def shared_bytes(shape: Shape, warps: int) -> int:
    """Size of layout.cuh's `Shared`."""
    dim, rows = shape.dim, shape.rows
    total = warps // shape.team * shape.room + (2 + 4) * rows * dim
    total += 4 * warps * rows * dim if wait_in_shared(shape) else 0
    total += 32 * (len(shape.keys) + 1) + 2 * rows * dim + 8 + 4 * 2 * rows + 4 * 2 * 2 * warps * rows
    return -(-total // 128) * 128


def wait_in_shared(shape: Shape) -> bool:
    """Whether shared memory has room for the sums over raw tokens. If not, they go to the workspace."""
    return shape.dim <= 128 and max(bits for _, bits, _, _ in (*shape.keys, shape.values)) < 8


@lru_cache(maxsize=64)
def key_pad(shape: Shape) -> int:
    """Bytes of padding behind the rows of keys of one lane part: those with the fewest bank conflicts, counted here."""
    offsets, row = shape.key_rows
    own = shape.own_tokens
    step = 2 if own == 32 else 1  # tokens from one lane to the next
    groups = [(size, bits) for size, bits, _, steps in shape.keys if level_bits(steps) == bits]

    def passes(pad: int) -> int:
        rows = [((g >> 1) * own + (g & 1) * step) * row + (g >> 1) * pad for g in range(8)]
        total = 0
        for offset, (size, bits) in zip(offsets, groups, strict=True):
            align = row | offset | 16
            for width, addresses in _pieces(size, bits, [start + offset for start in rows], align & -align):
                lanes = 32 if width <= 4 else 128 // width
                for first in range(0, 32, lanes):
                    banks: dict[int, set[int]] = {}
                    for address in addresses[first : first + lanes]:
                        for word in range(address // 4, (address + width + 3) // 4):
                            banks.setdefault(word % 32, set()).add(word)
                    total += max(len(words) for words in banks.values())
        return total

    return min(range(0, 128, 16), key=lambda pad: (passes(pad), pad))


def _pieces(size: int, bits: int, rows: list[int], align: int) -> list[tuple[int, list[int]]]:
    """The loads of levels.cuh's `Row::load`: (bytes per lane, address of every lane)."""
    width = main_width(bits)
    own, plane, piece = size * width // 32, size * width // 8, piece_size(size, bits)
    step = max(x for x in (1, 2, 4, 8, 16) if piece % x == 0 and (x <= 4 or align % x == 0))
    loads = []
    for i in range(0, own, step):
        loads.append((step, [row + t * own + i for row in rows for t in range(4)]))
        if bits != width:
            parts = 4 // width
            loads.append((step, [row + plane + t % parts * own + i for row in rows for t in range(4)]))
    return loads
