"""Folders of earlier versions, which do not name their command, are still read."""

import pytest

from turboquant_hf.evaluation.report.earlier import brought_up_to_date


@pytest.mark.parametrize(
    ("row", "tool"),
    [
        ({"preset": "a", "length": 512, "depth": 0.5, "accuracy": 1.0}, "needle"),
        ({"preset": "a", "task": "qasper", "category": "SingleQA", "score": 1.0}, "longbench"),
        ({"preset": "a", "task": "single-key", "length": 512, "score": 1.0}, "retrieval"),
        ({"preset": "a", "kl": 0.1}, "perplexity"),
        ({"something": "else"}, ""),
    ],
)
def test_the_command_is_known_by_its_rows(row, tool):
    assert brought_up_to_date({"results": [row]}) == {"tool": tool, "results": [row]}


def test_a_recorded_command_is_kept_and_baseline_becomes_uncompressed():
    row = {"preset": "baseline", "kl": 0.1}
    found = brought_up_to_date({"tool": "needle", "results": [row]})
    assert found == {"tool": "needle", "results": [{"preset": "uncompressed", "kl": 0.1}]}
    assert row["preset"] == "baseline", "what was given stays"


@pytest.mark.parametrize("results", [None, [], {"a": 1}, [1, 2]])
def test_other_shapes_are_left_alone(results):
    assert brought_up_to_date({"results": results}) == {"tool": "", "results": results}
