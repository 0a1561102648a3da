"""Random packed inputs of the kernels, small and odd."""

from __future__ import annotations

from dataclasses import replace

import torch

from turboquant_hf.kernels.codes import CodeGroup, store_scale
from turboquant_hf.kernels.decode.reference import PackedSide, RawTokens
from turboquant_hf.kernels.encode.reference import encode_tiles, tile_mean
from turboquant_hf.primitives import lloyd_max, rotation_matrix, uniform


def groups_of(*widths: tuple[int, int], make=lloyd_max) -> tuple[CodeGroup, ...]:
    """(channels, bits) pairs to groups."""
    return tuple(CodeGroup(size, make(bits, size)) for size, bits in widths)


def packed_side(
    shape, groups, *, channel_major, mean, conditioned=False, scale_format="fp16", spare=0, generator=None
) -> PackedSide:
    """Encoded noise of shape [B, H, N, T, D] with a common vector; `spare` tiles of NaN and 255 lie behind a view."""
    batch, heads, tiles, tile, dim = shape
    x = torch.randn(shape, generator=generator) + torch.randn(dim, generator=generator)
    rotation = rotation_matrix(dim)
    balance = order = gain = None
    transform = rotation
    if conditioned:
        balance = torch.rand(batch, heads, dim, generator=generator) + 0.5
        order = torch.stack([torch.randperm(dim, generator=generator) for _ in range(batch * heads)])
        order = order.reshape(batch, heads, dim)
        index = order.unsqueeze(-2).expand(batch, heads, dim, dim)
        transform = torch.zeros(index.shape).scatter(-1, index, rotation.expand_as(index)) * balance.unsqueeze(-2)
    mu = tile_mean(x, None) if mean else None
    if scale_format != "fp16":
        gain = torch.rand(batch, heads, generator=generator) + 0.5
    packed = encode_tiles(
        x, transform, groups, scale_rule="unbiased", scale_format=scale_format, gain=gain, mean=mu,
        channel_major=channel_major,
    )  # fmt: skip
    codes, scale = packed["codes"], packed["scale"]
    if spare:
        codes = torch.cat([codes, torch.full_like(codes[:, :, :1], 255).expand(-1, -1, spare, -1)], dim=2)[:, :, :tiles]
        worst = store_scale(torch.full_like(scale[:, :, :1], 1e4, dtype=torch.float32), scale_format)
        scale = torch.cat([scale, worst.expand(-1, -1, spare, -1, -1)], dim=2)[:, :, :tiles]
        if mean:
            mu = torch.cat([mu, torch.full_like(mu[:, :, :1], torch.nan).expand(-1, -1, spare, -1)], dim=2)
            mu = mu[:, :, :tiles]
    order = None if order is None else order.to(torch.int16)
    return PackedSide(codes, scale, groups, rotation, order, balance, mu, scale_format, gain)


def attention_inputs(
    *, batch=1, heads=2, group=2, queries=1, dim=64, tiles=3, tile=32, sinks=4, tail=21, keys=None, values=None,
    value_mean=False, conditioned=True, scale_format="fp16", spare=0, seed=0,
):  # fmt: skip
    """The positional arguments of `decode_attention`, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tiles, tile, dim)
    common = {"scale_format": scale_format, "spare": spare, "generator": generator}
    key_side = packed_side(
        shape, keys or groups_of((dim, 4)), channel_major=False, mean=True, conditioned=conditioned, **common
    )
    value_side = packed_side(
        shape, values or groups_of((dim, 4)), channel_major=True, mean=value_mean, conditioned=value_mean, **common
    )

    def raw(count):
        kept = [torch.randn(batch, heads, count + spare, dim, generator=generator)[:, :, :count] for _ in range(2)]
        return RawTokens(*kept)

    query = torch.randn(batch, heads * group, queries, dim, generator=generator)
    return query, key_side, value_side, raw(sinks), raw(tail), torch.zeros(batch, dtype=torch.int64)


def moved(arguments, device, dtype):
    """`attention_inputs` on a device, raw tensors in `dtype`."""

    def side(x):
        tensors = ("codes", "scale", "rotation", "order", "balance", "mean", "gain")
        return replace(x, **{name: v.to(device) for name in tensors if (v := getattr(x, name)) is not None})

    query, keys, values, sinks, tail, starts = arguments
    raws = [RawTokens(x.keys.to(device, dtype), x.values.to(device, dtype)) for x in (sinks, tail)]
    return query.to(device, dtype), side(keys), side(values), *raws, starts.to(device)


PLACES = ["keys.scale", "keys.mean", "keys.gain", "values.scale", "values.gain", "tail.keys", "tail.values"]


def with_a_nan(place):
    """`attention_inputs` with a NaN stored for the first head in one of `PLACES`."""
    name, array = place.split(".")
    arguments = attention_inputs(conditioned=False, scale_format="e4m4" if array == "gain" else "fp16")
    given = dict(zip(["query", "keys", "values", "sinks", "tail", "starts"], arguments, strict=True))
    held = getattr(given[name], array).clone()
    held[0, 0].view(-1)[-1] = torch.nan
    given[name] = replace(given[name], **{array: held})
    return tuple(given.values())


__all__ = ["PLACES", "attention_inputs", "groups_of", "moved", "packed_side", "uniform", "with_a_nan"]
