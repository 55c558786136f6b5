"""Faults of labelled texts before training: repeated rows, rows of one split in another, contradictory labels; and
what the number of rows allows to be seen. Imports no torch.

Two texts are exact duplicates if they are equal after runs of spaces became one. They are near duplicates if they
share two thirds of their words: the Jaccard index of their bags of words is 2/3 or more. So one word may differ in a
text of five words, and two in a text of ten. Case, punctuation, HTML tags and the order of the words do not count.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
TAG = re.compile(r"<[^<>]{1,200}>")
Z95 = 1.96  # of 95 % of a normal distribution, on both sides
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


def words_of(text: str) -> list[str]:
    """The words of a text, without case, punctuation and HTML tags."""
    plain = unicodedata.normalize("NFKC", TAG.sub(" ", html.unescape(text)))
    return WORD.findall(plain.casefold())


class Repeat(NamedTuple):
    """Row `row`, which repeats row `other` of the indexed texts. Both count from 0."""

    row: int
    other: int
    exact: bool


class TextIndex:
    """Texts in which exact and near duplicates of a text can be found. The search is exact: it misses no pair.

    repeats: the texts that repeat an earlier one, each once.

    If the Jaccard index of two bags is 2/3 or more, each shares two thirds of its words with the other. So, in any
    common order of all words, the first third of one bag and one more word share a word with that of the other: the
    prefix filter of doi 10.1145/2000824.2000825. Rare words come first, so that few texts have to be compared.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        bags = [self._counted(text) for text in texts]
        counts = Counter(word for bag in bags for word in bag)
        by_rarity = sorted(counts, key=lambda word: (counts[word], word))
        self._ranks: dict[tuple[str, int], int] = {word: rank for rank, word in enumerate(by_rarity)}
        self._exact: dict[str, int] = {}
        self._bags: dict[int, frozenset[int]] = {}
        self._texts_with: defaultdict[int, list[int]] = defaultdict(list)  # by a word of the first third
        self.repeats: list[Repeat] = []
        for row, (text, counted) in enumerate(zip(texts, bags, strict=True)):
            bag = self._ranked(counted)
            if (found := self._find(row, text, bag)) is not None:
                self.repeats.append(found)
            if found is None or not found.exact:
                self._exact[" ".join(text.split())] = row
                self._bags[row] = frozenset(bag)
                for word in self._first_third(bag):
                    self._texts_with[word].append(row)

    def find(self, texts: Sequence[str]) -> list[Repeat]:
        """The texts of another list that repeat an indexed one."""
        found = (self._find(row, text, self._ranked(self._counted(text))) for row, text in enumerate(texts))
        return [repeat for repeat in found if repeat is not None]

    def _find(self, row: int, text: str, bag: list[int]) -> Repeat | None:
        exact = self._exact.get(" ".join(text.split()))
        if exact is not None:
            return Repeat(row, exact, True)
        words, compared = frozenset(bag), set()
        for word in self._first_third(bag):
            for other in self._texts_with.get(word, ()):
                if other in compared:
                    continue
                compared.add(other)
                theirs = self._bags[other]
                fewer, more = sorted((len(words), len(theirs)))
                if 3 * fewer < 2 * more:
                    continue
                shared = len(words & theirs)
                if 3 * shared >= 2 * (fewer + more - shared):
                    return Repeat(row, other, False)
        return None

    @staticmethod
    def _counted(text: str) -> list[tuple[str, int]]:
        """The bag of a text as different elements: (word, 0) for its first occurrence, (word, 1) for its second."""
        return [(word, n) for word, count in Counter(words_of(text)).items() for n in range(count)]

    def _ranked(self, bag: list[tuple[str, int]]) -> list[int]:
        """The ranks of the words, the rarest first; unknown words have negative ranks."""
        return sorted(self._ranks.get(word, -1 - n) for n, word in enumerate(bag))

    @staticmethod
    def _first_third(bag: list[int]) -> list[int]:
        return bag[: len(bag) // 3 + 1]


def contradictions(texts: Sequence[str], labels: Sequence[Hashable]) -> list[list[int]]:
    """Groups of rows with the same words in the same order, but several labels. A text without words counts as one."""
    groups: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        groups[tuple(words_of(text)) or (text,)].append(row)
    return [rows for rows in groups.values() if len({labels[row] for row in rows}) > 1]


def length_quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """The mean of lengths and their quantiles: the smallest length that at least this share does not exceed."""
    ordered = sorted(lengths)
    found = {name: ordered[math.ceil(share * len(ordered)) - 1] for name, share in QUANTILES.items()}
    return {"mean": round(sum(ordered) / len(ordered), 1), **found}


def longer_than(lengths: Sequence[int]) -> dict[int, int]:
    """How many lengths exceed 16, 32, 64, ..., up to the first power of two that none exceeds."""
    limits = [1 << n for n in range(4, max(5, (max(lengths) - 1).bit_length() + 1))]
    return {limit: sum(length > limit for length in lengths) for limit in limits}


def commonest(labels: Sequence[Hashable], judged: Sequence[Hashable]) -> tuple[Hashable, float]:
    """The commonest label of `labels`, and its share in `judged`: the accuracy of always giving it."""
    label = Counter(labels).most_common(1)[0][0]
    return label, sum(one == label for one in judged) / len(judged)


def smallest_differences(rows: int, accuracy: float) -> Mapping[str, float]:
    """The smallest differences of two models' accuracies that are significant at 95 % with `rows` rows.

    different_rows: 1.96 sqrt(2 p (1 - p) / n), for models that are scored on two samples of n rows, at accuracy p.
    same_rows_N: 1.96 sqrt(d / n), for models scored on the same n rows, of which exactly one of them gets d = N %
    right (McNemar's test, doi 10.1007/BF02295996; see doi 10.1162/089976698300017197). The two agree at
    d = 2 p (1 - p), where the models' errors are independent.
    """
    unpaired = Z95 * math.sqrt(2 * accuracy * (1 - accuracy) / rows)
    paired = {f"same_rows_{share}": Z95 * math.sqrt(share / 100 / rows) for share in (5, 10, 20)}
    return {"different_rows": unpaired, **paired}
