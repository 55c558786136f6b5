"""The commonest class: the accuracy of a model that always gives the same answer, and warnings that compare with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minillama.text.labelled import Row

if TYPE_CHECKING:
    from minillama.training.evaluation import Evaluation


def commonest_class(rows: Sequence[Row]) -> tuple[int, float]:
    """The most frequent gold class (of equal ones the smallest id), and its share of the rows."""
    counts = Counter(row.label for row in rows)
    label = min(counts, key=lambda label: (-counts[label], label))
    return label, counts[label] / len(rows)


def class_weights(rows: Sequence[Row], classes: int) -> list[float]:
    """The weight of each class, N / (K * count), with the N rows and the K classes that have rows; else 0.

    This is scikit-learn's "balanced". The mean weight over the rows is 1.
    """
    counts = Counter(row.label for row in rows)
    return [len(rows) / (len(counts) * counts[label]) if counts[label] else 0.0 for label in range(classes)]


def training_remedy(weighted: bool) -> str:
    """What to try after a run that has learnt too little. weighted: whether --class_weights is balanced already."""
    remedies = "more --epochs, or a higher or lower --lr"
    return remedies if weighted else remedies.replace(", or ", ", ") + ", or --class_weights balanced"


def warning_of(
    evaluation: Evaluation, rows: Sequence[Row], label_names: Sequence[str], remedy: str, split: str = "dev"
) -> str:
    """A warning if the same class is predicted for every row, or if the accuracy is below the share of the commonest
    class; otherwise "". label_names: without them, the warning gives class ids. remedy: what to try.
    """
    if len(rows) < 2 or evaluation.accuracy is None:
        return ""
    predicted = set(evaluation.predictions)
    label, share = commonest_class(rows)
    names = label_names or [str(i) for i in range(1 + max(label, *predicted))]
    if len(predicted) == 1:
        only = predicted.pop()
        right = sum(row.label == only for row in rows) / len(rows)
        return (
            f'{split}: all {len(rows)} rows are predicted as "{names[only]}", the class of {right:.1%} of them; '
            f"try {remedy}"
        )
    if evaluation.accuracy < share:
        return (
            f"{split} accuracy {evaluation.accuracy:.3f} is below {share:.3f}, the share of its commonest class, "
            f'"{names[label]}"; try {remedy}'
        )
    return ""
