"""`decode_attention` for a CPU: plain torch operations that compute with codes instead of decoded tokens.

    scores[t] = scale[t] * (levels(codes[t]) . q') + mean . q        q' = the query in the coded domain
    output    = unrotate(sum over t of p[t] * scale[t] * levels(codes[t])) / (sum over t of p[t])

- The rotation meets the query and the output, never the history. Scales meet scores and probabilities.
- Levels are looked up, several codes at a time: a table has one row per pattern of the bytes that hold them, and a
  row lists their levels (`_Reader`). The row's order is the order of the packed bits, not that of the codes, so the
  other factor of the product is put into that order; it is far smaller. `cpu_words` looks up those of a trellis.
- Tiles are taken in blocks of BLOCK numbers, so that a block's levels are still in the processor's cache when they are
  multiplied. Scores and probabilities of all tokens are kept: 8 bytes per query head and token.
- Every operation on a block is large enough for torch to spread it over its threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from math import gcd

import torch

from turboquant_hf.kernels.codes import group_places, load_scale
from turboquant_hf.kernels.decode.cpu_words import word_levels
from turboquant_hf.kernels.decode.inputs import History, PackedSide, Scoring
from turboquant_hf.kernels.decode.reference import _visible
from turboquant_hf.primitives import Codebook, packed_size
from turboquant_hf.primitives.packing import planes

BLOCK = 1 << 19
"""Numbers that are looked up at once, per side: 2 MiB as float32."""
WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}
"""How many 16-bit numbers are read as one -> dtype of that one."""


def _in_float32(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Shut out torch.autocast, which would multiply in half precision."""

    @wraps(attend)
    def call(*arguments, **options):
        if not torch.is_autocast_enabled("cpu"):
            return attend(*arguments, **options)
        with torch.autocast("cpu", enabled=False):
            return attend(*arguments, **options)

    return call


@_in_float32
def decode_attention(
    query: torch.Tensor, history: History, scoring: Scoring, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Equivalent to `reference.decode_attention`, but faster and without gradients."""
    history = history.in_use()
    keys, values, sinks, tail = history.keys, history.values, history.sinks, history.tail
    mask = None if mask is None else mask[:, : history.length]
    batch, query_heads, count, dim = query.shape
    _, heads, tiles, _, tile = keys.scale.shape
    rows = (query.detach().float() * scoring.scaling).reshape(batch, heads, -1, dim)  # M rows per KV head

    # Columns: packed tokens | sinks | tail | s_aux.
    packed = tiles * tile
    split = packed + sinks.keys.shape[2]
    total = split + tail.keys.shape[2]
    scores = rows.new_empty(batch, heads, rows.shape[2], total + (scoring.s_aux is not None))
    _packed_scores(rows, keys, scores[..., :packed])
    scores[..., packed:split] = rows @ sinks.keys.float().transpose(2, 3)
    scores[..., split:total] = rows @ tail.keys.float().transpose(2, 3)
    if scoring.softcap is not None:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    seen = _hide(scores, packed, total, history.starts, sinks.keys.shape[2], count, mask)
    if scoring.s_aux is not None:
        extra = scoring.s_aux.detach().float().view(heads, -1, 1)
        scores[..., total] = extra.expand(-1, -1, count).reshape(heads, -1)
    weights = scores.softmax(dim=-1)
    if seen is not None:
        weights = weights.masked_fill_(~seen, 0.0)
    if scoring.sparse_v_threshold:
        by_tile = weights[..., :packed].unflatten(-1, (tiles, tile))
        least = scoring.sparse_v_threshold * weights[..., :total].amax(dim=-1, keepdim=True)
        unlikely = by_tile.amax(dim=-1) < least
        by_tile.masked_fill_(unlikely.all(dim=2, keepdim=True)[..., None], 0.0)

    out = values.unrotate(_packed_values(weights[..., :packed], values))
    out += weights[..., packed:split] @ sinks.values.float()
    out += weights[..., split:total] @ tail.values.float()
    if values.mean is not None:
        out += weights[..., :packed].unflatten(-1, (tiles, tile)).sum(dim=-1) @ values.mean.float()
    return out.view(batch, query_heads, count, -1).to(query.dtype)


def _packed_scores(rows: torch.Tensor, keys: PackedSide, out: torch.Tensor) -> None:
    """Write q.k of rows [B, H, M, D] and every packed token to out [B, H, M, N * T]."""
    batch, heads, tiles, _, tile = keys.scale.shape
    query_rows, dim = rows.shape[2:]
    readers = [None if group.in_words else _reader(group.codebook, group.size) for group in keys.groups]
    places = group_places(keys.groups, tile, channel_major=False)
    row = sum(reader.nbytes for reader in readers if reader)
    coded = keys.rotate_query(rows)
    if keys.gain is not None:
        coded = coded * keys.gain.view(batch, heads, 1, 1)
    coded = [
        reader.arranged(part) if reader else part
        for reader, part in zip(readers, coded.split([group.size for group in keys.groups], dim=-1), strict=True)
    ]
    for first, count in _blocks(keys, dim):
        lead = batch, heads, count
        part_out = out[..., first * tile : (first + count) * tile]
        part_out = part_out.view(batch, heads, query_rows, count, tile).transpose(2, 3)
        scale = load_scale(keys.scale.narrow(2, first, count), keys.scale_format)
        codes = keys.codes.narrow(2, first, count)
        tokens = codes[..., : tile * row].unflatten(-1, (tile, row))
        if any(reader and reader.narrower for reader in readers):
            tokens = tokens.to(torch.int16)
        for index, (reader, part) in enumerate(zip(readers, coded, strict=True)):
            start, nbytes = places[index]
            if reader:
                levels = reader.levels(tokens, start)
            else:
                levels = word_levels(codes.narrow(3, start, nbytes), keys.groups[index], tile, False).flatten(0, 2)
            part = part.unsqueeze(2).expand(*lead, *part.shape[2:]).reshape(-1, *part.shape[2:])
            product = torch.bmm(part, levels.transpose(1, 2)).view(*lead, query_rows, tile)
            factor = scale.select(3, index).unsqueeze(3)
            torch.mul(product, factor, out=part_out) if index == 0 else part_out.addcmul_(product, factor)
        if keys.mean is not None:
            part_out += (keys.mean.narrow(2, first, count).float() @ rows.transpose(2, 3)).unsqueeze(4)


def _packed_values(weights: torch.Tensor, values: PackedSide) -> torch.Tensor:
    """The sum of weights [B, H, M, N * T] times coded values: float32 [B, H, M, D]."""
    batch, heads, tiles, _, tile = values.scale.shape
    dim = sum(group.size for group in values.groups)
    weights = weights.view(batch, heads, weights.shape[2], tiles, tile).transpose(2, 3)
    out = None
    for first, count in _blocks(values, dim):
        scale = load_scale(values.scale.narrow(2, first, count), values.scale_format)
        codes, start, parts = values.codes.narrow(2, first, count), 0, []
        for index, group in enumerate(values.groups):
            nbytes = packed_size(tile, group.bits)
            channels = codes.narrow(3, start, group.size * nbytes)
            start += group.size * nbytes
            weighted = weights.narrow(2, first, count) * scale.select(3, index).unsqueeze(3)
            if group.in_words:
                levels = word_levels(channels, group, tile, True).flatten(0, 2)
            else:
                reader = _reader(group.codebook, tile)
                channels = channels.unflatten(-1, (group.size, nbytes))
                weighted = reader.arranged(weighted)
                levels = reader.levels(channels.to(torch.int16) if reader.narrower else channels, 0)
            weighted = weighted.reshape(-1, *weighted.shape[3:])
            product = torch.bmm(weighted, levels.transpose(1, 2))
            parts.append(product.view(batch, heads, count, -1, group.size).sum(dim=2))
        part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        out = part if out is None else out.add_(part)
    if out is None:
        return weights.new_zeros(batch, heads, weights.shape[3], dim)
    return out if values.gain is None else out * values.gain.view(batch, heads, 1, 1)


def _blocks(side: PackedSide, dim: int) -> list[tuple[int, int]]:
    """(first tile, number of tiles) of each block."""
    batch, heads, tiles, _, tile = side.scale.shape
    step = max(1, BLOCK // (batch * heads * tile * dim))
    return [(first, min(step, tiles - first)) for first in range(0, tiles, step)]


def _hide(
    scores: torch.Tensor,
    packed: int,
    total: int,
    starts: torch.Tensor,
    sinks: int,
    queries: int,
    mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Write -inf to scores [B, H, M, packed | sinks | tail | ...] of tokens that a query does not see.

    Returns: bool [B, 1, M, 1], whether a row sees any token, or None where all rows do.
    """
    first, length = starts.tolist(), total - sinks
    if queries == 1 and min(first) == max(first) < length and (mask is None or bool(mask.all())):
        start = first[0]
        scores[..., : min(start + sinks, packed)] = -torch.inf
        if start + sinks > packed:
            scores[..., packed + max(packed - start, 0) : packed + sinks + max(start - packed, 0)] = -torch.inf
        return None
    visible = _visible(starts, packed, length, sinks, queries, mask)[:, None, None]
    scores[..., :total].unflatten(2, (-1, queries)).masked_fill_(~visible, -torch.inf)
    return visible.any(dim=-1).expand(-1, -1, scores.shape[2] // queries, -1).reshape(len(first), 1, -1, 1)


@dataclass(frozen=True)
class _Reader:
    """Looks up the levels of n codes of one codebook (`primitives.packing` has the layout).

    An index of the table is a byte of the widest plane, with the other bits of the same codes above it. Byte j of a
    plane of width w and P bytes holds codes j + f P. A narrower plane of width v and Q = P v / w bytes has the other
    bits of these codes in byte j % Q, in the fields j // Q + f w / v. These fields are w bits apart, like the fields of
    byte j. One shift per value of j // Q and one mask therefore put them in place.

    Attributes:
        table: one row per index, [indices, 1] of 4, 8 or 16 bytes, or float32 [256, 8].
        size: n, rounded up to a multiple of 8.
        fields: codes per byte of the widest plane.
        wide: bytes of the widest plane.
        narrower: (bytes, shifts [w / v, 1] to the left, mask) of each other plane.
        nbytes: bytes of all planes.
    """

    table: torch.Tensor
    size: int
    fields: int
    wide: int
    narrower: tuple[tuple[int, torch.Tensor, int], ...]
    nbytes: int

    def levels(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The levels of the codes in rows [B, H, tiles, rows, bytes] from byte `start` on.

        rows: uint8; int16 where there are narrower planes.
        Returns: float32 [B * H * tiles, rows, size], in the order of `arranged`.
        """
        index = rows.narrow(4, start, self.wide)
        start += self.wide
        for nbytes, shifts, mask in self.narrower:
            # 16-bit numbers inside larger words: the mask removes what a shift carries over to a neighbour.
            step = gcd(start, nbytes, rows.shape[4], 4)
            words = rows.view(WORDS[step]).narrow(4, start // step, nbytes // step).unsqueeze(4)
            above = (words << shifts.to(words.dtype)).view(torch.int16).bitwise_and_(mask)
            index = above.view(index.shape).bitwise_or_(index)
            start += nbytes
        index = index.long()
        if self.table.shape[1] > 1:
            levels = torch.embedding(self.table, index)
        else:
            # torch spreads the rows of a gather over its threads.
            index = index.view(rows.shape[0] * rows.shape[1] * rows.shape[2], -1)
            levels = self.table.view(1, -1).expand(index.shape[0], -1).gather(1, index)
        return levels.view(torch.float32).view(-1, rows.shape[3], self.size)

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] in the order of `levels`, bytes first and their fields last, padded with zeros: [..., size]."""
        if x.shape[-1] < self.size:
            x = torch.nn.functional.pad(x, (0, self.size - x.shape[-1]))
        if self.fields == 1:
            return x
        return x.reshape(*x.shape[:-1], self.fields, -1).transpose(-1, -2).reshape(x.shape)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _reader(codebook: Codebook, n: int) -> _Reader:
    (width, _), *others = planes(codebook.bits)
    octets = packed_size(n, 1)
    shifts = torch.arange(0, 8, width, device="cpu")
    narrower = tuple(
        (
            octets * other,
            (8 + shift - width - other * torch.arange(width // other, device="cpu"))[:, None],
            sum((2**other - 1) << (8 + shift - width + field) for field in range(0, 8, width)),
        )
        for other, shift in others
    )
    index = torch.arange(256 + sum(mask for _, _, mask in narrower), device="cpu")[:, None]
    above = 2 ** (codebook.bits - width) - 1
    codes = (index >> shifts) & (2**width - 1) | ((index >> (8 + shifts)) & above) << width
    levels = codebook.tensor()[codes].contiguous()
    entry = {1: torch.float32, 2: torch.float64, 4: torch.complex128, 8: torch.float32}[levels.shape[1]]
    return _Reader(
        table=levels.view(entry),
        size=octets * 8,
        fields=8 // width,
        wide=octets * width,
        narrower=narrower,
        nbytes=packed_size(n, codebook.bits),
    )
