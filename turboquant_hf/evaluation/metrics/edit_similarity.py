"""Similarity of a completed line of code."""

from difflib import SequenceMatcher

from turboquant_hf.evaluation.metrics import ReferenceMetric


class EditSimilarity(ReferenceMetric):
    """fuzzywuzzy's `ratio` / 100 of the first line of code: 2 * matching characters / all, in whole percent."""

    def score(self, prediction: str, reference: str) -> float:
        lines = prediction.lstrip("\n").split("\n")
        code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
        if code == reference:
            return 1.0
        return round(100 * SequenceMatcher(None, code, reference).ratio()) / 100
