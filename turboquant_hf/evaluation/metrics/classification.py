"""Accuracy of a class named in free text."""

from turboquant_hf.evaluation.metrics import ReferenceMetric


class Classification(ReferenceMetric):
    """1 / (number of classes that the prediction names) if the right class is among them, else 0.

    A class whose name is part of the right class's name does not count. `classes` lists all names.
    """

    def score(self, prediction: str, reference: str, classes: list[str]) -> float:
        named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
        return 1.0 / len(named) if reference in named else 0.0
