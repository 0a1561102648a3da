"""Operators for preallocated layers inside torch.compile. Their bodies are the layer's own Python.

- The compiler sees only the `number` of a layer: an int64 tensor [1] in host memory, by which operators find the layer.
  It does not see the arrays and counts, so one graph serves every step and the next cache of the same size.
- Every operator says that it writes this tensor. Compilers therefore keep all operators, in their order.
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


def new_number(layer: Any) -> torch.Tensor:
    """A tensor with a new number, by which operators find the layer as long as it lives."""
    with _LOCK:
        number = next(_NUMBERS)
        _LAYERS[number] = layer
    with torch.inference_mode(False):  # an inference tensor could not be "written" outside that mode
        return torch.tensor([number], dtype=torch.int64, device="cpu")


def layer_of(number: torch.Tensor) -> Any:
    """The layer with this number."""
    return _LAYERS[int(number)]


def host_op(name: str) -> Callable[[Callable], Any]:
    """A decorator: make a function of tensors and a `number` an operator, whose body runs on the host each time."""
    options = {} if _UNSAFE is None else {"tags": [_UNSAFE]}
    return torch.library.custom_op(f"turboquant_hf::{name}", mutates_args=("number",), **options)


@host_op("length")
def length(number: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Tokens held, int64 [] on `device`."""
    return torch.full((), layer_of(number).get_seq_length(), dtype=torch.int64, device=device)


@host_op("append")
def append(keys: torch.Tensor, values: torch.Tensor, number: torch.Tensor) -> None:
    """Store new keys [B, H, q, D] and values [B, H, q, Dv].

    Both are copied, because a layer may keep a long block without a copy, and compiled code reuses the memory.
    """
    layer_of(number).append(keys.clone(), values.clone())


@host_op("dense")
def dense(new: torch.Tensor, side: str, room: int, number: torch.Tensor) -> torch.Tensor:
    """All keys or values, [B, H, room, D], of a layer whose newest are `new` [B, H, q, D]."""
    return layer_of(number).dense(side)


@length.register_fake
def _(number, device):
    return torch.empty((), dtype=torch.int64, device=device)


@append.register_fake
def _(keys, values, number):
    return None


@dense.register_fake
def _(new, side, room, number):
    return new.new_empty((*new.shape[:2], room, new.shape[3]))
