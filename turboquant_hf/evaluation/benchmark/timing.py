"""Times on a device: medians of CUDA graph replays, or of plain calls if no graph can be captured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CALLS = 12
"""The least number of calls in one graph, so that the launch of a replay is a small part."""
ROTATION = 150 * 2**20
"""Bytes of all buffers of one rotation: three times the L2 cache of an H100 (50 MB)."""


STEADY = 0.1
"""The largest spread of a measurement that is not repeated. Graphs of one kernel have 0.01."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the spread ((80th - 20th percentile) / median), and the method."""

    seconds: float
    spread: float
    method: str

    @property
    def us(self) -> float:
        return self.seconds * 1e6


def rotation_count(nbytes: int, device: torch.device, most: int = 32) -> int:
    """The number of buffers of `nbytes` to rotate over, so that no call finds its input in the L2 cache."""
    if device.type != "cuda":
        return 1
    return max(1, min(most, -(-ROTATION // max(nbytes, 1))))


def measure(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 0.1,
    least: int = 15,
    graph: bool = True,
) -> Timing:
    """Median time of one call. `calls` do the same work on different buffers, in turn.

    Runs for about `seconds` and at least `least` rounds. On a CUDA device, all calls are captured in one graph, and
    events time its replays. Without a graph, the events include the host's time. Replays with a spread above `STEADY`
    were disturbed, and are timed again, at most three times.
    """
    if device.type != "cuda":
        return _measure_host(calls, seconds, min(least, 5))
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    many = list(calls) * (-(-CALLS // len(calls)) if graph else 1)
    if not graph:
        return _measure_events(lambda: [call() for call in many], len(many), seconds, least, "events")
    try:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for call in many:
                call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return _measure_events(lambda: [call() for call in many], len(many), seconds, least, "events, no graph")
    timing = steadiest(lambda: _measure_events(captured.replay, len(many), seconds, least, "graph"))
    captured.reset()
    return timing


def steadiest(take: Callable[[], Timing], attempts: int = 3) -> Timing:
    """The first of `attempts` whose spread is at most `STEADY`, else the attempt with the least spread (not time)."""
    taken: list[Timing] = []
    for _ in range(attempts):
        taken.append(take())
        if taken[-1].spread <= STEADY:
            break
    return min(taken, key=lambda timing: timing.spread)


def _measure_events(run: Callable[[], object], calls: int, seconds: float, least: int, method: str) -> Timing:
    def timed() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    first = min(timed() for _ in range(2))
    count = int(max(least, min(200, seconds / max(first, 1e-7))))
    return _summary([timed() / calls for _ in range(count)], method)


def _measure_host(calls: Sequence[Callable[[], object]], seconds: float, least: int) -> Timing:
    for call in calls:
        call()
    taken: list[float] = []
    while len(taken) < least or (sum(taken) < seconds and len(taken) < 200):
        begin = time.perf_counter()
        calls[len(taken) % len(calls)]()
        taken.append(time.perf_counter() - begin)
    return _summary(taken, "host")


def _summary(taken: Sequence[float], method: str) -> Timing:
    ordered = sorted(taken)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
    return Timing(median, (high - low) / median, method)


def kernel_seconds(call: Callable[[], object], device: torch.device, rounds: int = 5) -> float | None:
    """Seconds that the device spends in the kernels and copies of one call; None on a CPU.

    This is the cost of a call if the device has other work while the host prepares the call.
    """
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            call()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in profiler.key_averages()) * 1e-6 / rounds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy on the device, counting bytes read and bytes written."""
    size = 2**30 if device.type == "cuda" else 2**25
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)], device, graph=False, least=30)
    return 2 * size / timing.seconds


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference divided by the norm of `exact`; infinity if NaN or infinity occurs."""
    error = ((found.double() - exact.double()).norm() / exact.double().norm()).item()
    return error if error == error else float("inf")
