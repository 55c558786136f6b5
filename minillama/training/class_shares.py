"""Classes of different size: their weights, and warnings of a model that is no better than one constant answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minillama.text.labelled import Row
from minillama.training.evaluation import Evaluation, commonest_class


def class_weights(rows: Sequence[Row], classes: int) -> list[float]:
    """The weight of each class, N / (K * count), with the N rows and the K classes that have rows; else 0.

    This is scikit-learn's "balanced". The mean weight over the rows is 1.
    """
    counts = Counter(row.label for row in rows)
    return [len(rows) / (len(counts) * counts[label]) if counts[label] else 0.0 for label in range(classes)]


def training_remedy(weighted: bool) -> str:
    """Advice after a run that has learnt too little. weighted: whether --class_weights is balanced already."""
    remedies = "more --epochs, or a higher or lower --lr"
    return remedies if weighted else remedies.replace(", or ", ", ") + ", or --class_weights balanced"


def one_class_warning(evaluation: Evaluation, rows: Sequence[Row], label_names: Sequence[str], remedy: str) -> str:
    """A warning if the same class is predicted for all of several dev rows; otherwise "".

    label_names: without them, the warning gives the class id. remedy: what to try.
    """
    predicted = set(evaluation.predictions)
    if len(rows) < 2 or len(predicted) != 1 or evaluation.accuracy is None:
        return ""
    (only,) = predicted
    name, right = label_names[only] if label_names else only, sum(row.label == only for row in rows) / len(rows)
    return f'dev: all {len(rows)} rows are predicted as "{name}", the class of {right:.1%} of them; try {remedy}'


def final_warning(evaluation: Evaluation, rows: Sequence[Row], label_names: Sequence[str], remedy: str) -> str:
    """A warning if a trained model gives one answer for all dev rows, or is right less often than the commonest class
    is; otherwise "". remedy: what to try.
    """
    label, share = commonest_class(rows)
    if warning := one_class_warning(evaluation, rows, label_names, remedy):
        return warning
    if evaluation.accuracy is None or evaluation.accuracy >= share:
        return ""
    return (
        f"dev accuracy {evaluation.accuracy:.3f} is below {share:.3f}, the share of its commonest class, "
        f'"{label_names[label]}"; try {remedy}'
    )
