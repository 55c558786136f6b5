"""benchmark.py words: the settings that it searches, against scikit-learn called directly."""

from __future__ import annotations

import json

import pytest

import benchmark
from minillama.text.labelled import Row
from minillama.training.evaluation import WORD_COUNTS, WordCounts, counting_words

TRAIN = [("a good good film", 1), ("good , and a joy", 1), ("bad , so bad", 0), ("a bad film !", 0)] * 3
OTHERS = [("what a joy", 1), ("so bad a film", 0), ("good film !", 1), ("bad , bad", 0)]


def file_of(path, rows):
    path.write_text("".join(f"{label} ||| {text}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def test_every_way_is_tried_and_the_best_on_dev_is_scored_on_test(tmp_path, capsys):
    names = tmp_path / "names.json"
    names.write_text('["bad", "good"]', encoding="utf-8")
    files = {"train": TRAIN, "dev": OTHERS, "test": TRAIN[:4] + OTHERS}
    arguments = [part for name, rows in files.items() for part in (f"--{name}", file_of(tmp_path / name, rows))]
    assert benchmark.main(["words", *arguments, "--label-names", str(names)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    ways = [(one["ngrams"], one["pattern"], one["sublinear"]) for one in found["tried"]]
    assert len(set(ways)) == len(ways) == 8 and len(lines) == 1 + 8 + 1
    assert found["best"]["dev"] == max(one["dev"] for one in found["tried"])
    assert lines[-1] == f"best on dev of 24 settings: dev {found['best']['dev']:.3f}, test {found['best']['test']:.3f}"


@pytest.mark.parametrize("way", WORD_COUNTS, ids=str)
def test_a_way_is_scikit_learns(way):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    how = {"ngram_range": (1, way.ngrams), "token_pattern": way.pattern, "sublinear_tf": way.sublinear}
    rows = {name: [Row(label, text) for text, label in some] for name, some in (("train", TRAIN), ("dev", OTHERS))}
    found = counting_words(rows | {"test": rows["dev"]}, way)
    model = make_pipeline(TfidfVectorizer(**how), LogisticRegression(C=found["C"], max_iter=2000))
    model.fit(*zip(*TRAIN, strict=True))
    assert found["dev"] == found["test"] == model.score(*zip(*OTHERS, strict=True))


def test_the_default_counts_words_of_two_letters_as_scikit_learn_does():
    from sklearn.feature_extraction.text import TfidfVectorizer

    assert WordCounts().pattern == TfidfVectorizer().token_pattern
