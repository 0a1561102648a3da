"""The CUDA C++ kernels of decode.cu, compiled at run time by NVRTC: the fast path on NVIDIA cards from sm_80 on."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from pathlib import Path
from threading import Lock

import torch

from turboquant_hf.kernels.codes import SCALE_FORMATS, CodeGroup
from turboquant_hf.kernels.decode.reference import PackedSide, RawTokens
from turboquant_hf.primitives import packed_size

TILE = 128
MAX_ROWS = 8
SLOTS = 2
"""Parts of a tile (its keys, its values) that a warp has in shared memory: one at work, one on its way."""
RAW_TOKENS = 8
"""Sinks and tail tokens that one warp reads."""
HEAD_DIMS = (64, 96, 128, 256)


def available() -> str | None:
    """None where kernels can be compiled and run, else the reason why not."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip:
        return "ROCm: the kernels use NVIDIA's matrix instructions"
    if torch.cuda.get_device_capability() < (8, 0):
        return "compute capability below 8.0"
    if not hasattr(torch.cuda, "_compile_kernel"):
        return f"torch {torch.__version__} has no torch.cuda._compile_kernel (2.9 and newer do)"
    return None


def supports(
    query: torch.Tensor, keys: PackedSide, values: PackedSide, tail: RawTokens, s_aux: torch.Tensor | None = None
) -> str | None:
    """None where `decode_attention` can serve this call, else the reason why not."""
    dim = query.shape[-1]
    rows = query.shape[1] // keys.codes.shape[1] * query.shape[2]
    checks = (
        (query.is_cuda, "the query is not on a CUDA device"),
        (query.dtype in (torch.float16, torch.bfloat16), f"dtype {query.dtype}"),
        (query.dtype == tail.keys.dtype == tail.values.dtype, "query and cache differ in dtype"),
        (dim in HEAD_DIMS and tail.values.shape[-1] == dim, f"head dim {dim}"),
        (rows <= MAX_ROWS, f"{rows} query rows a KV head, more than {MAX_ROWS}"),
        (keys.scale.shape[-1] == TILE, f"tiles of {keys.scale.shape[-1]} tokens"),
        (query.shape[2] <= tail.keys.shape[2], "new tokens outside the tail"),
        (values.order is None and values.balance is None and values.mean is None, "conditioned values"),
        (len(values.groups) == 1, "grouped values"),
        (all(_row_fits(group.size, group) for group in keys.groups), "key groups too narrow or without polynomial"),
        (_row_fits(TILE, values.groups[0]), "a value codebook without polynomial"),
        (keys.rotation.dim() == 2 or keys.rotation.shape[0] == 1, "a rotation for each sequence"),
    )
    reason = next((reason for fine, reason in checks if not fine), None)
    if reason is None and not _warps(dim, _described(keys), values.groups[0].bits, keys.mean is not None, query.device):
        return "too little shared memory for two tiles"
    return reason


def _described(keys: PackedSide) -> tuple[tuple[int, int, tuple[float, ...]], ...]:
    return tuple((group.size, group.bits, group.codebook.coefficients) for group in keys.groups)


def _row_fits(size: int, group: CodeGroup) -> bool:
    main = max(width for width in (1, 2, 4, 8) if width <= group.bits)
    extra = group.bits - main
    return (
        size % 16 == 0
        and size * main // 32 >= 2
        and (size * main // 32) % 4 in (0, 2)
        and (size * main // 32 == 2 or size * main // 32 % 4 == 0)
        and (extra == 0 or main // extra in (1, 2, 4))
        and group.bits != 7
        and 1 <= len(group.codebook.coefficients) <= 3
    )


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
    splits: int = 0,
) -> torch.Tensor:
    """`reference.decode_attention` in two launches; `supports` says for which arguments.

    splits: how many blocks share a head's tiles; 0 chooses by the card.
    """
    batch, query_heads, count, dim = query.shape
    heads, tiles = keys.codes.shape[1:3]
    rows = query_heads // heads * count
    split_kernel, merge_kernel, warps = _kernels(
        dim,
        _described(keys),
        (values.groups[0].bits, values.groups[0].codebook.coefficients),
        keys.scale_format,
        values.scale_format,
        query.dtype == torch.bfloat16,
        keys.mean is not None,
        mask is not None,
        softcap is not None,
        rows,
        query.device,
    )
    if not splits:
        sms = _multiprocessors(query.device)
        splits = max(1, min(sms // (batch * heads), -(-tiles // warps)))
    raw_splits = max(1, -(-(sinks.keys.shape[2] + tail.keys.shape[2]) // (RAW_TOKENS * warps)))
    splits = (splits if tiles else 0) + raw_splits
    query = query.contiguous()
    part_output = query.new_empty((batch * heads, splits, rows, dim), dtype=torch.float32)
    part_sums = query.new_empty((batch * heads, splits, rows, 2), dtype=torch.float32)
    result = torch.empty_like(query)
    rotation = keys.rotation.reshape(-1, dim, dim)
    sink_keys, sink_values = sinks.keys.contiguous(), sinks.values.contiguous()
    split_kernel(
        (splits, batch * heads),
        (
            query, _transposed(keys.rotation), keys.order, keys.balance, keys.gain,
            keys.codes, keys.scale, keys.mean, values.codes, values.scale,
            sink_keys, sink_values, tail.keys, tail.values, starts, mask, part_output, part_sums,
        ),
        (
            heads, rows, count, tiles, _capacity(keys.codes), sink_keys.shape[2], tail.keys.shape[2],
            tail.keys.stride(1) // dim, dim * dim if rotation.shape[0] > 1 else 0,
            0 if mask is None else mask.stride(0), raw_splits, _float_bits(scaling), _float_bits(softcap or 0.0),
        ),
    )  # fmt: skip
    value_rotation = values.rotation.reshape(-1, dim, dim)
    merge_kernel(
        (rows, batch * heads),
        (part_output, part_sums, value_rotation, values.gain, None if s_aux is None else s_aux.float(), result),
        (heads, rows, count, splits, raw_splits, dim * dim if value_rotation.shape[0] > 1 else 0),
    )
    return result


class _Launcher:
    """Launches one compiled kernel; its argument block is built once, because a decode step is bound by launches."""

    def __init__(self, kernel, pointers: int, integers: int, threads: int, shared: int = 0) -> None:
        self._kernel, self._threads, self._shared = kernel, threads, shared
        self._pointers = (ctypes.c_uint64 * pointers)()
        self._integers = (ctypes.c_int * integers)()
        addresses = [ctypes.addressof(self._pointers) + 8 * i for i in range(pointers)]
        addresses += [ctypes.addressof(self._integers) + 4 * i for i in range(integers)]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)
        self._launch = torch.cuda._utils._get_gpu_runtime_library().cuLaunchKernel
        self._lock = Lock()

    def __call__(self, grid: tuple[int, int], tensors: tuple, integers: tuple[int, ...]) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        with self._lock:  # the driver copies the arguments before it returns
            self._pointers[:] = [0 if x is None else x.data_ptr() for x in tensors]
            self._integers[:] = integers
            status = self._launch(
                self._kernel.func, *grid, 1, self._threads, 1, 1, self._shared,
                ctypes.c_void_p(stream), self._arguments, None,
            )  # fmt: skip
        if status:
            raise RuntimeError(f"cuLaunchKernel failed with error {status} (grid {grid}, {self._threads} threads)")


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_TRANSPOSED: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def _transposed(rotation: torch.Tensor) -> torch.Tensor:
    """The transpose of a shared rotation, made once: rotations live as long as the process."""
    kept = _TRANSPOSED.get(id(rotation))
    if kept is None or kept[0] is not rotation:
        kept = _TRANSPOSED[id(rotation)] = (rotation, rotation.transpose(-1, -2).contiguous())
    return kept[1]


def _capacity(codes: torch.Tensor) -> int:
    """Tiles a head has room for: `codes` may be the filled part of a larger array."""
    return codes.stride(1) // codes.shape[-1] if codes.shape[2] else 0


def _float_bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


def _half2_bits(x: float) -> str:
    bits = struct.unpack("<H", struct.pack("<e", x))[0]
    return f"0x{bits << 16 | bits:08X}u"


def source(
    dim: int,
    key_groups: tuple[tuple[int, int, tuple[float, ...]], ...],
    value_group: tuple[int, tuple[float, ...]],
    key_format: str = "fp16",
    value_format: str = "fp16",
    bf16: bool = False,
    has_mean: bool = True,
    masked: bool = False,
    softcap: bool = False,
    rows: int = MAX_ROWS,
    warps: int = 8,
    slots: int = SLOTS,
) -> str:
    """The text that is compiled: constants of one layer shape, then decode.cu."""
    sizes = [size for size, _, _ in key_groups]
    widths = [bits for _, bits, _ in key_groups]
    row_bytes = [packed_size(size, bits) for size, bits, _ in key_groups]
    leads, terms, c3, c5 = zip(*(_normalised(bits, odd) for _, bits, odd in key_groups), strict=True)
    v_lead, v_terms, v_c3, v_c5 = _normalised(*value_group)
    key_shift, key_unit = SCALE_FORMATS[key_format]
    value_shift, value_unit = SCALE_FORMATS[value_format]

    def array(kind: str, name: str, items) -> str:
        return f"__device__ constexpr {kind} {name}[] = {{{', '.join(map(str, items))}}};"

    lines = [
        f"#define RAW_BF16 {int(bf16)}",
        f"#define HAS_MEAN {int(has_mean)}",
        f"#define MASKED {int(masked)}",
        f"#define SOFTCAP {int(softcap)}",
        f"constexpr int D = {dim}, WARPS = {warps}, SLOTS = {slots}, ROWS = {rows};",
        f"constexpr int KEY_GROUPS = {len(sizes)}, KEY_ROW_BYTES = {sum(row_bytes)};",
        f"constexpr int KEY_FORMAT = {key_shift}, VALUE_FORMAT = {value_shift};",
        array("int", "KEY_SIZE", sizes),
        array("int", "KEY_BITS", widths),
        array("int", "KEY_TERMS", terms),
        array("int", "KEY_OFFSET", [sum(row_bytes[:i]) for i in range(len(row_bytes))]),
        array("unsigned int", "KEY_C3", c3),
        array("unsigned int", "KEY_C5", c5),
        array("float", "KEY_LEAD", [f"{lead * key_unit!r}f" for lead in leads]),
        f"constexpr int VALUE_BITS = {value_group[0]}, VALUE_TERMS = {v_terms};",
        f"constexpr unsigned int VALUE_C3 = {v_c3}, VALUE_C5 = {v_c5};",
        f"constexpr float VALUE_LEAD = {v_lead * value_unit!r}f;",
        f"constexpr int SHARED_BYTES = "
        f"{shared_bytes(dim, key_groups, value_group[0], has_mean, warps, slots)};",
    ]
    return "\n".join(lines) + "\n" + Path(__file__).with_name("decode.cu").read_text()


def shared_bytes(dim, key_groups, value_bits, has_mean, warps, slots) -> int:
    """Size of decode.cu's `Shared`."""

    def staged(size: int, bits: int) -> int:
        main = max(width for width in (1, 2, 4, 8) if width <= bits)
        return 32 * max(size * main // 32, 4) * (2 if bits > main else 1)

    keys = 16 * sum(staged(size, bits) for size, bits, _ in key_groups) + 8 * len(key_groups) * 128
    keys += 128 * (-(-dim // 64)) if has_mean else 0
    values = 2 * (dim // 16) * staged(TILE, value_bits) + 8 * 128
    head = 4 * 8 * dim + 2 * 8 * (dim + 8) + 2 * 4 * warps * 8
    body = max(4 * 8 * dim, 4 * warps * 8 * (dim + 1), warps * slots * max(keys, values))
    return -(-(-(-head // 16) * 16 + body) // 16) * 16


def _normalised(bits: int, coefficients: tuple[float, ...]) -> tuple[float, int, str, str]:
    """(leading coefficient, terms, the next two divided by it as half2), for the centred code / 2^(bits - 1).

    In that unit, within (-2, 2), the coefficients are far from the smallest halves.
    """
    unit = 2.0 ** (bits - 1)
    a, b, c = (x * unit ** (2 * i + 1) for i, x in enumerate((*coefficients, 0.0, 0.0)[:3]))
    return a, len(coefficients), _half2_bits(b / a), _half2_bits(c / a)


@lru_cache(maxsize=256)
def _warps(dim: int, key_groups: tuple, value_bits: int, has_mean: bool, device: torch.device) -> int:
    """Warps a block (one block a multiprocessor): as many as shared memory holds slots for, at most 8; 0 for none.

    Measured at 131,072 tokens: 8 warps 92 us, 10 warps 110 us, two blocks of 4 warps 117 us.
    """
    limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 * 1024)
    fitting = (w for w in range(8, 1, -1) if shared_bytes(dim, key_groups, value_bits, has_mean, w, SLOTS) <= limit)
    return next(fitting, 0)


@lru_cache(maxsize=64)
def _kernels(dim, key_groups, value_group, key_format, value_format, bf16, has_mean, masked, softcap, rows, device):
    warps = _warps(dim, key_groups, value_group[0], has_mean, device)
    text = source(
        dim, key_groups, value_group, key_format, value_format, bf16, has_mean, masked, softcap, rows, warps
    )
    options = ["--std=c++20", "--use_fast_math", "-default-device"]
    with torch.cuda.device(device):
        split = torch.cuda._compile_kernel(text, "decode_split", nvcc_options=options)
        merge = torch.cuda._compile_kernel(text, "decode_merge", nvcc_options=options)
        shared = shared_bytes(dim, key_groups, value_group[0], has_mean, warps, SLOTS)
        if shared > 48 * 1024:
            split.set_shared_memory_config(shared)
    launchers = _Launcher(split, 18, 13, warps * 32, shared), _Launcher(merge, 6, 6, dim)
    return *launchers, warps
