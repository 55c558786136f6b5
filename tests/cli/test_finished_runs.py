"""Finished runs: found, and read from their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillama.cli.finished_runs import find_runs, logged_matrices, read_run
from minillama.commands.report import page
from reported_runs import GOLD, GUESS, a_run, classes_log
from run_llama import COMMANDS


def test_the_last_matrix_of_a_log_counts(tmp_path):
    found = logged_matrices(classes_log("dev", GUESS) + "dev took 1 s\ntest took 2 s\n" + classes_log("dev", GOLD))
    assert list(found) == ["dev"] and [found["dev"][1][i][i] for i in range(3)] == [2, 3, 3]


@pytest.mark.parametrize("count", ["0", "7" * 5000, "\u0663"])
def test_a_matrix_that_gives_no_accuracy_is_none(tmp_path, count):
    log = "dev took 1.0 s\n\nconfusion matrix (of):\nN N bad\nN N good\n\n"
    assert logged_matrices(log.replace("N", "2")) == {"dev": (["bad", "good"], [[2, 2], [2, 2]])}
    log = log.replace("N", count)
    assert logged_matrices(log) == {}
    run = read_run(a_run(tmp_path / "run", [0.5], f"{log}epoch {'9' * 5000}: 1\n    text\n"), "run", COMMANDS)
    assert "dev: no gold labels" in run.missing and page([run])


def test_relative_folders_and_parents_are_found_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(Path("runs/a"), [0.5]), a_run(Path("runs/deeper/b"), [0.5])
    assert [path.name for path in find_runs(["runs", "runs/a", str(tmp_path / "runs/deeper")])] == ["a", "b"]
