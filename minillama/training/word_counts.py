"""Counting words: logistic regression on TF-IDF, the baseline of a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minillama.text.labelled import Row, has_gold_labels

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


@dataclass(frozen=True)
class WordCounts:
    """How words are counted: all n-grams up to `ngrams`, of tokens that match `pattern`; sublinear: 1 + log(count).

    The pattern is scikit-learn's own (words of two letters or more) or everything between spaces.
    """

    ngrams: int = 2
    pattern: str = r"(?u)\b\w\w+\b"
    sublinear: bool = False


WORD_COUNTS = [
    WordCounts(ngrams, pattern, sublinear)
    for ngrams in (1, 2)
    for pattern in (WordCounts.pattern, r"\S+")
    for sublinear in (False, True)
]


def counting_words(rows: Mapping[str, Sequence[Row]], counts: WordCounts | None = None) -> dict[str, float | None]:
    """A baseline, logistic regression on TF-IDF: its C, and its accuracy on dev and test (None without gold labels)."""
    return score_word_counts(fit_word_counts(rows, counts), rows)


def score_word_counts(fitted: Pipeline, rows: Mapping[str, Sequence[Row]]) -> dict[str, float | None]:
    """The C of a fitted baseline, and its accuracy on dev and test (None without gold labels)."""
    scored = {split: fitted.score(*sentences_and_labels(rows[split])) for split in ("dev", "test")}
    return {"C": float(fitted[-1].C)} | {
        split: float(score) if has_gold_labels(rows[split]) else None for split, score in scored.items()
    }


def sentences_and_labels(rows: Sequence[Row]) -> tuple[list[str], list[int]]:
    return [row.sentence for row in rows], [row.label for row in rows]


def fit_word_counts(rows: Mapping[str, Sequence[Row]], counts: WordCounts | None = None) -> Pipeline:
    """The logistic regression of `counting_words`, fitted on train. C is 1, 10 or 100, the best on dev."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn; threads slow down a small problem

    counts = counts or WordCounts()
    how: dict[str, Any] = {"token_pattern": counts.pattern, "sublinear_tf": counts.sublinear}
    (sentences, labels), (dev_sentences, dev_labels) = (sentences_and_labels(rows[split]) for split in ("train", "dev"))
    vectorizer = TfidfVectorizer(ngram_range=(1, counts.ngrams), **how)
    inputs = vectorizer.fit_transform(sentences)
    dev_inputs = vectorizer.transform(dev_sentences)
    with threadpool_limits(1):
        regressions = [LogisticRegression(C=c, max_iter=2000).fit(inputs, labels) for c in (1, 10, 100)]
        best = max(regressions, key=lambda one: one.score(dev_inputs, dev_labels))
    return make_pipeline(vectorizer, best)
