"""--option evaluate: the scores of a fine-tuned model on labelled rows."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from minillama.text.labelled import Row
from minillama.training.evaluation import Evaluation, intervals
from programs import fine_tuned, outputs, run_with


@pytest.fixture
def command(command_of_words):
    fine_tuned(command_of_words)
    return command_of_words


def evaluate(command, *more, **which):
    return run_with(command, "evaluate", *more, **which)


def test_the_scores_are_those_that_the_run_told_and_scikit_learns(command):
    code, out, err = evaluate(command, "--test", "dev.txt", "--json", finetuned="run")
    assert code == 0, err
    found = json.loads(out)
    predicted = [line.split(" ||| ")[0] for line in (command.folder / outputs("finetune")[0]).read_text().splitlines()]
    gold = [line.split(" ||| ")[0] for line in (command.folder / "dev.txt").read_text().splitlines()]
    assert found["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(predicted, gold, strict=True)]))
    scores = precision_recall_fscore_support(gold, predicted, zero_division=0)
    for k, name in enumerate(["in", "of"]):
        assert list(found["classes"][name].values()) == pytest.approx([float(part[k]) for part in scores])
    assert found["macro_f1"] == pytest.approx(float(np.mean(scores[2])))
    low, high = found["accuracy_interval"]
    assert 0 <= low <= found["accuracy"] <= high <= 1 and found["rows"] == len(gold)


def test_as_text_it_has_the_classes_and_the_confusion_matrix(command):
    code, out, _ = evaluate(command, "--test", "dev.txt", "--test_out", "made.csv")
    assert (
        code == 0
        and "95 % interval" in out
        and "confusion matrix" in out
        and "chance 0.500; the commonest class, in, 0.500" in out
    )
    with (command.folder / "made.csv").open(encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)][0].startswith("a bad dull film")
    assert (command.folder / "runs" / "predictions" / "made.csv.json").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "--option evaluate needs --test FILE"),
        ("1 ||| a\n1 ||| b\n", "or the same one in all rows, so there is nothing to score; --option classify"),
        ("2 ||| a\n1 ||| b\n", "line 1: label '2' is none of 0 to 1 (in, of)"),
        ("off ||| a\n1 ||| b\n", """label 'off' is none of 0 to 1 (in, of); the nearest is "of"; correct it"""),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_in_one_line(command, content, message):
    (command.folder / "x.txt").write_text(content or "", encoding="utf-8")
    code, out, err = evaluate(command, *(["--test", "x.txt"] if content else []))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_the_interval_of_macro_f1_holds_it_as_often_as_it_says():
    """Drawn anew 200 times, the interval of 150 rows has the F1 of the whole population 95 times of 100, within 6."""
    generator = np.random.default_rng(3)
    confusion = np.array([[0.4, 0.1], [0.15, 0.35]])
    true = float(np.mean(2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1))))
    hits = 0
    for _ in range(200):
        cells = generator.choice(4, size=150, p=confusion.flatten())
        rows = [Row(int(cell) // 2, "x") for cell in cells]
        made = Evaluation([int(cell) % 2 for cell in cells], 0.0, 0.0, confusion=[[0, 0], [0, 0]])
        low, high = intervals(made, rows, seed=1, draws=200)["macro_f1"]
        hits += low <= true <= high
    assert 178 <= hits <= 198
