"""Held-out rows."""

from __future__ import annotations

from collections import Counter

import pytest

from minillama.text.labelled import Row
from minillama.text.splits import hold_out


def rows_of(counts):
    return [Row(label, f"text {label} {i}") for label, count in counts.items() for i in range(count)]


@pytest.mark.parametrize("share, held", [(0.1, {0: 20, 1: 5, 2: 1}), (0.5, {0: 100, 1: 25, 2: 2})])
def test_each_class_gives_its_share_and_no_row_is_lost(share, held):
    rows = rows_of({0: 200, 1: 50, 2: 4})
    train, dev = hold_out(rows, share, seed=7)
    assert Counter(row.label for row in dev) == held
    assert sorted(train + dev, key=rows.index) == rows and train == [row for row in rows if row in train]
    assert hold_out(rows, share, seed=7) == (train, dev) != hold_out(rows, share, seed=8)


def test_equal_texts_stay_together():
    rows = [Row(i % 2, ("A Good  film", "a good film", f"text {i}")[i % 3]) for i in range(300)]
    for seed in range(10):
        train, dev = hold_out(rows, 0.2, seed)
        texts = [{" ".join(row.sentence.lower().split()) for row in part} for part in (train, dev)]
        assert not texts[0] & texts[1] and dev


def test_a_class_of_one_text_stays_in_training_and_without_others_it_is_said():
    rows = [*rows_of({0: 10}), Row(1, "alone"), Row(1, "alone")]
    train, dev = hold_out(rows, 0.5, 1)
    assert {row.label for row in dev} == {0} and rows[-2:] == train[-2:]
    with pytest.raises(ValueError, match="no rows can be held out; give --dev FILE, or more rows"):
        hold_out(rows[-2:], 0.5, 1)
