"""Results that a process computes once and its threads share.

`functools.lru_cache` is for small values that any thread may compute again. The two decorators of this file are for
results that hold device memory, take long, or must be the same object for all: tensors, compiled kernels, codebooks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


def once(maxsize: int) -> Callable[[Callable], Callable]:
    """`lru_cache(maxsize)` for threads: one thread computes, and others that ask meanwhile wait for the same object.

    A hit costs as much as with `lru_cache`. At most 2 * maxsize results are kept. `cache_clear()` forgets all of them.
    """

    def decorate(function: Callable) -> Callable:
        lock = threading.RLock()  # re-entrant, for recursive functions
        shared = lru_cache(maxsize)(function)

        @lru_cache(maxsize)  # answers hits without the lock
        @wraps(function)
        def ask(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return shared(*args, **kwargs)

        clear = ask.cache_clear

        def cache_clear() -> None:
            shared.cache_clear()
            clear()

        ask.cache_clear = cache_clear
        return ask

    return decorate


def once_per_tensor(function: Callable) -> Callable:
    """`function(tensor, *rest)`, computed once per tensor object and `rest`, and kept for as long as the tensor lives.

    The result must not refer to the tensor, or neither is ever freed. The device has finished the result when it is
    first returned, so threads may read it on other streams.
    """
    results, lock = WeakIdKeyDictionary(), threading.RLock()

    @wraps(function)
    def ask(tensor: torch.Tensor, *rest: Any) -> Any:
        known = results.get(tensor)
        if known is not None and rest in known:
            return known[rest]
        with lock:
            known = results.setdefault(tensor, {})
            if rest not in known:
                result = function(tensor, *rest)
                if tensor.is_cuda and not torch.cuda.is_current_stream_capturing():
                    torch.cuda.current_stream(tensor.device).synchronize()
                known[rest] = result
            return known[rest]

    return ask
