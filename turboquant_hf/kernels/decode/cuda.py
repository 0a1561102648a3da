"""The CUDA C++ kernel of decode.cu, compiled at run time by NVRTC: the fast path on NVIDIA cards from sm_80 on."""

from __future__ import annotations

import itertools
import math
import struct
import threading
import warnings
from functools import lru_cache

import torch

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.decode.built import load_kernel
from turboquant_hf.kernels.decode.launch import Arguments, Launcher
from turboquant_hf.kernels.decode.reference import PackedSide, RawTokens
from turboquant_hf.kernels.decode.source import (
    ARRIVALS,
    TILE,
    Shape,
    block_rows,
    main_width,
    max_warps,
    most_warps,
    piece_size,
    row_layout,
    shared_bytes,
    source_text,
)
from turboquant_hf.primitives.memo import once, once_per_tensor

COMPILER_OPTIONS = ["--std=c++20", "--use_fast_math", "-default-device"]
HEAD_DIMS = (64, 96, 128, 256)
BITS = (1, 2, 3, 4, 5, 8)
"""Of keys; values have at least 2."""
MAX_ROWS = block_rows(wide=True)
MAX_SPLITS = 64
MAX_GRID = 65535
"""Blocks in the second and third direction of a launch."""


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


def supports(
    query: torch.Tensor,
    keys: PackedSide,
    values: PackedSide,
    tail: RawTokens,
    *,
    masked: bool = False,
    softcap: float | None = None,
    sparse_v_threshold: float = 0.0,
) -> str | None:
    """None where `decode_attention` can serve this call, else the reason why not. Compiles the kernel."""
    dim = query.shape[-1]
    checks = (
        (query.is_cuda, "the query is not on a CUDA device"),
        (query.dtype in (torch.float16, torch.bfloat16), f"dtype {query.dtype}"),
        (query.dtype == tail.keys.dtype == tail.values.dtype, "query and cache differ in dtype"),
        (dim in HEAD_DIMS and tail.values.shape[-1] == dim, f"head dim {dim}"),
        (keys.scale.shape[-1] == TILE, f"tiles of {keys.scale.shape[-1]} tokens"),
        (query.shape[2] <= tail.keys.shape[2], "new tokens outside the tail"),
        (max(_grid(query, keys)) <= MAX_GRID, "more blocks than a launch can have"),
        (values.order is None and values.balance is None and values.mean is None, "conditioned values"),
        (len(values.groups) == 1, "grouped values"),
        (all(_row_fits(x.size, x) for x in keys.groups), "key groups of broken units, or levels off a grid"),
        (all(group.size * 32 % dim == 0 for group in keys.groups), "key groups that end inside a lane's channels"),
        (_in_words(keys.groups), "key groups that do not begin at whole words"),
        (_row_fits(TILE, values.groups[0]) and values.groups[0].bits > 1, "value levels off a grid, or of 1 bit"),
        (keys.rotation.dim() == 2 or keys.rotation.shape[0] == 1, "a rotation for each sequence"),
        (keys.mean is None or keys.mean.dtype == torch.float16, "means that float16 does not hold"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    return reason or _failure(_shape(query, keys, values, masked, softcap, sparse_v_threshold), query.device)


def _row_fits(size: int, group: CodeGroup) -> bool:
    if size % 16 or group.bits not in BITS or not group.codebook.unit:
        return False
    steps = group.codebook.steps
    fits = max(steps) < (128 if group.bits == 8 else 64) and steps[0] == -steps[-1] - 1
    return fits and size * main_width(group.bits) % 32 == 0


def _in_words(groups: tuple[CodeGroup, ...]) -> bool:
    """Whether lane parts that are whole words lie at multiples of 4 in every row."""
    offsets, row = row_layout((group.size, group.bits) for group in groups)
    in_words = [piece_size(group.size, group.bits) % 4 == 0 for group in groups]
    return not any(words and (offset % 4 or row % 4) for words, offset in zip(in_words, offsets, strict=True))


@lru_cache(maxsize=256)
def _described(groups: tuple[CodeGroup, ...]) -> tuple[tuple[int, int, float, tuple[int, ...]], ...]:
    return tuple((group.size, group.bits, group.codebook.unit, group.codebook.steps) for group in groups)


def _shape(query, keys, values, masked=False, softcap=None, sparse_v_threshold=0.0) -> Shape:
    return Shape(
        query.shape[-1],
        _described(keys.groups),
        _described(values.groups)[0],
        keys.scale_format,
        values.scale_format,
        query.dtype == torch.bfloat16,
        keys.mean is not None,
        masked,
        softcap is not None,
        sparse_v_threshold > 0.0,
        _is_wide(query, keys),
        _by_signs(keys) and _by_signs(values),
    )


def _rows(query: torch.Tensor, keys: PackedSide) -> int:
    """Query rows of a KV head."""
    return query.shape[1] // keys.codes.shape[1] * query.shape[2]


def _is_wide(query: torch.Tensor, keys: PackedSide) -> bool:
    return _rows(query, keys) > block_rows(wide=False)


def _grid(query: torch.Tensor, keys: PackedSide) -> tuple[int, int]:
    """The launch's second and third direction: KV heads, and sequences times chunks of query rows."""
    chunks = -(-_rows(query, keys) // block_rows(_is_wide(query, keys)))
    return keys.codes.shape[1], query.shape[0] * chunks


def _by_signs(side: PackedSide) -> bool:
    """Whether decode.cu can rotate by signs and additions: each group begins at a multiple of its size."""
    ends = itertools.accumulate(group.size for group in side.groups)
    return side.signs is not None and all(end % group.size == 0 for end, group in zip(ends, side.groups, strict=True))


def decode_attention(
    query: torch.Tensor,
    keys: PackedSide,
    values: PackedSide,
    sinks: RawTokens,
    tail: RawTokens,
    starts: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sparse_v_threshold: float = 0.0,
    counts: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    splits: int = 0,
) -> torch.Tensor:
    """`reference.decode_attention` in one launch; `supports` says for which arguments.

    sparse_v_threshold: values of a tile are not read where all its probabilities, relative to the largest that a warp
        has seen of their row (that of the first raw tokens from the start), are below it; 0 reads all; `unread_tiles`.
    workspace: int32, zeros at first and left so where it counts blocks; see `workspace_size`. None: one of this
        module's, which grows and is shared by the calls of a stream. One that is too small is not used.
    splits: how many blocks share a head's tiles, at most 64; 0 chooses by the card.
    """
    step = Step(
        query, keys, values, sinks, tail, starts, scaling=scaling, masked=mask is not None, softcap=softcap,
        s_aux=s_aux, sparse_v_threshold=sparse_v_threshold, counts=counts, workspace=workspace, splits=splits,
    )  # fmt: skip
    return step(query.contiguous(), keys.codes.shape[2], tail.keys.shape[2], mask)


class Step:
    """`decode_attention` with all but the query, the numbers of tokens and the mask in place.

    A decode step is bound by its launches: what stays the same from one to the next is looked up once. The arrays may
    be larger than what is filled; they must stay where they are.
    """

    def __init__(
        self,
        query: torch.Tensor,
        keys: PackedSide,
        values: PackedSide,
        sinks: RawTokens,
        tail: RawTokens,
        starts: torch.Tensor,
        *,
        scaling: float,
        masked: bool = False,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        sparse_v_threshold: float = 0.0,
        counts: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
        splits: int = 0,
    ) -> None:
        batch, _, count, dim = query.shape
        heads, rows = keys.codes.shape[1], _rows(query, keys)
        self._shape = _shape(query, keys, values, masked, softcap, sparse_v_threshold)
        self._device = query.device
        self._kernel, self._warps, self._teams = _kernel(self._shape, query.device)
        self._splits = splits
        self._grid = _grid(query, keys)
        self._blocks = math.prod(self._grid)  # of each split
        counters = self._blocks * self._shape.rows
        if not 0 <= splits <= MAX_SPLITS or (splits > 1 and counters >= ARRIVALS):
            raise ValueError(
                f"splits={splits} for {counters} rows: allowed are 0 to {MAX_SPLITS}, 0 and 1 from {ARRIVALS} rows on"
            )
        self._given = workspace
        if self._shape.hadamard:
            turns, one = (keys.signs, values.signs), dim
        else:
            turns, one = (_transposed(keys.rotation), values.rotation), dim * dim
        strides = [one if turn.numel() > one else 0 for turn in turns]  # from head to head
        sink_keys, sink_values = sinks.keys.contiguous(), sinks.values.contiguous()
        self._tensors = (
            query, turns[0], keys.order, keys.balance, keys.gain, keys.codes, keys.scale, keys.mean,
            values.codes, values.scale, turns[1], values.gain, sink_keys, sink_values, tail.keys, tail.values,
            None, None, starts, None, None if s_aux is None else s_aux.float(), counts, None, None, None,
        )  # fmt: skip
        integers = (
            heads, rows, count, 0, _capacity(keys.codes), sink_keys.shape[2], 0, tail.keys.stride(1) // dim,
            tail.keys.shape[2] if counts is not None else 0, 0, *strides, 0, _float_bits(scaling),
            _float_bits(softcap or 0.0), _float_bits(math.log2(sparse_v_threshold) if sparse_v_threshold else 0.0),
        )  # fmt: skip
        self._arguments = Arguments([0 if x is None else x.data_ptr() for x in self._tensors], integers)
        self._options = self._kernel.options()
        self._tensors = (None, *self._tensors[1:])  # keep what the pointers mean alive, but not a step's query

    def __call__(
        self,
        query: torch.Tensor,
        tiles: int,
        tail: int,
        mask: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[B, Hq, Q, D] for a contiguous query of the same shape.

        tiles, tail: how many tiles and tokens of the tail are filled (with `counts`, their room).
        new: keys and values [B, H, n, D], contiguous: the tail's newest, which are written to it.
        """
        splits = self._splits or _splits(self._blocks, tiles, self._teams, _multiprocessors(self._device))
        result = torch.empty_like(query)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        workspace = self._room(self._blocks * splits, stream)
        pointers, integers = self._arguments.pointers, self._arguments.integers
        pointers[0], pointers[24] = query.data_ptr(), result.data_ptr()
        pointers[22], pointers[23] = workspace.data_ptr() + 4 * ARRIVALS, workspace.data_ptr()
        integers[3], integers[6] = tiles, tail
        if mask is not None:
            pointers[19], integers[12] = mask.data_ptr(), mask.stride(0)
        if new is None:
            integers[9] = 0
        else:
            pointers[16], pointers[17], integers[9] = new[0].data_ptr(), new[1].data_ptr(), new[0].shape[2]
        self._kernel((splits, *self._grid), self._arguments, stream, self._options)
        return result

    def _room(self, blocks: int, stream: int) -> torch.Tensor:
        words = workspace_size(blocks, self._shape, self._warps)
        if self._given is not None and self._given.numel() >= words:
            return self._given
        if torch.cuda.is_current_stream_capturing():  # a graph's memory is its own
            return _cleared(words, self._device)
        return _workspace(words, self._device, stream)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied cache has other arrays."""

    def __reduce__(self):
        return type(None), ()


def workspace_size(blocks: int, shape: Shape, warps: int) -> int:
    """Words: arrivals, every block's rows with their maxima and sums, every warp's sums over raw tokens."""
    return ARRIVALS + blocks * shape.rows * (shape.dim + 2 + warps * shape.dim)


def largest_workspace(batch_heads: int, rows: int, dim: int, device: torch.device) -> int:
    """Words that serve any call of up to `rows` query rows a KV head, however it splits its tiles."""
    blocks = max(batch_heads * -(-rows // MAX_ROWS), 4 * _multiprocessors(device))
    return ARRIVALS + blocks * MAX_ROWS * (dim + 2 + max_warps(dim) * dim)


def _cleared(words: int, device: torch.device) -> torch.Tensor:
    """A workspace: its counters are zeros, the rest is written before it is read."""
    workspace = torch.empty(words, dtype=torch.int32, device=device)
    workspace[:ARRIVALS].zero_()
    return workspace


_WORKSPACES: dict[tuple, torch.Tensor] = {}
_WORKSPACES_LOCK = threading.Lock()
MAX_WORKSPACES = 64
"""Streams with a workspace of their own; the one that came first then gives its own up. torch's pools have 32 each."""


def unread_tiles() -> int:
    """Tiles, by KV head and chunk of query rows, whose values sparse V did not read since this was asked last.

    Waits for the devices. Calls with a workspace of their own are not counted.
    """
    total = 0
    with _WORKSPACES_LOCK:
        workspaces = list(_WORKSPACES.values())
    for workspace in workspaces:
        torch.cuda.synchronize(workspace.device)
        total += int(workspace[ARRIVALS - 1])
        with torch.inference_mode():  # in which it may have been made
            workspace[ARRIVALS - 1] = 0
    return total


def _workspace(words: int, device: torch.device, stream: int) -> torch.Tensor:
    """The current stream's. A smaller one may still be launched on by another thread, which holds it until then; its
    memory was allocated on this stream, where it is used again only behind that launch.
    """
    kept = _WORKSPACES.get((device, stream))
    if kept is not None and kept.numel() >= words:
        return kept
    with _WORKSPACES_LOCK:
        kept = _WORKSPACES.get((device, stream))
        if kept is None or kept.numel() < words:
            larger = _cleared(words, device)
            if kept is not None:
                larger[ARRIVALS - 1] = kept[ARRIVALS - 1]
            kept = _WORKSPACES[device, stream] = larger
            while len(_WORKSPACES) > MAX_WORKSPACES:
                del _WORKSPACES[next(iter(_WORKSPACES))]
        return kept


@lru_cache(maxsize=1024)
def _splits(blocks: int, tiles: int, teams: int, processors: int) -> int:
    """Blocks a head so that waves of blocks are full and teams of warps have equal numbers of tiles."""

    def cost(splits: int) -> float:
        mean = tiles / (splits * teams)  # a block waits for its last team and is slowed by all of them
        tiles_of_team = (math.ceil(mean) + mean) / 2
        return -(-blocks * splits // processors) * (tiles_of_team * (1 + min(1.0, mean)) + 3) + 0.05 * splits

    most = max(1, min(MAX_SPLITS, 4 * processors // blocks, tiles))
    return min(range(1, most + 1), key=lambda splits: (cost(splits), splits))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@once_per_tensor
def _transposed(rotation: torch.Tensor) -> torch.Tensor:
    """The transpose of a shared rotation."""
    return rotation.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _capacity(codes: torch.Tensor) -> int:
    """Tiles a head has room for: `codes` may be the filled part of a larger array."""
    return codes.stride(1) // codes.shape[-1] if codes.shape[2] else 0


def _float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


@lru_cache(maxsize=256)
def _plan(shape: Shape, device: torch.device) -> int:
    """Warps of a block, of which one fills a multiprocessor; 0 where two do not fit."""
    properties = torch.cuda.get_device_properties(device)
    return most_warps(shape, getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


@once(maxsize=256)
def _failure(shape: Shape, device: torch.device) -> str | None:
    """Why there is no kernel of this shape, or None; a compiler or driver that failed is not asked again."""
    if not _plan(shape, device):
        return "too little shared memory for two tiles"
    try:
        _kernel(shape, device)
    except (AttributeError, OSError, RuntimeError) as error:
        warnings.warn(f"the CUDA C++ decode kernel cannot be compiled ({error}); Triton serves", stacklevel=2)
        return f"it cannot be compiled ({error})"
    return None


@once(maxsize=64)
def _kernel(shape: Shape, device: torch.device) -> tuple[Launcher, int, int]:
    """And how many warps a block has, in how many teams."""
    warps = _plan(shape, device)
    text = source_text(shape, warps)
    with torch.cuda.device(device):
        kernel = load_kernel(text, "decode_attention", COMPILER_OPTIONS, "decode attention (CUDA C++)")
        shared = shared_bytes(shape, warps)
        if shared > 48 * 1024:
            kernel.set_shared_memory_config(shared)
        overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
    return Launcher(kernel, warps * 32, shared, overlaps), warps, warps // shape.team
