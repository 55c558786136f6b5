"""Faults of labelled texts: planted ones are all found, and the search agrees with comparing every pair."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from minillama.text.inspection import (
    Repeat,
    TextIndex,
    commonest,
    contradictions,
    length_quantiles,
    longer_than,
    smallest_differences,
    words_of,
)
from minillama.text.labelled import read_rows
from models import SST


def jaccard(one, other):
    """The Jaccard index of two bags of words."""
    ours, theirs = Counter(words_of(one)), Counter(words_of(other))
    return (ours & theirs).total() / max(1, (ours | theirs).total())


def one_word_changed(text, draw):
    words = text.split()
    place = draw.choice([n for n, word in enumerate(words) if words_of(word)])
    return " ".join([*words[:place], "zyzzyva", *words[place + 1 :]])


NEAR = {
    "case": lambda text, draw: text.upper() if text != text.upper() else text.lower(),
    "punctuation": lambda text, draw: f'"{text}"!!',
    "html": lambda text, draw: f"<p>{text}<br /></p>",
    "emoji": lambda text, draw: f"{text} 😀",
    "order": lambda text, draw: " ".join(reversed(text.split())),
    "one word more": lambda text, draw: f"{text} really",
    "one word less": lambda text, draw: text.split(maxsplit=1)[1],
    "one word changed": one_word_changed,
}


@pytest.fixture(scope="module")
def sst(asset):
    """Sentences of SST with 6 to 40 words, of which none is near another."""
    texts = [row.sentence for row in read_rows(asset("course/data/sst-train.txt"), SST)]
    texts = [text for text in dict.fromkeys(texts) if 6 <= len(words_of(text)) <= 40]
    repeated = {repeat.row for repeat in TextIndex(texts).repeats}
    return [text for row, text in enumerate(texts) if row not in repeated]


def planted(texts, count, seed=0):
    """Copies of random texts, with what was done to each: (exact, copy, the row it was made of)."""
    draw = random.Random(seed)
    kinds = [("exact", lambda text, draw: text), ("spaces", lambda text, draw: "  ".join(text.split()) + " ")]
    made = []
    for n in range(count):
        row = draw.randrange(len(texts))
        kind, change = [*kinds, *NEAR.items()][n % (len(kinds) + len(NEAR))]
        copy = change(texts[row], draw)
        made.append((kind in ("exact", "spaces"), copy, row))
    return made


def test_all_planted_copies_are_found_in_train(sst):
    some = sst[:1500]
    copies = planted(some, 200)
    found = {repeat.row: repeat for repeat in TextIndex([*some, *(copy for _, copy, _ in copies)]).repeats}
    assert sorted(found) == list(range(len(some), len(some) + 200))  # all of them, and nothing else
    first = {}
    for n, (exact, copy, row) in enumerate(copies):
        repeat = found[len(some) + n]
        seen = exact or copy in first
        assert repeat.exact == seen
        assert not exact or repeat.other == row
        first.setdefault(copy, n)


def test_all_planted_leaks_are_found_and_nothing_else(sst):
    train, dev = sst[:1500], sst[1500:1700]
    copies = planted(train, 100, seed=1)
    found = TextIndex(train).find([*dev, *(copy for _, copy, _ in copies)])
    assert [(repeat.row - len(dev), repeat.exact, repeat.other) for repeat in found] == [
        (n, exact, row) for n, (exact, _, row) in enumerate(copies)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_search_agrees_with_comparing_every_pair(seed):
    draw = random.Random(seed)
    words = "the a film was very good bad dull long funny really".split()
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(150)]
    others = [" ".join(draw.choices([*words, "new"], k=draw.randint(1, 9))) for _ in range(80)]
    index = TextIndex(texts)
    repeated = {row for row in range(150) if any(jaccard(texts[row], texts[n]) >= 2 / 3 for n in range(row))}
    assert {repeat.row for repeat in index.repeats} == repeated and 10 < len(repeated) < 140
    leaked = {row for row, other in enumerate(others) if any(jaccard(other, text) >= 2 / 3 for text in texts)}
    found = index.find(others)
    assert {repeat.row for repeat in found} == leaked and 5 < len(leaked) < 75
    for repeat in found:
        assert jaccard(others[repeat.row], texts[repeat.other]) >= 2 / 3
        assert repeat.exact == (others[repeat.row] in texts)


def test_texts_without_words_repeat_only_exactly():
    assert TextIndex(["😀", "!!!", "😀", "?"]).repeats == [Repeat(2, 0, True)]


def test_contradictions_are_equal_texts_with_several_labels():
    texts = ["A fine film.", "a fine film", "a dull film", "a dull film", "film fine a", "!!", "??"]
    assert contradictions(texts, [1, 0, 0, 0, 0, 1, 0]) == [[0, 1]]
    assert contradictions(texts, [1, 1, 0, 2, 0, 1, 0]) == [[2, 3]]


def test_lengths_are_described():
    lengths = [*range(1, 100), 200]
    assert length_quantiles(lengths) == {"mean": 51.5, "median": 50, "90 %": 90, "99 %": 99, "longest": 200}
    assert longer_than(lengths) == {16: 84, 32: 68, 64: 36, 128: 1, 256: 0}
    assert longer_than([3]) == {16: 0} and longer_than([16, 17]) == {16: 1, 32: 0}


def test_the_commonest_label_of_train_is_scored_on_dev():
    assert commonest(["a", "b", "b"], ["a", "a", "b", "a"]) == ("b", 0.25)


def test_the_smallest_differences_are_those_of_the_tests_that_they_name():
    from scipy.stats import chi2

    found = smallest_differences(400, 0.8)
    for share in (5, 10, 20):
        more = found[f"same_rows_{share}"] * 400  # rows that only one model has right, less those of the other
        assert more**2 / (share / 100 * 400) == pytest.approx(chi2.isf(0.05, 1), rel=1e-3)
    draw = random.Random(0)
    score = lambda: sum(draw.random() < 0.8 for _ in range(400)) / 400  # noqa: E731
    above = sum(abs(score() - score()) > found["different_rows"] for _ in range(2000)) / 2000
    assert 0.03 < above < 0.07  # of two equal models, one pair in twenty
    independent = 2 * 0.8 * 0.2
    assert found["different_rows"] == pytest.approx(found["same_rows_10"] * math.sqrt(independent / 0.1))
