"""Accuracy of a class named in free text."""

from turboquant_hf.evaluation.metrics import ReferenceMetric


class Classification(ReferenceMetric):
    """1 / (how many classes the prediction names) when the right one is among them, else 0.

    A class whose name is part of the right one's does not count. `classes` lists all names.
    """

    def score(self, prediction: str, reference: str, classes: list[str]) -> float:
        named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
        return 1.0 / len(named) if reference in named else 0.0
