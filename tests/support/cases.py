"""Random packed inputs for the kernels, of small and odd sizes."""

from __future__ import annotations

from dataclasses import replace

import torch

from turboquant_hf.kernels.codes import CodeGroup, TileCoding, store_scale
from turboquant_hf.kernels.decode import History, PackedSide, RawTokens, Scoring
from turboquant_hf.kernels.encode.reference import encode_tiles, tile_mean
from turboquant_hf.primitives import lloyd_max, rotation_matrix, uniform


def groups_of(*widths: tuple[int, int], make=lloyd_max) -> tuple[CodeGroup, ...]:
    """The quantizer groups of (channels, bits) pairs."""
    return tuple(CodeGroup(size, make(bits, size)) for size, bits in widths)


def packed_side(
    shape, groups, *, channel_major, mean, conditioned=False, scale_format="fp16", spare=0, generator=None
) -> PackedSide:
    """Encoded noise [B, H, N, T, D] plus a common vector. The arrays hold `spare` more tiles of NaN and 255."""
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
    how = {"scale_rule": "unbiased", "scale_format": scale_format, "gain": gain, "channel_major": channel_major}
    packed = encode_tiles(x, TileCoding(transform, groups, **how), mean=mu)
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
    """The query and the history of a `decode_attention` call, float32 on the CPU."""
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
    return query, History(key_side, value_side, raw(sinks), raw(tail), torch.zeros(batch, dtype=torch.int64))


def attend(decode, arguments, *, scaling=0.125, mask=None, **options):
    """Call `decode`, a `decode_attention`, on `attention_inputs`; options are those of `Scoring` and of `decode`."""
    fields = {name: options.pop(name) for name in ("softcap", "s_aux", "sparse_v_threshold") if name in options}
    return decode(*arguments, Scoring(scaling, **fields), mask=mask, **options)


def attend_parts(decode, query, *held, counts=None, **options):
    """`attend` over a history whose parts are given one by one."""
    return attend(decode, (query, History(*held, counts)), **options)


def moved(arguments, device, dtype):
    """`attention_inputs` on a device, raw tensors in `dtype`."""

    def side(x):
        tensors = ("codes", "scale", "rotation", "order", "balance", "mean", "gain")
        return replace(x, **{name: v.to(device) for name in tensors if (v := getattr(x, name)) is not None})

    query, held = arguments
    raws = [RawTokens(x.keys.to(device, dtype), x.values.to(device, dtype)) for x in (held.sinks, held.tail)]
    counts = None if held.counts is None else held.counts.to(device)
    return query.to(device, dtype), History(side(held.keys), side(held.values), *raws, held.starts.to(device), counts)


PLACES = ["keys.scale", "keys.mean", "keys.gain", "values.scale", "values.gain", "tail.keys", "tail.values"]


def with_a_nan(place):
    """`attention_inputs` with a NaN stored for the first head in one of `PLACES`."""
    name, array = place.split(".")
    query, history = attention_inputs(conditioned=False, scale_format="e4m4" if array == "gain" else "fp16")
    part = getattr(history, name)
    held = getattr(part, array).clone()
    held[0, 0].view(-1)[-1] = torch.nan
    return query, replace(history, **{name: replace(part, **{array: held})})


def starting_at(arguments, starts):
    """`attention_inputs` whose sequences begin at other positions."""
    query, history = arguments
    return query, replace(history, starts=torch.tensor(starts))


def in_buffers(arguments, capacity, ring=96):
    """The same call as whole buffers: `capacity` tiles, those behind the used ones and idle ring slots poisoned."""
    query, history = arguments
    keys, values, tail = history.keys, history.values, history.tail
    tiles, tile, count = keys.codes.shape[2], keys.scale.shape[-1], tail.keys.shape[2]

    def grown(x):
        poison = torch.nan if x.is_floating_point() else 255
        return torch.cat([x, torch.full_like(x[:, :, :1], poison).expand(-1, -1, capacity - tiles, *x.shape[3:])], 2)

    def side(x):
        means = {} if x.mean is None else {"mean": grown(x.mean)}
        return replace(x, codes=grown(x.codes), scale=grown(x.scale), **means)

    slots = (tiles * tile + torch.arange(count)) % ring
    raws = []
    for x in (tail.keys, tail.values):
        buffer = torch.full((*x.shape[:2], ring, x.shape[3]), torch.nan)
        buffer[:, :, slots] = x
        raws.append(buffer)
    counts = torch.tensor([tiles, tiles * tile + count], dtype=torch.int32)
    held = {"keys": side(keys), "values": side(values), "tail": RawTokens(*raws), "counts": counts}
    return query, replace(history, **held)


CHANNEL_GROUPS = {
    "d80-4-2-1": (80, groups_of((10, 4), (50, 2), (20, 1)), groups_of((80, 3))),
    "d96-5-3": (96, groups_of((48, 5), (48, 3)), groups_of((24, 3), (72, 2))),
    "d128-4-2": (128, groups_of((64, 4), (64, 2)), groups_of((128, 2))),
    "d64-uniform8": (64, groups_of((64, 8), make=uniform), groups_of((32, 4), (32, 4))),
    "d16": (16, groups_of((16, 4)), groups_of((16, 4))),
}
SHAPES = {
    "no-tiles": {"tiles": 0},
    "no-tail": {"tail": 0, "queries": 2},
    "no-sinks": {"sinks": 0},
    "tiles-only": {"tail": 0, "sinks": 0},
    "long-tail": {"tail": 290, "tiles": 1},
    "many-sinks": {"sinks": 40, "tiles": 2},
    "tile-16": {"tile": 16, "tiles": 7},
    "tile-24": {"tile": 24, "tiles": 2},
    "tile-128": {"tile": 128, "tiles": 1, "keys": groups_of((64, 3)), "values": groups_of((64, 3))},
    "strided": {"spare": 3},
    "value-mean": {"value_mean": True},
    "one-byte-scales": {"scale_format": "e4m4"},
    "fine-one-byte-scales": {"scale_format": "e3m5", "conditioned": False},
}
