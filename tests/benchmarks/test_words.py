"""benchmark.py words: the settings that it searches, against scikit-learn called directly."""

from __future__ import annotations

import json

import pytest

import benchmark
from minillama.text.labelled import Row
from minillama.training.word_counts import WORD_COUNTS, WordCounts, counting_words

TRAIN = [("a good good film", 1), ("good , and a joy", 1), ("bad , so bad", 0), ("a bad film !", 0)] * 3
OTHERS = [("what a joy", 1), ("so bad a film", 0), ("good film !", 1), ("bad , bad", 0)]


def file_of(path, rows):
    path.write_text("".join(f"{label} ||| {text}\n" for text, label in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def arguments(tmp_path):
    names = tmp_path / "names.json"
    names.write_text('["bad", "good"]', encoding="utf-8")
    files = {"train": TRAIN, "dev": OTHERS, "test": TRAIN[:4] + OTHERS}
    named = [part for name, rows in files.items() for part in (f"--{name}", file_of(tmp_path / name, rows))]
    return ["words", *named, "--label-names", str(names)]


def test_every_way_is_tried_and_the_best_on_dev_is_scored_on_test(arguments, capsys):
    assert benchmark.main(arguments) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    ways = [(one["ngrams"], one["pattern"], one["sublinear"]) for one in found["tried"]]
    assert len(set(ways)) == len(ways) == 8 and len(lines) == 1 + 8 + 1
    assert found["best"]["dev"] == max(one["dev"] for one in found["tried"])
    assert lines[-1] == f"best on dev of 24 settings: dev {found['best']['dev']:.3f}, test {found['best']['test']:.3f}"


def predictions_of(path, rows, good):
    lines = [f'"{text}",0,{1 - p},{p}\n' for (text, _), p in zip(rows, good, strict=True)]
    path.write_text("text,predicted,p_bad,p_good\n" + "".join(lines), encoding="utf-8")
    return str(path)


def test_predictions_are_averaged_with_each_other_and_with_the_words(arguments, tmp_path, capsys):
    # The mean of the two files is sure and wrong in the first row, and says nothing of the others: there words decide.
    files = [predictions_of(tmp_path / f"{i}.csv", OTHERS, p) for i, p in enumerate(([0, 1, 0, 1], [0, 0, 1, 0]))]
    assert benchmark.main([*arguments, "--dev_predictions", *files]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["predictions"] == {"dev": 0.5} and found["average"] == {"dev": 0.75}
    assert lines[-2:] == ["the predictions: dev 0.500", "the mean of both: dev 0.750"]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda text: text.replace("what a joy", "what a day"), "row 1 is 'what a day', but in the data 'what a joy'"),
        (lambda text: text + "more,0,0.5,0.5\n", "has 5 rows, but the data have 4"),
        (lambda text: text.replace("p_", "q_"), "has no probabilities"),
    ],
)
def test_predictions_of_other_rows_are_refused(arguments, tmp_path, capsys, change, complaint):
    path = tmp_path / "dev.csv"
    predictions_of(path, OTHERS, [0.5] * 4)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert benchmark.main([*arguments, "--dev_predictions", str(path)]) == 2
    assert complaint in capsys.readouterr().err


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
