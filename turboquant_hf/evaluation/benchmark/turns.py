"""Decode steps of several caches in turns, for steps that the host bounds: its speed changes from second to second."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from turboquant_hf.evaluation.benchmark.caches import Candidate, fill
from turboquant_hf.evaluation.benchmark.settings import Group
from turboquant_hf.evaluation.benchmark.steps import Clock, Stepper

TURN = 4
"""Steps that a cache takes before it is the next one's turn."""


def time_in_turns(
    model, group: Group, cell: tuple[int, int], own: Candidate, others: Sequence[Candidate], steps: int, room: int
) -> float:
    """own's time / the fastest other's: the median of rounds in which each takes a few steps.

    Args:
        cell: (batch, tokens of the prompt).
        steps: of every cache in all.
        room: tokens beside prompt and steps that a cache of fixed size must hold.
    """
    batch, tokens = cell
    rounds = max(1, steps // TURN)
    clocks: list[tuple[Clock, Callable[[], None]]] = []
    try:
        for candidate in (own, *others):
            stepper = Stepper(model, candidate.compiled)

            def switch(attention: str = candidate.attention) -> None:
                model.set_attn_implementation(attention)

            switch()
            cache = candidate.make(model.config, tokens + rounds * TURN + room)
            fill(cache, group, batch, tokens, model.device, candidate.attention)
            clocks.append((Clock(stepper, cache, batch), switch))
        ratios = []
        for _ in range(rounds):
            times = []
            for clock, switch in clocks:
                switch()
                times.append(statistics.median(clock.take(TURN)))
            ratios.append(times[0] / min(times[1:]))
        return statistics.median(ratios)
    finally:
        model.set_attn_implementation("sdpa")
