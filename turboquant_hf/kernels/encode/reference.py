"""Plain torch: the definition of encoding and decoding tiles, which the Triton kernels are tested against."""

from __future__ import annotations

import torch

from turboquant_hf.kernels.codes import (
    TileCoding,
    from_words,
    group_places,
    load_scale,
    store_scale,
    to_half,
    to_words,
)
from turboquant_hf.primitives import pack, pack_words, packed_size, unpack, unpack_words


def tile_mean(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens of each tile. x: [B, H, N, T, D]; weight: [B, N, T], 0 for padding -> [B, H, N, D] fp16.

    A mean that float16 cannot hold becomes NaN. An infinity counts as NaN, here and in `encode_tiles`.
    """
    x = _nan_for_inf(x.float())
    if weight is None:
        mean = x.mean(dim=-2)
    else:
        w = weight[:, None, :, :, None].float()
        mean = (x * w).sum(dim=-2) / w.sum(dim=-2).clamp(min=1.0)
    return to_half(mean)


def encode_tiles(
    x: torch.Tensor,
    coding: TileCoding,
    *,
    mean: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    out: dict[str, torch.Tensor] | None = None,
    flag: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Transform, scale, code and pack tiles.

    Args:
        x: [B, H, N, T, D], any float dtype; the arithmetic is float32.
        mean: [B, H, N, D], subtracted before the transform; with `coding.center` it is `tile_mean(x, weight)`.
        weight: [B, N, T], 0 for padding and sinks. It enters the mean (`coding.center`). In groups in words, a token
            without weight has the scale 0 and does not influence the codes of other tokens.
        out: arrays [B, H, N, ...], or views, to write to instead of new ones.
        flag: int8 [1], set to 1 if a token with weight is stored with a NaN or the largest one-byte scale: x is not
            finite there, or its scale or mean does not fit.

    Returns:
        {"codes": uint8 [B, H, N, bytes], "scale": [B, H, N, G, T]} and with `coding.center` "mean" [B, H, N, D] fp16:
        `out` where it is given.
    """
    transform, center, channel_major = coding.transform, coding.center, coding.channel_major
    v = _nan_for_inf(x.float())
    if center:
        mean = tile_mean(x, weight)
    if mean is not None:
        v = v - mean.unsqueeze(-2).float()
    if coding.order is not None:
        transform = sorted_columns(transform, coding.order)
    if coding.balance is not None:
        transform = transform * coding.balance.unsqueeze(-2)
    matrix = transform if transform.dim() == 2 else transform.unsqueeze(2)
    y = v @ matrix.float().transpose(-1, -2)

    rows, blocks, scales = [], [], []
    idle = None if weight is None else (weight == 0)[:, None]
    for group, part in zip(coding.groups, y.split([group.size for group in coding.groups], dim=-1), strict=True):
        unit = part.norm(dim=-1, keepdim=True) / group.size**0.5
        point = part / unit.clamp(min=1e-30)
        if group.in_words:
            if idle is not None:
                point = point.masked_fill(idle[..., None], torch.nan)
            codes = group.codebook.encode(to_words(point, channel_major))
            level = from_words(group.codebook.decode(codes), *part.shape[-2:], channel_major)
            blocks.append(pack_words(codes, group.bits).flatten(-2))
        else:
            codes = group.codebook.encode(point)
            level = group.codebook.decode(codes)
            row = pack(codes.transpose(-1, -2) if channel_major else codes, group.bits)
            blocks.append(row.flatten(-2)) if channel_major else rows.append(row)
        scale = _scale(part, level, coding.scale_rule)
        scales.append(scale.masked_fill(idle, 0.0) if group.in_words and idle is not None else scale)
    packed = torch.cat([*([torch.cat(rows, dim=-1).flatten(-2)] if rows else []), *blocks], dim=-1)
    scale = torch.stack(scales, dim=-2)
    if coding.gain is not None:
        scale = scale / coding.gain[:, :, None, None, None]
    made = {"codes": packed, "scale": store_scale(scale, coding.scale_format), **({"mean": mean} if center else {})}
    if flag is not None:
        flag |= _suspect(made["scale"], weight)
    if out is None:
        return made
    for name, array in made.items():
        out[name].copy_(array)
    return out


def sorted_columns(rotation: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Columns of the rotation moved so that its j-th input is channel order[j]: [B, H, D, D]."""
    index = order.long().unsqueeze(-2).expand(*order.shape, order.shape[-1])
    source = rotation.expand_as(index)
    return torch.zeros_like(source).scatter(-1, index, source)


def bad_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Which heads, bool [B, H], hold a NaN or an infinity in tiles [B, H, N, T, D] where weight [B, N, T] is not 0.

    One-byte scales have no pattern for NaN, so they would hide it. Callers give such a head a NaN gain instead. All
    that is read of the head's tiles is then NaN, as attention over raw tensors would be.
    """
    norm = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1).masked_fill(weight[:, None] == 0, 0.0)
    return ~norm.amax(dim=(2, 3)).isfinite()


def saturated_heads(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Which heads, bool [B, H], have the largest one-byte scale where weight [B, N, T] is not 0.

    scale: [B, H, N, groups, T] as stored; a larger scale would have been stored as the same byte.
    """
    if scale.dtype != torch.uint8:
        return torch.zeros(scale.shape[:2], dtype=torch.bool, device=scale.device)
    return _suspect(scale, weight, dim=(2, 3, 4))


def _suspect(scale: torch.Tensor, weight: torch.Tensor | None, dim: tuple[int, ...] | None = None) -> torch.Tensor:
    """Whether a token with weight has a scale [B, H, N, groups, T] that is the largest byte, or NaN."""
    found = scale == 255 if scale.dtype == torch.uint8 else scale.isnan()
    if weight is not None:
        found = found & (weight > 0)[:, None, :, None, :]
    return found.any() if dim is None else found.any(dim=dim)


def _nan_for_inf(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isinf(), torch.nan, x)


def _scale(y: torch.Tensor, code: torch.Tensor, rule: str) -> torch.Tensor:
    norm = y.norm(dim=-1)
    if rule == "norm":
        return norm / y.shape[-1] ** 0.5
    if rule == "norm-corrected":
        return norm / code.norm(dim=-1)
    inner = (y * code).sum(dim=-1)
    if rule == "mse":
        return inner / code.square().sum(dim=-1)
    return norm.square() / inner.clamp(min=1e-30)


def decode_rotated(packed: dict[str, torch.Tensor], coding: TileCoding) -> torch.Tensor:
    """The scaled codebook vectors, still rotated: float32 [B, H, N, T, D].

    Of `packed`, "codes" and "scale" are read. Of `coding`, the groups, the format and gain of scales, and
    `channel_major` are read: nothing of the transform.
    """
    codes, scale = packed["codes"], packed["scale"]
    groups, channel_major, tile = coding.groups, coding.channel_major, scale.shape[-1]
    factor = load_scale(scale, coding.scale_format)
    if coding.gain is not None:
        factor = factor * coding.gain[:, :, None, None, None]
    parts = []
    lead = codes.shape[:-1]
    row_bytes = sum(packed_size(group.size, group.bits) for group in groups if not group.in_words)
    for index, (group, (start, size)) in enumerate(zip(groups, group_places(groups, tile, channel_major), strict=True)):
        if group.in_words:
            words = unpack_words(
                codes[..., start : start + size].unflatten(-1, (size // (4 * group.bits), 4 * group.bits)), group.bits
            )
            level = from_words(group.codebook.decode(words), tile, group.size, channel_major)
        elif channel_major:
            rows = codes[..., start : start + size].reshape(*lead, group.size, size // group.size)
            level = group.codebook.decode(unpack(rows, group.bits, tile).transpose(-1, -2))
        else:
            rows = codes[..., : tile * row_bytes].reshape(*lead, tile, row_bytes)[..., start : start + size]
            level = group.codebook.decode(unpack(rows, group.bits, group.size))
        parts.append(level * factor[..., index, :, None])
    return torch.cat(parts, dim=-1)


def decode_tiles(packed: dict[str, torch.Tensor], inverse: torch.Tensor, coding: TileCoding) -> torch.Tensor:
    """Undo `encode_tiles`: x = inverse @ y + mean (where `packed` has a "mean"), float32 [B, H, N, T, D].

    Args:
        inverse: [D, D] or [B or 1, H, D, D], the inverse of transform, order and balance together: those of `coding`
            are not read.
    """
    y = decode_rotated(packed, coding)
    matrix = inverse if inverse.dim() == 2 else inverse.unsqueeze(2)
    x = y @ matrix.float().transpose(-1, -2)
    if "mean" in packed:
        x = x + packed["mean"].unsqueeze(-2).float()
    return x
