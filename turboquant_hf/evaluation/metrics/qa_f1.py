"""Word-overlap F1 of short answers."""

import re
import string
from collections import Counter

from turboquant_hf.evaluation.metrics import ReferenceMetric

PUNCTUATION = str.maketrans("", "", string.punctuation)


class QAF1(ReferenceMetric):
    """F1 of the words that prediction and reference share. As in SQuAD, case, punctuation and articles do not count."""

    def score(self, prediction: str, reference: str) -> float:
        ours, theirs = words(prediction), words(reference)
        same = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()
