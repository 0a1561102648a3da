"""Operators for preallocated layers inside torch.compile. Their bodies are the layer's own Python.

- The compiler sees only the `token` of a layer: an int64 [1] in host memory that names the layer. It does not see the
  arrays and counts, so one graph serves every step and the next cache of the same size.
- Every operator says that it writes the token. Compilers therefore keep all operators, in their order.
- The bodies decide on the host, so CUDA graphs cannot record them. A tag makes compilers split the graph there.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch

_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_LOCK = threading.Lock()
_NUMBERS = itertools.count()
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)  # from torch 2.8 on


def new_token(layer: Any) -> torch.Tensor:
    """A new token by which operators find the layer as long as it lives."""
    with _LOCK:
        number = next(_NUMBERS)
        _LAYERS[number] = layer
    with torch.inference_mode(False):  # an inference tensor could not be "written" outside that mode
        return torch.tensor([number], dtype=torch.int64, device="cpu")


def layer_of(token: torch.Tensor) -> Any:
    """The layer that a token names."""
    return _LAYERS[int(token)]


def host_op(name: str) -> Callable[[Callable], Any]:
    """A decorator: make a function of tensors and a `token` an operator, whose body runs on the host each time."""
    options = {} if _UNSAFE is None else {"tags": [_UNSAFE]}
    return torch.library.custom_op(f"turboquant_hf::{name}", mutates_args=("token",), **options)


@host_op("length")
def length(token: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Tokens held, int64 [] on `device`."""
    return torch.full((), layer_of(token).get_seq_length(), dtype=torch.int64, device=device)


@host_op("append")
def append(keys: torch.Tensor, values: torch.Tensor, token: torch.Tensor) -> None:
    """Store new keys [B, H, q, D] and values [B, H, q, Dv].

    Both are copied, because a layer may keep a long block without a copy, and compiled code reuses the memory.
    """
    layer_of(token).append(keys.clone(), values.clone())


@host_op("dense")
def dense(new: torch.Tensor, side: str, room: int, token: torch.Tensor) -> torch.Tensor:
    """All keys or values, [B, H, room, D], of a layer whose newest are `new` [B, H, q, D]."""
    return layer_of(token).dense(side)


@length.register_fake
def _(token, device):
    return torch.empty((), dtype=torch.int64, device=device)


@append.register_fake
def _(keys, values, token):
    return None


@dense.register_fake
def _(new, side, room, token):
    return new.new_empty((*new.shape[:2], room, new.shape[3]))
