"""Plain torch: the definition that every faster encoder is tested against."""

from __future__ import annotations

import torch

from turboquant_hf.kernels.codes import CodeGroup, load_scale, store_scale
from turboquant_hf.primitives import pack, packed_size, unpack


def tile_mean(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens of each tile. x: [B, H, N, T, D]; weight: [B, N, T], 0 for padding -> [B, H, N, D] fp16."""
    if weight is None:
        mean = x.float().mean(dim=-2)
    else:
        w = weight[:, None, :, :, None].float()
        mean = (x.float() * w).sum(dim=-2) / w.sum(dim=-2).clamp(min=1.0)
    limit = torch.finfo(torch.float16).max
    return mean.clamp(-limit, limit).to(torch.float16)


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
    """Transform, scale, code and pack tiles.

    Args:
        x: [B, H, N, T, D], any float dtype; the arithmetic is float32.
        transform: [D, D] or [B or 1, H, D, D]; a vector v becomes y = transform @ (v - mean).
        groups: how y is cut; sizes add up to D.
        scale_rule: "norm" |y| / sqrt(size), "norm-corrected" |y| / |c|, "mse" <y, c> / <c, c>, or "unbiased"
            |y|^2 / <y, c> (EDEN, RaBitQ), for the codebook vector c of a group.
        scale_format: see `kernels.codes.store_scale`.
        gain: float32 [B, H], what scales are divided by before they are stored.
        mean: [B, H, N, D], subtracted before the transform.

    Returns:
        {"codes": uint8 [B, H, N, bytes], "scale": [B, H, N, G, T]}.
    """
    v = x.float()
    if mean is not None:
        v = v - mean.unsqueeze(-2).float()
    matrix = transform if transform.dim() == 2 else transform.unsqueeze(2)
    y = v @ matrix.float().transpose(-1, -2)

    rows, scales = [], []
    for group, part in zip(groups, y.split([group.size for group in groups], dim=-1), strict=True):
        unit = part.norm(dim=-1, keepdim=True) / group.size**0.5
        codes = group.codebook.encode(part / unit.clamp(min=1e-30))
        scales.append(_scale(part, group.codebook.decode(codes), scale_rule))
        rows.append(pack(codes.transpose(-1, -2) if channel_major else codes, group.bits))
    if channel_major:
        packed = torch.cat([row.flatten(-2) for row in rows], dim=-1)
    else:
        packed = torch.cat(rows, dim=-1).flatten(-2)
    scale = torch.stack(scales, dim=-2)
    if gain is not None:
        scale = scale / gain[:, :, None, None, None]
    return {"codes": packed, "scale": store_scale(scale, scale_format)}


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


def decode_rotated(
    codes: torch.Tensor,
    scale: torch.Tensor,
    groups: tuple[CodeGroup, ...],
    *,
    scale_format: str = "fp16",
    gain: torch.Tensor | None = None,
    channel_major: bool = False,
) -> torch.Tensor:
    """The scaled codebook vectors, still rotated: float32 [B, H, N, T, D]. Arguments as in `encode_tiles`."""
    tile = scale.shape[-1]
    factor = load_scale(scale, scale_format)
    if gain is not None:
        factor = factor * gain[:, :, None, None, None]
    parts, start = [], 0
    lead = codes.shape[:-1]
    row_bytes = codes.shape[-1] // tile
    for index, group in enumerate(groups):
        if channel_major:
            width = packed_size(tile, group.bits)
            rows = codes[..., start : start + group.size * width].reshape(*lead, group.size, width)
            unpacked = unpack(rows, group.bits, tile).transpose(-1, -2)
            start += group.size * width
        else:
            width = packed_size(group.size, group.bits)
            rows = codes.reshape(*lead, tile, row_bytes)[..., start : start + width]
            unpacked = unpack(rows, group.bits, group.size)
            start += width
        parts.append(group.codebook.decode(unpacked) * factor[..., index, :, None])
    return torch.cat(parts, dim=-1)


def decode_tiles(
    packed: dict[str, torch.Tensor],
    inverse: torch.Tensor,
    groups: tuple[CodeGroup, ...],
    *,
    scale_format: str = "fp16",
    gain: torch.Tensor | None = None,
    channel_major: bool = False,
) -> torch.Tensor:
    """Undo `encode_tiles`: x = inverse @ y + mean (where `packed` has a "mean"), float32 [B, H, N, T, D].

    inverse: [D, D] or [B or 1, H, D, D], the inverse of `encode_tiles`' transform.
    """
    y = decode_rotated(
        packed["codes"], packed["scale"], groups, scale_format=scale_format, gain=gain, channel_major=channel_major
    )
    matrix = inverse if inverse.dim() == 2 else inverse.unsqueeze(2)
    x = y @ matrix.float().transpose(-1, -2)
    if "mean" in packed:
        x = x + packed["mean"].unsqueeze(-2).float()
    return x
