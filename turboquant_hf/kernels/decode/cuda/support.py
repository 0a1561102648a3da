"""Which calls the CUDA C++ kernel serves, and the `Shape` of the kernel that serves a call."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.decode.cuda import geometry, kernel
from turboquant_hf.kernels.decode.cuda.source import TILE, Shape, main_width, piece_size, row_layout
from turboquant_hf.kernels.decode.inputs import History, PackedSide, Scoring
from turboquant_hf.primitives.addends import SUM_BITS, addends

HEAD_DIMS = (64, 96, 128, 256)
BITS = (1, 2, 3, 4, 5, 8)
"""Widths of key codes in rows. Value codes in rows have at least 2 bits."""
WORD_BITS = 5
"""The widest codes in words."""


def available() -> str | None:
    """None where kernels can be compiled and run, else the reason why not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip:
        return "ROCm: the kernels use NVIDIA's matrix instructions"
    if torch.cuda.get_device_capability() < (8, 0):
        return "compute capability below 8.0"
    utils = getattr(torch.cuda, "_utils", None)
    launcher = getattr(getattr(utils, "_CudaKernel", None), "set_shared_memory_config", None)
    if not (
        hasattr(utils, "_nvrtc_compile")
        and hasattr(utils, "_cuda_load_module")
        and hasattr(utils, "_get_gpu_runtime_library")
        and launcher
    ):
        return f"torch {torch.__version__} cannot compile and launch kernels (2.10 and newer can)"
    return None


def supports(query: torch.Tensor, history: History, scoring: Scoring, *, masked: bool = False) -> str | None:
    """None where `decode_attention` can serve this call, else the reason why not. Compiles the kernel."""
    keys, values, tail, dim = history.keys, history.values, history.tail, query.shape[-1]
    checks = (
        (query.is_cuda, "the query is not on a CUDA device"),
        (query.dtype in (torch.float16, torch.bfloat16), f"dtype {query.dtype}"),
        (query.dtype == tail.keys.dtype == tail.values.dtype, "query and cache differ in dtype"),
        (dim in HEAD_DIMS and tail.values.shape[-1] == dim, f"head dim {dim}"),
        (keys.scale.shape[-1] == TILE, f"tiles of {keys.scale.shape[-1]} tokens"),
        (query.shape[2] <= tail.keys.shape[2], "new tokens outside the tail"),
        (max(geometry.grid(query, keys)) <= geometry.MAX_GRID, "more blocks than a launch can have"),
        (values.order is None and values.balance is None and values.mean is None, "conditioned values"),
        (len(values.groups) == 1, "grouped values"),
        (all(x.for_kernels for x in (*keys.groups, *values.groups)), "a trellis of other than 16 states"),
        (
            all(row_fits(x.size, x) for x in keys.groups),
            "key groups of no whole units (16 channels), or levels off a grid",
        ),
        (all(narrow(x) for x in (*keys.groups, *values.groups)), "a trellis of more than 5 bits"),
        (begin_at_words(keys.groups), "key groups that do not begin at whole words"),
        (owns_tokens(keys.groups, values.groups[0]), "keys of a trellis beside values without one"),
        (values_fit(values.groups[0]), "value levels off a grid, or of 1 bit in rows"),
        (keys.rotation.dim() == 2 or keys.rotation.shape[0] == 1, "a rotation per sequence"),
        (keys.mean is None or keys.mean.dtype == torch.float16, "means that float16 cannot hold"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    return reason or kernel.failure(shape_of(query, keys, values, scoring, masked), query.device)


def row_fits(size: int, group: CodeGroup) -> bool:
    """Whether the kernel can read rows of `size` codes of a group: whole units of 16 codes, and levels that are bytes.

    In a group of a trellis, words are made of `size` codes, and 32 or 64 levels must be sums of two bytes.
    """
    if size % 16 or group.bits not in BITS or not group.codebook.unit:
        return False
    steps = group.codebook.steps
    fits = max(steps) < (128 if group.bits == 8 else 64) and steps[0] == -steps[-1] - 1
    if group.in_words:
        return fits and (group.bits not in SUM_BITS or addends(steps) is not None)
    return fits and size * main_width(group.bits) % 32 == 0


def narrow(group: CodeGroup) -> bool:
    """Whether a table holds the levels: a trellis must have at most 5 bits."""
    return group.bits <= WORD_BITS or not group.in_words


def values_fit(group: CodeGroup) -> bool:
    """Whether the kernel can read a group of values: one channel's tokens make a row."""
    return row_fits(TILE, group) and (group.bits > 1 or group.in_words)


def owns_tokens(keys: tuple[CodeGroup, ...], values: CodeGroup) -> bool:
    """Whether a lane multiplies the tokens in its words of keys: words of values must give it the same tokens."""
    return values.in_words or not any(group.in_words for group in keys)


def begin_at_words(groups: tuple[CodeGroup, ...]) -> bool:
    """Whether lane parts of whole 32-bit words begin at multiples of 4 bytes in every row."""
    groups = tuple(group for group in groups if not group.in_words)
    offsets, row = row_layout((group.size, group.bits) for group in groups)
    whole = [piece_size(group.size, group.bits) % 4 == 0 for group in groups]
    return not any(words and (offset % 4 or row % 4) for words, offset in zip(whole, offsets, strict=True))


@lru_cache(maxsize=256)
def described(groups: tuple[CodeGroup, ...]) -> tuple[tuple[int, int, float, tuple[int, ...]], ...]:
    """Groups in the form that `Shape` has."""
    return tuple((group.size, group.bits, group.codebook.unit, group.codebook.steps) for group in groups)


def shape_of(
    query: torch.Tensor, keys: PackedSide, values: PackedSide, scoring: Scoring, masked: bool = False
) -> Shape:
    """What the kernel is compiled for to serve this call."""
    return Shape(
        query.shape[-1],
        described(keys.groups),
        described(values.groups)[0],
        keys.scale_format,
        values.scale_format,
        query.dtype == torch.bfloat16,
        keys.mean is not None,
        masked,
        scoring.softcap is not None,
        scoring.sparse_v_threshold > 0.0,
        geometry.is_wide(query, keys),
        _by_signs(keys) and _by_signs(values),
    )


def _by_signs(side: PackedSide) -> bool:
    """Whether the kernel can rotate by signs and additions.

    Each group must begin at a multiple of its size, and none may end inside the channels of a lane.
    """
    ends = list(itertools.accumulate(group.size for group in side.groups))
    begin_right = all(end % group.size == 0 for end, group in zip(ends, side.groups, strict=True))
    return side.signs is not None and begin_right and all(end * 32 % ends[-1] == 0 for end in ends)
