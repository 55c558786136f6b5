"""Finished runs: found, and read from their files."""

from __future__ import annotations

from pathlib import Path

from minillama.cli.finished_runs import find_runs
from reported_runs import a_run


def test_relative_folders_and_parents_are_found_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(Path("runs/a"), [0.5]), a_run(Path("runs/deeper/b"), [0.5])
    assert [path.name for path in find_runs(["runs", "runs/a", str(tmp_path / "runs/deeper")])] == ["a", "b"]
