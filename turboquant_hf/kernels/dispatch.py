"""Which implementation serves a call: Triton or CUDA C++ on a CUDA device, plain torch elsewhere.

TURBOQUANT_BACKEND = auto | torch | triton | cuda decides for the process; auto takes the fastest that supports the
call. Neither Triton nor a compiler is touched before the first call that wants it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from turboquant_hf.kernels.codes import CodeGroup
from turboquant_hf.kernels.decode import cpu as decode_cpu
from turboquant_hf.kernels.decode import reference as decode_reference
from turboquant_hf.kernels.decode.reference import PackedSide, RawTokens
from turboquant_hf.kernels.encode import reference as encode_reference
from turboquant_hf.kernels.statistics import due as statistics_due
from turboquant_hf.kernels.statistics import reference as statistics_reference

BACKENDS = ("auto", "torch", "triton", "cuda")
VARIABLE = "TURBOQUANT_BACKEND"
MIN_TRITON = (3, 4)


def backend(device: torch.device | str | None = None) -> str:
    """The backend for tensors on `device` (default: a CUDA device where there is one): "torch", "triton" or "cuda".

    Raises: ValueError for an unknown name in TURBOQUANT_BACKEND; RuntimeError, with the reason, where the one it
        names is not available.
    """
    name = os.environ.get(VARIABLE, "auto").lower()
    if name not in BACKENDS:
        raise ValueError(f"{VARIABLE}={name!r} is not supported; allowed: {', '.join(BACKENDS)}")
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "torch" or (name == "auto" and kind != "cuda"):
        return "torch"
    if name == "auto":
        return "torch" if unavailable("triton", kind) else "triton"
    reason = unavailable(name, kind)
    if reason:
        raise RuntimeError(f"{VARIABLE}={name}: {reason}")
    return name


def unavailable(name: str, kind: str) -> str | None:
    """Why backend "triton" or "cuda" cannot serve tensors on a device of this kind, or None where it can."""
    if name == "triton":
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"tensors are on {kind!r}, and Triton kernels run on a CPU only with TRITON_INTERPRET=1"
        return _triton_missing()
    if kind != "cuda":
        return f"tensors are on {kind!r}; allowed: 'cuda'"
    return _cuda_module()[1]


@lru_cache(maxsize=1)
def _triton_missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        return f"triton {triton.__version__} is too old; allowed: {'.'.join(map(str, MIN_TRITON))} and later"
    return None


@lru_cache(maxsize=1)
def _cuda_module() -> tuple[ModuleType | None, str | None]:
    """The CUDA C++ decode kernels, or why there are none."""
    name = "turboquant_hf.kernels.decode.cuda"
    if find_spec(name) is None:
        return None, "this build has no CUDA C++ kernels"
    try:
        module = import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the CUDA C++ kernels cannot be loaded ({error})"
    reason = module.available()
    return (module, None) if reason is None else (None, reason)


def on_device(device: torch.device) -> AbstractContextManager:
    """Make a CUDA device the current one: kernels are launched on that, wherever their tensors are."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


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
) -> torch.Tensor:
    """`decode.reference.decode_attention` by the chosen backend.

    CUDA C++ covers part of what Triton does: with "auto" it is asked first, with "cuda" it must support the call.

    Args:
        sparse_v_threshold: see `decode_attention` of the backends.
        workspace: from `decode_workspace`, for calls that are recorded in CUDA graphs; of no use to other backends.
    """
    chosen = backend(query.device)
    arguments = (query, keys, values, sinks, tail, starts)
    options = {
        "scaling": scaling, "mask": mask, "softcap": softcap, "s_aux": s_aux, "sparse_v_threshold": sparse_v_threshold
    }  # fmt: skip
    if counts is not None:
        options["counts"] = counts
    automatic = os.environ.get(VARIABLE, "auto").lower() == "auto"
    if query.device.type == "cuda" and (chosen == "cuda" or automatic):
        module, _ = _cuda_module()
        known = {"masked": mask is not None, "softcap": softcap, "sparse_v_threshold": sparse_v_threshold}
        reason = "not loaded" if module is None else module.supports(query, keys, values, tail, **known)
        if reason is None:
            with on_device(query.device):
                return module.decode_attention(*arguments, **options, workspace=workspace)
        if chosen == "cuda":
            raise RuntimeError(f"{VARIABLE}=cuda does not support this call: {reason}")
    if chosen == "torch":
        module = decode_cpu if query.device.type == "cpu" else decode_reference
        return module.decode_attention(*arguments, **options)
    module = import_module("turboquant_hf.kernels.decode.triton")
    with on_device(query.device):
        return module.decode_attention(*arguments, **options)


def prepared_decode(
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
):
    """`decode_attention` for steps that differ in query, tokens and mask alone: a `decode.cuda.Step`, or None where the
    backend that serves the call has no such thing. The arrays are the whole ones, spare room included.
    """
    name = os.environ.get(VARIABLE, "auto").lower()
    if query.device.type != "cuda" or name not in ("auto", "cuda") or backend(query.device) == "torch":
        return None
    module, _ = _cuda_module()
    known = {"masked": masked, "softcap": softcap, "sparse_v_threshold": sparse_v_threshold}
    if module is None or module.supports(query, keys, values, tail, **known) is not None:
        return None
    with on_device(query.device):
        return module.Step(query, keys, values, sinks, tail, starts, scaling=scaling, s_aux=s_aux, **known)


def decode_workspace(batch_heads: int, rows: int, dim: int, device: torch.device) -> torch.Tensor:
    """Memory (int32) that `decode_attention` may use for up to `rows` query rows of each of `batch_heads` KV heads."""
    words = 1
    if device.type == "cuda" and backend(device) != "torch" and _cuda_module()[0] is not None:
        words = _cuda_module()[0].largest_workspace(batch_heads, rows, dim, device)
    return torch.zeros(words, dtype=torch.int32, device=device)


def unread_tiles() -> int:
    """Tiles whose values sparse V left unread since this was asked last: of the CUDA C++ kernels, which alone count.

    A tile counts for each KV head and each eight of its query rows. Raises: RuntimeError where there are none.
    """
    module, reason = _cuda_module()
    if module is None:
        raise RuntimeError(f"only CUDA C++ kernels count tiles left unread: {reason}")
    return module.unread_tiles()


def append_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    ring: RawTokens,
    sinks: RawTokens,
    starts: torch.Tensor,
    counts: torch.Tensor,
    ticket: torch.Tensor,
    max_len: int,
) -> None:
    """`append.reference.append_tokens` by the chosen backend."""
    plain = backend(keys.device) == "torch"
    module = import_module(f"turboquant_hf.kernels.append.{'reference' if plain else 'triton'}")
    with on_device(keys.device):
        module.append_tokens(keys, values, ring, sinks, starts, counts, ticket, max_len)


def tile_mean(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """`encode.reference.tile_mean` by the chosen backend."""
    with on_device(x.device):
        return _encoder(x.device).tile_mean(x, weight)


def encode_tiles(
    x: torch.Tensor,
    transform: torch.Tensor,
    groups: tuple[CodeGroup, ...],
    *,
    scale_rule: str,
    scale_format: str = "fp16",
    gain: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    balance: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    center: bool = False,
    weight: torch.Tensor | None = None,
    channel_major: bool = False,
    out: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """`encode.reference.encode_tiles` by the chosen backend."""
    with on_device(x.device):
        return _encoder(x.device).encode_tiles(
            x,
            transform,
            groups,
            scale_rule=scale_rule,
            scale_format=scale_format,
            gain=gain,
            order=order,
            balance=balance,
            mean=mean,
            center=center,
            weight=weight,
            channel_major=channel_major,
            out=out,
        )


def decode_tiles(
    packed: dict[str, torch.Tensor],
    inverse: torch.Tensor,
    groups: tuple[CodeGroup, ...],
    *,
    scale_format: str = "fp16",
    gain: torch.Tensor | None = None,
    channel_major: bool = False,
) -> torch.Tensor:
    """`encode.reference.decode_tiles` by the chosen backend."""
    device = packed["codes"].device
    with on_device(device):
        return _encoder(device).decode_tiles(
            packed, inverse, groups, scale_format=scale_format, gain=gain, channel_major=channel_major
        )


def bad_heads(fresh: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """`encode.reference.bad_heads` by the chosen backend."""
    with on_device(weight.device):
        return _encoder(weight.device).bad_heads(fresh, weight)


def tile_energy(x: torch.Tensor, weight: torch.Tensor, center: bool) -> torch.Tensor:
    """`statistics.reference.tile_energy` by the chosen backend."""
    with on_device(x.device):
        return _statistics(x.device).tile_energy(x, weight, center)


def query_energy(
    query: torch.Tensor, heads: int, starts: torch.Tensor, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`statistics.reference.query_energy` by the chosen backend."""
    with on_device(query.device):
        return _statistics(query.device).query_energy(query, heads, starts, position)


def balance_channels(
    energy: torch.Tensor, count: torch.Tensor, query_rms: torch.Tensor | None, sizes: tuple[int, ...], balance: str
) -> dict[str, torch.Tensor]:
    """`statistics.reference.balance_channels` by the chosen backend."""
    with on_device(energy.device):
        return _statistics(energy.device).balance_channels(energy, count, query_rms, sizes, balance)


def encode_due(ring: torch.Tensor, *arguments: Any, **options: Any) -> None:
    """`encode.reference.encode_due` by the chosen backend."""
    with on_device(ring.device):
        _encoder(ring.device).encode_due(ring, *arguments, **options)


def observe_due(query: torch.Tensor, *arguments: torch.Tensor) -> None:
    """`statistics.due.observe_due` by the chosen backend."""
    with on_device(query.device):
        _due(query.device).observe_due(query, *arguments)


def fit_due(keys: torch.Tensor, *arguments: torch.Tensor, **options: Any) -> None:
    """`statistics.due.fit_due` by the chosen backend."""
    with on_device(keys.device):
        _due(keys.device).fit_due(keys, *arguments, **options)


def advance_due(counts: torch.Tensor, fitted: torch.Tensor, **options: int) -> None:
    """`statistics.due.advance_due` by the chosen backend."""
    with on_device(counts.device):
        _due(counts.device).advance_due(counts, fitted, **options)


def _statistics(device: torch.device) -> ModuleType:
    if backend(device) == "torch":
        return statistics_reference
    return import_module("turboquant_hf.kernels.statistics.triton")


def _due(device: torch.device) -> ModuleType:
    if backend(device) == "torch":
        return statistics_due
    return import_module("turboquant_hf.kernels.statistics.due_triton")


def _encoder(device: torch.device) -> ModuleType:
    """The encode module; the "cuda" backend is for decode only and leaves this to Triton."""
    if backend(device) == "torch":
        return encode_reference
    return import_module("turboquant_hf.kernels.encode.triton")
