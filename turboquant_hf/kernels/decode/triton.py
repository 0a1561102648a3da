"""Triton: attention of a few queries over packed tiles, split over the tokens and merged by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_hf.kernels.common.addresses import rows_contiguous
from turboquant_hf.kernels.common.spec import GroupSpec, padded_size, tile_spec
from turboquant_hf.kernels.common.tables import level_table
from turboquant_hf.kernels.decode.inputs import History, PackedSide, Scoring
from turboquant_hf.kernels.decode.merge import _merge_kernel
from turboquant_hf.kernels.decode.split import _split_kernel

BLOCK_RAW = 32
"""Raw tokens that a program reads at a time."""
RAW_TOKENS = 256
"""Raw tokens per program. They take about as long as a run of tiles."""
ROWS_PER_PROGRAM = 64
"""The most query rows of one KV head that a program serves."""
INTERPRETER_PROGRAMS = 6
"""Programs in the interpreter, where the number of multiprocessors is not known. They run one after the other."""


def decode_attention(
    query: torch.Tensor,
    history: History,
    scoring: Scoring,
    *,
    mask: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """Equivalent to `reference.decode_attention`, with products in half precision unless the query is float32.

    Args:
        num_splits: programs that share the tiles of a KV head; None fills the device.
        Others as in the reference.
    """
    keys, values, sinks, tail = history.keys, history.values, history.sinks, history.tail
    counts, softcap, s_aux = history.counts, scoring.softcap, scoring.s_aux
    batch, query_heads, count, dim = query.shape
    heads, tiles, tile = keys.codes.shape[1], keys.codes.shape[2], keys.scale.shape[-1]
    rows = query.reshape(batch, heads, query_heads // heads * count, dim).contiguous()
    m, value_dim = rows.shape[2], tail.values.shape[3]
    device = query.device
    single = query.dtype == torch.float32
    rotated = keys.rotate_query(rows).contiguous()
    key_spec = tile_spec(keys.groups, tile, keys.scale_format, channel_major=False, exact=single)
    value_spec = tile_spec(values.groups, tile, values.scale_format, channel_major=True, exact=single)

    block_m = min(ROWS_PER_PROGRAM, padded_size(m))
    row_blocks = triton.cdiv(m, block_m)
    if num_splits is None:
        num_splits = _fill(device) // (batch * heads * row_blocks)
    per_split = triton.cdiv(tiles, max(1, min(num_splits, tiles)))
    splits = triton.cdiv(tiles, per_split) if tiles else 0
    length = tail.keys.shape[2]
    parts = splits + max(1, triton.cdiv(length, RAW_TOKENS))
    raw_first = 0 if values.mean is not None else splits

    empty = {"dtype": torch.float32, "device": device}
    part = torch.empty((batch * heads, splits, m, value_dim), **empty)
    raw_part = torch.empty((batch * heads, parts - raw_first, m, value_dim), **empty)
    peak, total = torch.empty((2, batch * heads, parts, m), **empty)
    packed, raw = torch.empty((2, batch, heads, m, value_dim), **empty)

    packed_sides = [_inner_contiguous(side) for side in (keys, values)]
    tensors = [x for side in packed_sides for x in side]
    raws = [rows_contiguous(x) for x in (sinks.keys, sinks.values, tail.keys, tail.values)]
    none = history.starts
    mask = mask if mask is None or mask.stride(1) == 1 else mask.contiguous()
    gains = [None if side.gain is None else side.gain.contiguous() for side in (keys, values)]
    key_levels, value_levels = level_table(keys.groups, device), level_table(values.groups, device)
    _split_kernel[(batch * heads, parts, row_blocks)](
        rotated, rows, *(none if x is None else x for x in tensors), key_levels, value_levels,
        *(none if x is None else x for x in gains), *raws, history.starts,
        none if mask is None else mask.view(torch.uint8), none if counts is None else counts,
        part, raw_part, peak, total,
        *(stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3])),
        *(stride for x in raws for stride in x.stride()[:3]), 0 if mask is None else mask.stride(0),
        tiles, per_split, splits, length, RAW_TOKENS, length, m, count,
        float(scoring.scaling), float(softcap or 1.0), float(scoring.sparse_v_threshold),
        H=heads, D=dim, DV=value_dim, T=tile, S=sinks.keys.shape[2],
        KEYS=key_spec, VALUES=value_spec, KEY_GAIN=keys.gain is not None, VALUE_GAIN=values.gain is not None,
        BLOCK_M=block_m, BLOCK_T=padded_size(tile), BLOCK_R=BLOCK_RAW,
        BLOCK_D=padded_size(dim), BLOCK_DV=padded_size(value_dim), DTYPE=tl.float32 if single else tl.float16,
        RAW_DTYPE=tl.float16 if tail.keys.dtype == torch.float16 else tl.float32,
        PRECISION="ieee" if single else "tf32",
        KEY_MEAN=keys.mean is not None, VALUE_MEAN=values.mean is not None,
        MASK=mask is not None, SOFTCAP=softcap is not None, CAUSAL_TILES=counts is None and length < count,
        SPARSE=scoring.sparse_v_threshold > 0.0, COUNTS=counts is not None,
        **_launch(dim, block_m, (*key_spec.groups, *value_spec.groups)),
    )  # fmt: skip
    _merge_kernel[(batch * heads, m)](
        part, raw_part, peak, total, none if s_aux is None else s_aux.contiguous(), packed, raw,
        splits, parts, raw_first, m, count,
        H=heads, DV=value_dim, AUX=s_aux is not None, BLOCK_S=16,
        BLOCK_DV=padded_size(value_dim),
    )  # fmt: skip
    out = values.unrotate(packed).add_(raw)
    return out.reshape(batch, query_heads, count, value_dim).to(query.dtype)


def _inner_contiguous(side: PackedSide) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scale and mean with their per-tile entries contiguous; a capacity-strided view is left as it is."""
    scale = rows_contiguous(side.scale) if side.scale.stride(3) == side.scale.shape[4] else side.scale.contiguous()
    return rows_contiguous(side.codes), scale, None if side.mean is None else rows_contiguous(side.mean)


def _fill(device: torch.device) -> int:
    """How many programs keep the device busy: two per multiprocessor."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _launch(dim: int, block_m: int, groups: tuple[GroupSpec, ...]) -> dict[str, int]:
    # Pipelined loads are staged in shared memory. Those of a table look-up need more of it than an A100 has.
    return {
        "num_warps": 8 if dim > 128 or block_m > 32 else 4,
        "num_stages": 2 if all(group.coefficients for group in groups) else 1,
    }
