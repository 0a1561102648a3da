"""How a vector of `head_dim` channels is cut into coded groups, and where their bytes lie in a tile.

Kernels and their callers share these descriptions and no others: kernels never see a configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_hf.primitives import SIXTEEN_STATES, WORD, Codebook, Trellis, packed_size

SCALE_RULES = ("norm", "norm-corrected", "mse", "unbiased")
SCALE_FORMATS = {"fp16": (0, 1.0), "e4m4": (6, 64.0), "e3m5": (5, 2.0**11)}
"""name -> (left shift that turns a stored byte into the bits of a half, factor of that half)."""


@dataclass(frozen=True)
class CodeGroup:
    """`size` consecutive rotated channels that share one codebook and one scale per token."""

    size: int
    codebook: Codebook | Trellis

    @property
    def bits(self) -> int:
        return self.codebook.bits

    @property
    def in_words(self) -> bool:
        """Whether the codes follow a trellis, and are packed in words of 32."""
        return isinstance(self.codebook, Trellis)

    @property
    def for_kernels(self) -> bool:
        """Whether fast kernels can read the group. Of trellises, they know the one of 16 states."""
        book = self.codebook
        return not isinstance(book, Trellis) or (book.h0, book.h1, book.word) == SIXTEEN_STATES


@dataclass(frozen=True, eq=False)
class TileCoding:
    """How the tiles of keys or of values are coded: y = transform @ (balance * (v - mean))[order] for a vector v.

    Attributes:
        transform: [D, D] or [B or 1, H, D, D]. A transform that all sequences share counts as a constant: kernels keep
            the tables that they make of it.
        groups: how y is cut into groups; their sizes add up to D.
        scale_rule: "norm" |y| / sqrt(size), "norm-corrected" |y| / |c|, "mse" <y, c> / <c, c>, or "unbiased"
            |y|^2 / <y, c> (EDEN, RaBitQ), for the codebook vector c of a group.
        scale_format: see `store_scale`.
        channel_major: see `tile_bytes`.
        center: whether the mean is the mean of the tile's tokens, which is then stored.
        gain: float32 [B, H]. Scales are divided by it before they are stored. None for ones.
        order: int16 [B, H, D], a permutation of the channels; None for the identity.
        balance: float32 [B, H, D], factors that are expected to bring the channels near 1; None for ones.
    """

    transform: torch.Tensor
    groups: tuple[CodeGroup, ...]
    scale_rule: str = "norm"
    scale_format: str = "fp16"
    channel_major: bool = False
    center: bool = False
    gain: torch.Tensor | None = None
    order: torch.Tensor | None = None
    balance: torch.Tensor | None = None


def tile_bytes(groups: tuple[CodeGroup, ...], tile: int, channel_major: bool) -> int:
    """Bytes of the codes of one tile of `tile` tokens.

    Token-major: `tile` rows, each the packed groups of one token side by side. Channel-major: group after group,
    each `size` rows that hold one channel's `tile` codes. `primitives.packing` describes a row.

    Groups in words have no rows: the words of a group, as `to_words` orders them, stand side by side. In a
    channel-major tile they stand in the group's place, in a token-major tile behind the rows of the other groups.
    """
    if channel_major:
        return sum(group.size * packed_size(tile, group.bits) for group in groups)
    return tile * sum(packed_size(group.size, group.bits) for group in groups)


def group_places(groups: tuple[CodeGroup, ...], tile: int, channel_major: bool) -> list[tuple[int, int]]:
    """(first byte, bytes) of every group in a tile. For token-major rows, both are those in the first token's row."""
    row = 0 if channel_major else sum(packed_size(group.size, group.bits) for group in groups if not group.in_words)
    places, in_row, behind = [], 0, row * tile
    for group in groups:
        if channel_major or group.in_words:
            size = tile_bytes((group,), tile, channel_major)
            places.append((behind, size))
            behind += size
        else:
            size = packed_size(group.size, group.bits)
            places.append((in_row, size))
            in_row += size
    return places


# Words hold what one lane of decode.cu multiplies, so that no code passes between lanes. A warp multiplies 16 rows by
# 32 columns: lane 4 g + t has the columns of part t, in rows g and g + 8 (docs/kernels.md, "Who holds what in a warp").
# Four neighbouring columns, a unit, are the bytes of one register. In a tile of 128 tokens:
#
# Values   Rows are channels, columns are tokens. Word 4 c + t holds tokens 32 t .. 32 t + 31 of channel c.
# Keys     Rows are tokens, columns are channels. Lane 4 g + t has quarter t of the group's channels. It has 16 tokens:
#          32 (g // 2) + 4 u + 2 (g % 2) + {0, 1} for u = 0 .. 7. Its values, token by token, are cut into words of 32.
#          The first words of all lanes stand side by side, then their second words, and so on. A warp therefore reads
#          neighbouring bytes.
#          Example, 64 channels: lane 0 has channels 0 .. 15, tokens 0 and 1 in its first word, 4 and 5 in its second.
#          Lane 4 has the same channels, tokens 2 and 3 in its first word, 6 and 7 in its second.
#
# The trellis visits the values 16 a + 8 b + n of a word (a, b bits; n < 8) in the order of 4 n + 2 b + a. The bits of
# the four values of a unit then lie four bits apart, both in the parities and in the planes of plain bits. There a byte
# permutation needs them, which looks up a unit (`decode/cuda/words.cuh` shows the bits). Half of a word also needs
# only one of the two words of a two-bit plane.


def fills_words(size: int, channel_major: bool) -> bool:
    """Whether `size` channels can be packed in words: always along tokens, else only where a lane has whole units."""
    return channel_major or size % 16 == 0


def to_words(x: torch.Tensor, channel_major: bool) -> torch.Tensor:
    """Values of one group, [..., T, C] with T a multiple of 32, as words in the order of the trellis: [..., W, 32]."""
    *lead, tile, size = x.shape
    if channel_major:
        places = x.transpose(-1, -2).reshape(*lead, tile * size // WORD, 2, 2, 8)
    else:
        x = x.reshape(*lead, tile // 32, 8, 2, 2, 4, size // 4)
        first = len(lead)
        order = (*range(first), first, first + 2, first + 4, first + 1, first + 3, first + 5)
        places = x.permute(order).reshape(*lead, tile // 4, size // 8, WORD).transpose(-2, -3)
        places = places.reshape(*lead, tile * size // WORD, 2, 2, 8)
    return places.permute(*range(places.dim() - 3), -1, -2, -3).flatten(-3)


def from_words(words: torch.Tensor, tile: int, size: int, channel_major: bool) -> torch.Tensor:
    """The inverse of `to_words`: [..., W, 32] -> [..., tile, size]."""
    places = words.unflatten(-1, (8, 2, 2)).permute(*range(words.dim() - 1), -1, -2, -3).flatten(-3)
    return from_places(places, tile, size, channel_major)


def from_places(places: torch.Tensor, tile: int, size: int, channel_major: bool) -> torch.Tensor:
    """`from_words` of words whose values are not in the order of the trellis, but by their numbers 16 a + 8 b + n.

    Four neighbouring values of a word stand side by side in a row of the result. So a place may also stand for a pair
    of values: with half as many places per word, the result has half as many columns.
    """
    *lead, _, word = places.shape
    if channel_major:
        return places.reshape(*lead, size, -1).transpose(-1, -2)
    x = places.reshape(*lead, size // 8, tile // 4, word).transpose(-2, -3)
    x = x.reshape(*lead, tile // 32, 2, 4, 8, 2, -1)
    first = len(lead)
    order = (*range(first), first, first + 3, first + 1, first + 4, first + 2, first + 5)
    return x.permute(order).reshape(*lead, tile, -1)


HALF_MAX = torch.finfo(torch.float16).max


def to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 to float16. A number that does not fit becomes NaN: clamped, it would pass for a correct number."""
    return torch.where(x.abs() <= HALF_MAX, x, torch.nan).to(torch.float16)


def store_scale(scale: torch.Tensor, scale_format: str = "fp16") -> torch.Tensor:
    """Non-negative float32 scales in their stored form. In fp16, a scale that does not fit becomes NaN (`to_half`).

    One-byte formats are the high bits of a half's pattern: "e4m4" covers [2**-12, 126] with a relative error of at
    most 1/32 above 2**-8, "e3m5" [2**-8, 15.75] with at most 1/64 above 2**-3. They expect scales near 1. They have
    no pattern for NaN: NaN and scales that do not fit saturate.
    """
    if scale_format == "fp16":
        return to_half(scale)
    shift, unit = SCALE_FORMATS[scale_format]
    # A NaN may have its sign set, and would then be a negative number.
    bits = (
        (scale / unit).nan_to_num(nan=65504.0).clamp(0.0, 65504.0).to(torch.float16).view(torch.int16).to(torch.int32)
    )
    return ((bits + (1 << (shift - 1))) >> shift).clamp(max=255).to(torch.uint8)


def load_scale(stored: torch.Tensor, scale_format: str = "fp16") -> torch.Tensor:
    """The float32 scales behind `store_scale`'s result."""
    if scale_format == "fp16":
        return stored.float()
    shift, unit = SCALE_FORMATS[scale_format]
    return (stored.to(torch.int16) << shift).view(torch.float16).float() * unit
