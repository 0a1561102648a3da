"""`Stepper`: takes and times decode steps of a model, eager or compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from turboquant_hf.evaluation.harness.models import cache_parameter

SPARE = 16
"""Extra tokens for which a cache of fixed size has room, after prompt, warm-up and timed steps."""


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Turn cuDNN off in SDPA: it plans again at every length (65 ms), so it would be the slowest in every step."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Stepper:
    """Feeds one token per sequence at a time, as `generate` does: greedy, waiting for each token.

    compiled: whether steps run by `torch.compile(mode="reduce-overhead")`, which uses CUDA graphs.
    """

    def __init__(self, model, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        self._forward = (
            torch.compile(model.forward, mode="reduce-overhead", dynamic=False) if compiled else model.forward
        )
        self._cache_name = cache_parameter(type(model))

    @property
    def warmup(self) -> int:
        """Steps before the timed steps, in which launchers are built and graphs are recorded."""
        return 8 if self._model.device.type == "cuda" else 1

    def first_ids(self, batch: int) -> torch.Tensor:
        return torch.arange(batch, device=self._model.device)[:, None] % self._model.config.vocab_size

    def step(self, cache, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocabulary] after one more token of every sequence."""
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        output = self._forward(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        return output.logits[:, -1]

    def time(self, cache, batch: int, steps: int) -> dict[str, Any]:
        """Milliseconds per step: medians by the device's clock (events around the forward) and by the host's.

        The host's time includes choosing the token and waiting for it. The mean and the slowest step also show steps
        that encode a tile (one in 128).
        """
        clock = Clock(self, cache, batch)
        clock.take(steps)
        return {
            "ms": statistics.median(clock.device_ms), "host_ms": statistics.median(clock.host_ms),
            "mean_ms": statistics.fmean(clock.device_ms), "slowest_ms": max(clock.device_ms), "steps": steps,
            "timing": "events" if clock.cuda else "host",
        }  # fmt: skip

    def close(self) -> None:
        """Drop compiled code and its graphs."""
        if self._compiled:
            self._forward = None
            torch.compiler.reset()


class Clock:
    """Times the steps of one cache, after some warm-up steps."""

    def __init__(self, stepper: Stepper, cache, batch: int) -> None:
        self._stepper, self._cache = stepper, cache
        self._ids = stepper.first_ids(batch)
        self.cuda = self._ids.device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []
        self.device_ms: list[float] = []
        self.host_ms: list[float] = []
        self.take(stepper.warmup)
        self.device_ms.clear()
        self.host_ms.clear()

    def take(self, steps: int) -> list[float]:
        """Take more steps and return their milliseconds by the device's clock. The times of both clocks are kept."""
        if self.cuda:
            torch.cuda.synchronize()
        for _ in range(steps):
            begin = time.perf_counter()
            if self.cuda:
                self._events[0].record()
            logits = self._stepper.step(self._cache, self._ids)
            if self.cuda:
                self._events[1].record()
            self._ids = logits.argmax(-1, keepdim=True).clone()
            if self.cuda:
                torch.cuda.synchronize()
            self.host_ms.append((time.perf_counter() - begin) * 1e3)
            self.device_ms.append(self._events[0].elapsed_time(self._events[1]) if self.cuda else self.host_ms[-1])
        return self.device_ms[-steps:]
