"""A short version of the long soak run: the logits equal those of a fresh cache, and memory stays flat."""

from __future__ import annotations

import pytest

from tests.support.soak import soak
from turboquant_hf.generation.recorders import RECORDERS, Repeat

pytestmark = pytest.mark.slow  # thousands of forward passes
STEPS = 500


@pytest.mark.parametrize(("attention", "offloading"), [("turboquant", False), ("sdpa", True)], ids=str)
def test_random_use_equals_a_fresh_cache(attention, offloading):
    report = soak(STEPS, "lossless", attention, offloading)
    assert {"crop", "candidates", "reorder", "restart", "turn"} <= report.operations.keys()
    assert len(report.errors) >= STEPS // 97 and max(report.errors) < 1e-3
    dense = 2 * 2 * 2 * 16 * 4  # two layers, K and V, two heads of 16 channels in float32
    assert report.bytes_per_token <= (3 if offloading else 1.5) * dense, "two layers are staged beside what is held"


def test_random_use_between_recorded_steps_equals_a_fresh_cache(monkeypatch):
    """Captures, crops, reorders, growth, resets: `python -m tests.support.soak 100000 lossless turboquant graphs`."""
    monkeypatch.setitem(RECORDERS, "cpu", Repeat)
    report = soak(STEPS, "lossless", graphs=True)
    assert {"crop", "candidates", "reorder", "restart", "turn"} <= report.operations.keys()
    assert report.recorded > 3 and not report.refused and max(report.errors) < 1e-3


def test_random_use_of_a_preset_stays_near_a_fresh_cache():
    """The logits are not equal: statistics are frozen at another moment, and cropped tiles are encoded again."""
    report = soak(STEPS, "k4v4")
    assert sum(report.divergences) / len(report.divergences) < 1.0, "a shuffled history causes 4"


def test_memory_stays_flat():
    report = soak(3000, "k4v4")
    assert len(report.resident) > 20
    assert report.growth(report.resident) < 16 * 2**20
    assert report.growth(report.objects) < 200
