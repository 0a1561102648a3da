"""LongBench's metrics as local `evaluate` modules. They are loaded by path, so they work without the hub.

The definitions are those of LongBench's own scorer (arXiv 2308.14508). The score of a prediction, 0 to 1, is the best
over its references. A metric is the mean over predictions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import evaluate
from datasets import Features, Sequence, Value


class ReferenceMetric(evaluate.Metric, ABC):
    """Base class of the metrics. A subclass scores one prediction against one reference."""

    @abstractmethod
    def score(self, prediction: str, reference: str, **options) -> float:
        """The score, 0 to 1. It is abstract because `evaluate` takes the first concrete class in a file."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="arXiv 2308.14508",
            inputs_description="predictions: strings; references: for each, the list of right answers",
            features=Features({"predictions": Value("string"), "references": Sequence(Value("string"))}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]], **options) -> dict[str, float]:
        best = [
            max((self.score(prediction, reference, **options) for reference in answers), default=0.0)
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return {"score": sum(best) / len(best)}


def load_metric(name: str) -> evaluate.Metric:
    """The metric in `<name>.py` of this folder; `compute(predictions=, references=)` gives {"score": mean}."""
    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)
