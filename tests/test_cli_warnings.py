"""Warnings of a training command about its data and about a model that has learnt too little."""

from __future__ import annotations

import pytest

from minillama.cli import checks
from minillama.training import classification, evaluation


def test_a_model_that_gives_one_answer_is_told_while_it_trains_and_at_the_end(command, monkeypatch):
    def alone(model, rows, batch_size, **settings):
        return evaluation.Evaluation([1] * len(rows), 0.5, 1 / 3, 1.0, [[0, 6], [0, 6]])

    for module in (evaluation, classification):
        monkeypatch.setattr(module, "evaluate", alone)
    code, _, err = command("finetune", "--epochs", "3", "--run_dir", "run", "--class_weights", "balanced")
    told = [line for line in err.splitlines() if line.startswith("warning: dev: all 12 rows")]
    assert code == 0 and len(told) == 2 and told[0] == told[1]
    assert told[0].endswith('as "good", the class of 50.0% of them; try more --epochs, or a higher or lower --lr')
    assert (command.folder / "run" / "log.txt").read_text(encoding="utf-8").count(told[0]) == 2


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_the_same_rows_for_train_and_dev_are_told(command, option):
    warning = "warning: --train and --dev have the same 12 rows (train.txt{}): the dev scores show what was learnt by"
    assert warning.format(" and dev.txt") in command(option, "--run_dir", "a")[2]
    assert warning.format("") in command(option, "--run_dir", "b", "--dev", "train.txt")[2]
    path = command.folder / "dev.txt"
    path.write_text("1 ||| another\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert "the same 12 rows" not in command(option, "--run_dir", "c")[2]


def test_few_rows_of_dev_are_told_with_what_their_accuracy_can_be_off_by(command, monkeypatch):
    path = command.folder / "dev.txt"
    path.write_text("1 ||| another\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    err = command("finetune", "--run_dir", "a", "--epochs", "1")[2]
    assert (
        "warning: dev has 13 rows: a share of them that is right can be off by 0.28 (95 %); give --dev more rows" in err
    )
    monkeypatch.setattr(checks, "FEW_ROWS", 13)
    assert "can be off by" not in command("finetune", "--run_dir", "b")[2]


def test_a_dev_score_below_the_commonest_class_is_told_at_the_end_alone(command, monkeypatch):
    def poor(model, rows, batch_size, **settings):
        return evaluation.Evaluation([0, 1] * (len(rows) // 2 - 1) + [1, 1], 5 / 12, 0.4, 1.0, [[0, 6], [0, 6]])

    for module in (evaluation, classification):
        monkeypatch.setattr(module, "evaluate", poor)
    code, _, err = command("finetune", "--epochs", "2")
    told = [line for line in err.splitlines() if line.startswith("warning: dev ")]
    assert code == 0 and told == [
        'warning: dev accuracy 0.417 is below 0.500, the share of its commonest class, "bad"; '
        "try more --epochs, a higher or lower --lr, or --class_weights balanced"
    ]
    assert "warning: dev " not in command("prompt")[2]  # has nothing to train
