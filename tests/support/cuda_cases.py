"""Random inputs of the CUDA C++ decode kernels, on a GPU: codes are drawn as bytes, nothing is encoded."""

from __future__ import annotations

import torch

from turboquant_hf.kernels.codes import SCALE_FORMATS, CodeGroup, tile_bytes
from turboquant_hf.kernels.decode import PackedSide, RawTokens
from turboquant_hf.kernels.decode.cuda import support
from turboquant_hf.primitives import grid, rotation_matrix, trellis_code

TILE = 128
KEYS = {
    "k4": ((1.0, 4),),
    "k5/3": ((0.5, 5), (0.5, 3)),
    "k5/3/2": ((0.25, 5), (0.25, 3), (0.5, 2)),
    "k4/2/1": ((0.125, 4), (0.625, 2), (0.25, 1)),
    "k8": ((1.0, 8),),
    "mixed": ((0.25, 5), (0.5, 3), (0.25, 2)),  # a group that does not begin at a multiple of its size
    "w5/w3": ((0.5, "w5"), (0.5, "w3")),  # "w": along a trellis, in words
    "5/w3": ((0.5, 5), (0.5, "w3")),
    "w5/w3/w2": ((0.25, "w5"), (0.25, "w3"), (0.5, "w2")),
    "5/w3/w2": ((0.25, 5), (0.25, "w3"), (0.5, "w2")),
    "5/w3/w2 d96": ((1 / 6, 5), (1 / 3, "w3"), (0.5, "w2")),  # groups that end inside the channels of a lane
    "w4/w2 quarter": ((0.25, "w4"), (0.75, "w2")),
    "w4/w2 quarter d96": ((1 / 6, "w4"), (5 / 6, "w2")),
    "w4/w3/w2/w1": ((0.25, "w4"), (0.25, "w3"), (0.25, "w2"), (0.25, "w1")),
    "w4/w2": ((0.5, "w4"), (0.5, "w2")),
    "w3/w2": ((0.5, "w3"), (0.5, "w2")),
    "w3/w1": ((0.5, "w3"), (0.5, "w1")),
    "w4/w1/3": ((0.25, "w4"), (0.25, "w1"), (0.5, 3)),
    "w3": ((1.0, "w3"),),
}


def groups_by_share(dim: int, widths) -> tuple[CodeGroup, ...]:
    """Groups of (share of the channels, bits), where bits like "w3" are those of a trellis."""
    sizes = [(round(share * dim), bits) for share, bits in widths]
    return tuple(CodeGroup(n, trellis_code(int(b[1:]), n) if isinstance(b, str) else grid(b, n)) for n, b in sizes)


def random_side(
    heads: tuple[int, int],
    tiles: int,
    dim: int,
    groups,
    channel_major: bool,
    scale_format: str,
    kind: str = "hadamard",
    per_head: bool = False,
) -> PackedSide:
    batch, count = heads
    shape = (batch, count, tiles + 3)  # three tiles of spare capacity
    codes = torch.randint(0, 256, (*shape, tile_bytes(groups, TILE, channel_major)), dtype=torch.uint8)
    if SCALE_FORMATS[scale_format][0]:
        scale, gain = torch.randint(100, 160, (*shape, len(groups), TILE)).to(torch.uint8), torch.rand(heads) + 0.1
    else:
        scale, gain = (torch.rand(*shape, len(groups), TILE) + 0.5).half(), None
    conditioned = {}
    if not channel_major:
        conditioned = {
            "order": torch.stack([torch.randperm(dim) for _ in range(batch * count)]).view(*heads, dim).short().cuda(),
            "balance": (torch.rand(*heads, dim) + 0.5).cuda(),
            "mean": (torch.randn(*shape, dim) * 0.5).half().cuda()[:, :, :tiles],
        }
    blocks = [rotation_matrix(group.size, kind=kind, seed=index) for index, group in enumerate(groups)]
    rotation = torch.block_diag(*blocks).contiguous().cuda()
    by_signs = kind == "hadamard" and all(group.size & (group.size - 1) == 0 for group in groups)
    signs = torch.cat([block[0].sign() for block in blocks]).cuda() if by_signs else None
    gain = gain.cuda() if gain is not None else None
    if per_head:  # other signs for every head, the same matrices
        flips = (torch.randint(0, 2, (1, count, dim)) * 2.0 - 1).cuda()
        rotation, signs = rotation * flips.unsqueeze(2), None if signs is None else signs * flips
    packed = codes.cuda()[:, :, :tiles], scale.cuda()[:, :, :tiles]
    return PackedSide(*packed, groups, rotation, scale_format=scale_format, gain=gain, signs=signs, **conditioned)


def described(keys, values, dim: int):
    """What `source.Shape` says of the key groups `KEYS[keys]` and of one group of values with `values` bits."""
    sides = (groups_by_share(dim, widths) for widths in (KEYS[keys], ((1.0, values),)))
    key_groups, (value_group,) = (support.described(groups) for groups in sides)
    return key_groups, value_group


def arguments(
    keys, values, dim, rows, dtype, kind="hadamard", tiles=9, tail=77, sinks=4, batch=2, per_head=False, formats=None
):
    """query, keys, values, sinks, tail, starts of `decode_attention`; `rows` is (query heads per KV head, queries)."""
    torch.manual_seed(0)
    heads, (group, count) = (batch, 2), rows
    key_format, value_format = formats or ("fp16" if keys == "k8" else "e3m5", "e4m4")
    key_side = random_side(heads, tiles, dim, groups_by_share(dim, KEYS[keys]), False, key_format, kind, per_head)
    value_groups = groups_by_share(dim, ((1.0, values),))
    value_side = random_side(heads, tiles, dim, value_groups, True, value_format, kind, per_head)
    query = torch.randn(batch, heads[1] * group, count, dim, device="cuda", dtype=dtype)
    buffers = torch.randn(2, *heads, 160, dim, device="cuda", dtype=dtype)
    raw = RawTokens(buffers[0][:, :, :tail], buffers[1][:, :, :tail])
    sink = RawTokens(*torch.randn(2, *heads, sinks, dim, device="cuda", dtype=dtype))
    return query, key_side, value_side, sink, raw, torch.zeros(batch, dtype=torch.int64, device="cuda")


def float_inputs(given):
    query, key_side, value_side, sink, raw, starts = given
    raws = [RawTokens(x.keys.float(), x.values.float()) for x in (sink, raw)]
    return query.float(), key_side, value_side, *raws, starts
