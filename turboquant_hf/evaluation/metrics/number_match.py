"""Passage retrieval and passage count: an answer that is a number."""

import re

from turboquant_hf.evaluation.metrics import ReferenceMetric


class NumberMatch(ReferenceMetric):
    """The share of the numbers in the prediction that equal the reference's first number; 0 if there are none."""

    def score(self, prediction: str, reference: str) -> float:
        numbers = re.findall(r"\d+", prediction)
        return numbers.count(re.search(r"\d+", reference).group()) / len(numbers) if numbers else 0.0
