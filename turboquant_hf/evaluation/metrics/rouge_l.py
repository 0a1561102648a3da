"""ROUGE-L of summaries."""

from turboquant_hf.evaluation.metrics import ReferenceMetric


class RougeL(ReferenceMetric):
    """Summary-level ROUGE-L F1, over distinct words, as the PyPI package `rouge` 1.0.1 computes it.

    Sentences end at full stops. The words of the longest common subsequences of all sentence pairs are united;
    recall and precision are their number over the distinct words of the reference and of the prediction.
    """

    def score(self, prediction: str, reference: str) -> float:
        ours, theirs = sentences(prediction), sentences(reference)
        if not ours or not theirs:
            return 0.0
        common = {word for a in theirs for b in ours for word in longest_common_subsequence(a, b)}
        precision = len(common) / len({word for sentence in ours for word in sentence})
        recall = len(common) / len({word for sentence in theirs for word in sentence})
        return 2 * precision * recall / (precision + recall + 1e-8)


def sentences(text: str) -> list[list[str]]:
    # In that package, a blank between two full stops counts as a sentence of one empty word.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def longest_common_subsequence(x: list[str], y: list[str]) -> list[str]:
    """A longest common subsequence. Among several, the one that drops from `y` first, seen from the end."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, a in enumerate(x, 1):
        for j, b in enumerate(y, 1):
            length[i][j] = length[i - 1][j - 1] + 1 if a == b else max(length[i - 1][j], length[i][j - 1])
    i, j, found = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
