"""The operations of `kernels`: each call goes to the backend that serves its tensors (`backends`).

A function of this file is made from its reference and has the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from turboquant_hf.kernels.append import reference as append_reference
from turboquant_hf.kernels.backends import (
    BACKENDS,
    VARIABLE,
    backend,
    cuda_module,
    is_automatic,
    on_device,
    unavailable,
)
from turboquant_hf.kernels.codes import CodeGroup, TileCoding
from turboquant_hf.kernels.decode import cpu as decode_cpu
from turboquant_hf.kernels.decode import reference as decode_reference
from turboquant_hf.kernels.decode.inputs import History, Scoring
from turboquant_hf.kernels.encode import reference as encode_reference
from turboquant_hf.kernels.statistics import reference as statistics_reference

__all__ = [
    "BACKENDS", "VARIABLE", "add_queries", "append_tokens", "backend", "balance_channels", "centred_energy",
    "decode_attention", "decode_tiles", "decode_workspace", "effective_rank", "encode_tiles", "on_device",
    "prepared_decode", "query_energy", "tile_energy", "typical_scale", "unavailable", "unread_tiles",
]  # fmt: skip


def _by_backend(
    reference: Callable[..., Any], module: str, tensor: Callable[[Any], torch.Tensor] = lambda first: first
) -> Callable[..., Any]:
    """A function that calls `reference`, or its Triton version in `module`, as the device of the call asks.

    The device is that of `tensor(first argument)`. The function's attribute `fast` is the full name of the module. The
    CUDA C++ backend has only decode attention and leaves these functions to Triton. Groups that Triton does not know
    (`CodeGroup.for_kernels`) are left to `reference`.
    """
    name, fast = reference.__name__, f"turboquant_hf.kernels.{module}"

    @wraps(reference)
    def call(first: Any, *arguments: Any, **options: Any) -> Any:
        device = tensor(first).device
        groups = [group for x in arguments if isinstance(x, TileCoding) for group in x.groups]
        plain = backend(device) == "torch" or not _known(groups)
        function = reference if plain else getattr(import_module(fast), name)
        with on_device(device):
            return function(first, *arguments, **options)

    call.fast = fast
    return call


def _known(groups: Iterable[CodeGroup]) -> bool:
    return all(group.for_kernels for group in groups)


append_tokens = _by_backend(append_reference.append_tokens, "append.triton")
encode_tiles = _by_backend(encode_reference.encode_tiles, "encode.triton")
decode_tiles = _by_backend(encode_reference.decode_tiles, "encode.triton", lambda packed: packed["codes"])
tile_energy = _by_backend(statistics_reference.tile_energy, "statistics.triton")
centred_energy = _by_backend(statistics_reference.centred_energy, "statistics.triton")
typical_scale = _by_backend(statistics_reference.typical_scale, "statistics.triton")
effective_rank = _by_backend(statistics_reference.effective_rank, "statistics.triton")
query_energy = _by_backend(statistics_reference.query_energy, "statistics.triton")
balance_channels = _by_backend(statistics_reference.balance_channels, "statistics.triton")
add_queries = _by_backend(statistics_reference.add_queries, "statistics.triton")


def decode_attention(
    query: torch.Tensor,
    history: History,
    scoring: Scoring,
    *,
    mask: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """`decode.reference.decode_attention` by the chosen backend.

    CUDA C++ serves only some of the calls that Triton serves. With "auto" it serves those that it supports. With "cuda"
    a call that it does not support is an error.

    Args:
        workspace: from `decode_workspace`, for calls that are recorded in CUDA graphs. Only CUDA C++ uses it.
    """
    chosen = backend(query.device)
    if query.device.type == "cuda" and (chosen == "cuda" or is_automatic()):
        module, reason = _cuda_for(query, history, scoring, mask is not None)
        if reason is None:
            with on_device(query.device):
                return module.decode_attention(query, history, scoring, mask=mask, workspace=workspace)
        if chosen == "cuda":
            raise RuntimeError(f"{VARIABLE}=cuda does not support this call: {reason}")
    known = _known((*history.keys.groups, *history.values.groups))
    if chosen == "torch" or not known:
        module = decode_cpu if query.device.type == "cpu" and known else decode_reference
        return module.decode_attention(query, history, scoring, mask=mask)
    module = import_module("turboquant_hf.kernels.decode.triton")
    with on_device(query.device):
        return module.decode_attention(query, history, scoring, mask=mask)


def prepared_decode(query: torch.Tensor, history: History, scoring: Scoring, *, masked: bool = False) -> Any:
    """A `decode.cuda.Step`: `decode_attention` for steps that differ only in query, mask and numbers of tokens.

    None where another backend serves the call. The arrays of `history` are given whole, spare room included.
    """
    chosen = backend(query.device)
    if query.device.type != "cuda" or chosen == "torch" or (chosen == "triton" and not is_automatic()):
        return None
    module, reason = _cuda_for(query, history, scoring, masked)
    if reason is not None:
        return None
    with on_device(query.device):
        return module.Step(query, history, scoring, masked=masked)


def _cuda_for(
    query: torch.Tensor, history: History, scoring: Scoring, masked: bool
) -> tuple[ModuleType | None, str | None]:
    """The CUDA C++ decode kernels, and why they do not serve this call, or None."""
    module, reason = cuda_module()
    if module is not None:
        reason = module.supports(query, history, scoring, masked=masked)
    return module, reason


def decode_workspace(batch_heads: int, rows: int, dim: int, device: torch.device) -> torch.Tensor:
    """Memory (int32) for `decode_attention` with up to `rows` query rows per KV head, in `batch_heads` KV heads."""
    words = 1
    if device.type == "cuda" and backend(device) != "torch" and cuda_module()[0] is not None:
        words = cuda_module()[0].largest_workspace(batch_heads, rows, dim, device)
    return torch.zeros(words, dtype=torch.int32, device=device)


def unread_tiles() -> int:
    """How many tiles' values sparse V left unread since the last call. Only the CUDA C++ kernels count them.

    A tile counts once per KV head and chunk of query rows. Raises: RuntimeError where there are no such kernels.
    """
    module, reason = cuda_module()
    if module is None:
        raise RuntimeError(f"only CUDA C++ kernels count tiles left unread: {reason}")
    return module.unread_tiles()
