"""Times decode steps of several caches in turns, because the host bounds them and its speed changes by the second."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from turboquant_hf.evaluation.benchmark.caches import Candidate, fill
from turboquant_hf.evaluation.benchmark.settings import Group
from turboquant_hf.evaluation.benchmark.steps import SPARE, Clock, Stepper

TURN = 4
"""Steps per turn."""


def time_in_turns(
    model, group: Group, cell: tuple[int, int], own: Candidate, others: Sequence[Candidate], steps: int
) -> float:
    """Ratio of own's time to the fastest other's: the median of rounds in which each cache takes a few steps.

    Args:
        cell: (batch, tokens of the prompt).
        steps: steps of every cache in all.
    """
    batch, tokens = cell
    rounds = max(1, steps // TURN)
    clocks: list[tuple[Clock, str]] = []
    try:
        for candidate in (own, *others):
            stepper = Stepper(model, candidate.compiled)
            model.set_attn_implementation(candidate.attention)
            cache = candidate.make(model.config, tokens + rounds * TURN + stepper.warmup + SPARE)
            fill(cache, group, batch, tokens, model.device, candidate.attention)
            clocks.append((Clock(stepper, cache, batch), candidate.attention))
        ratios = []
        for _ in range(rounds):
            times = []
            for clock, attention in clocks:
                model.set_attn_implementation(attention)
                times.append(statistics.median(clock.take(TURN)))
            ratios.append(times[0] / min(times[1:]))
        return statistics.median(ratios)
    finally:
        model.set_attn_implementation("sdpa")
