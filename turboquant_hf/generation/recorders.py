"""Recorders of decode steps: `CudaGraph`, and `Repeat` for tests without a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "nonzero_numpy", "unique_dim",
    "_unique2", "unique_consecutive",
}  # fmt: skip
"""Operations that wait for the device to tell the host a value or a shape."""


def default_generator(device: torch.device) -> torch.Generator:
    """torch's own generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


class RefuseWaiting(TorchDispatchMode):
    """Raises RuntimeError at the first operation of this thread that a CUDA graph cannot record.

    A recording that such an operation breaks cannot be ended cleanly. The step before it therefore runs in this mode.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        cuda = any(x.is_cuda for x in tensors)
        if cuda and name in ASKING or name in ("copy_", "_to_copy") and _crosses(name, args, kwargs or {}):
            raise RuntimeError(f"its forward waits for the device ({func})")
        return func(*args, **(kwargs or {}))


def _crosses(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a copy goes between pageable host memory and a CUDA device."""
    source = args[1] if name == "copy_" else args[0]
    target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
    if not isinstance(source, torch.Tensor):
        return False
    pinned = source.device.type == "cpu" and source.is_pinned()
    return (source.device.type == "cuda") != (torch.device(target).type == "cuda") and not pinned


class CudaGraph:
    """One call, recorded in a CUDA graph.

    Recording runs the Python code once and launches nothing; `replay` launches everything that was recorded.

    Args:
        call: what to record; its tensors must stay where they are.
        pool: the memory pool of an earlier graph that never runs at the same time, or None for a new one.

    Raises:
        Whatever `call` raises; RuntimeError if it does something that a graph cannot record.
    """

    asynchronous = True
    """Whether the device works while the host goes on."""

    def __init__(self, call: Callable[[], Any], device: torch.device, pool: Any = None) -> None:
        before = torch.cuda.memory_reserved(device)
        random = default_generator(device).clone_state()
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        collects = gc.isenabled()
        gc.disable()  # a collection that frees CUDA objects would break the recording
        try:
            with torch.cuda.stream(stream):
                # Another thread may go on using the device.
                self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self.output = call()
                    self.graph.capture_end()
                except BaseException:
                    _abandon(self.graph, random, device)
                    raise
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.pool = self.graph.pool()
        self.nbytes = max(torch.cuda.memory_reserved(device) - before, 0)

    @staticmethod
    def guard() -> AbstractContextManager:
        """A context for a call that will be recorded later; raises if it cannot be."""
        return RefuseWaiting()

    def replay(self) -> Any:
        """Run the graph; returns the recorded output, whose tensors the next replay overwrites."""
        self.graph.replay()
        return self.output


def _abandon(graph: torch.cuda.CUDAGraph, random: torch.Generator, device: torch.device) -> None:
    """End a recording that has failed, with the random state and the allocator as they were before."""
    try:
        graph.capture_end()
    except RuntimeError:
        # The driver has dropped the recording before torch could end its own part.
        default_generator(device).graphsafe_set_state(random)


class Repeat:
    """The interface of `CudaGraph` without a graph: `replay` calls the function. For tests on a CPU."""

    nbytes, pool, asynchronous = 0, None, False

    def __init__(self, call: Callable[[], Any], device: torch.device, pool: Any = None) -> None:
        self.replay = call

    @staticmethod
    def guard() -> AbstractContextManager:
        return nullcontext()


RECORDERS: dict[str, type] = {"cuda": CudaGraph}
"""Recorders by kind of device. On any other device, steps run as they are."""
