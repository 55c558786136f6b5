"""The folder of a run: it belongs to one process, and its lock lives as long as that process."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from conftest import ROOT
from minillama import environment
from minillama.environment import try_lock
from minillama.formats.files import link_or_copy
from minillama.training import run_directory
from minillama.training.run_directory import RunDirectory, latest_run_path, locked, new_run

OTHER = "import os, sys; from pathlib import Path; from minillama.training.run_directory import locked\n"
OTHER += "with locked(Path(sys.argv[1])): print(os.getpid(), flush=True); sys.stdin.read()"


@contextlib.contextmanager
def another_process_trains(folder):
    """Yields the process, which has the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == f"{process.pid}\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def same_second(monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_directory, "datetime", Clock)


def content(folder):
    """Every file with what is in it and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# Folders


def test_runs_of_one_second_get_folders_of_their_own(tmp_path, same_second):
    together = threading.Barrier(16)
    names = []

    def a_run(_):
        together.wait()
        with new_run(None, tmp_path / "runs", "finetune") as path:
            names.append(path.name)
            together.wait()
            RunDirectory(path).create({})

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(a_run, range(16)))
    stem = "2026-01-02-030405-finetune"
    assert sorted(names) == sorted([stem, *(f"{stem}-{i}" for i in range(2, 17))])


def test_a_folder_in_which_no_run_began_is_removed_with_those_made_above_it(tmp_path):
    for named in (None, str(tmp_path / "runs" / "deep" / "mine")):
        with pytest.raises(ZeroDivisionError), new_run(named, tmp_path / "runs", "lora") as path:
            assert (path / "lock").is_file()
            raise ZeroDivisionError
        assert not any(tmp_path.iterdir())


def test_what_was_there_before_a_failure_stays(tmp_path):
    mine = tmp_path / "runs" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine", encoding="utf-8")
    before = content(tmp_path)
    for named in (str(mine), None):
        with pytest.raises(ZeroDivisionError), new_run(named, tmp_path / "runs", "lora"):
            raise ZeroDivisionError
        assert content(tmp_path) == before and list((tmp_path / "runs").iterdir()) == [mine]


def test_a_run_that_began_keeps_its_folder_and_its_lock_file(tmp_path):
    with pytest.raises(ZeroDivisionError), new_run(None, tmp_path / "runs", "lora") as path:
        RunDirectory(path).create({"seed": 1})
        raise ZeroDivisionError
    assert RunDirectory(path).options() == {"seed": 1}
    assert (path / "lock").read_text(encoding="utf-8") == f"{os.getpid()}\n"


def test_failing_runs_do_not_take_the_folder_above_from_one_that_starts(tmp_path):
    def fails(_):
        with pytest.raises(ZeroDivisionError), new_run(None, tmp_path / "runs", "lora"):
            raise ZeroDivisionError

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fails, range(400)))
    assert not any(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("name", ["file", "file/run", f"new/{'x' * 300}", "link"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line_and_nothing_is_left(tmp_path, name):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to("nowhere")
    message = "(is a file; --run_dir takes a folder|cannot be created: .*; give another --run_dir)"
    with pytest.raises(ValueError, match=message) as told, new_run(str(tmp_path / name), tmp_path, "lora"):
        pass
    assert "\n" not in str(told.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_the_latest_run_is_the_one_that_was_trained_last_not_the_one_that_was_locked_last(tmp_path):
    for seconds, name in enumerate(("older", "newer"), start=1):
        with new_run(str(tmp_path / name), tmp_path, "lora") as path:
            RunDirectory(path).create({})
        os.utime(path / "options.json", (seconds, seconds))
    with locked(tmp_path / "older"):
        (tmp_path / "older" / ".last.pt.x.tmp").symlink_to("a file that was renamed a moment ago")
        assert latest_run_path(tmp_path) == tmp_path / "newer"
    with locked(tmp_path / "newer"):  # still going: the one that stopped is meant, unless it has ended
        assert latest_run_path(tmp_path) == tmp_path / "older"
        (tmp_path / "older" / "metrics.jsonl").write_text('{"step": 1, "final": true, "dev_accuracy": 1.0}\n')
        os.utime(tmp_path / "older" / "metrics.jsonl", (1, 1))
        assert latest_run_path(tmp_path) == tmp_path / "newer"


# The lock


def test_a_run_that_is_going_is_refused_by_the_number_of_its_process_until_that_is_killed(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    with another_process_trains(path) as process:
        before = content(path)
        message = f"{path} is still being trained by process {process.pid}; wait until it ends, or stop it"
        for start in (lambda: new_run(str(path), tmp_path, "lora"), lambda: locked(path)):
            with pytest.raises(ValueError, match=message), start():
                pass
        assert content(path) == before
        process.kill()
        process.wait()
    with new_run(str(path), tmp_path, "lora"):
        assert (path / "lock").read_text(encoding="utf-8") == f"{os.getpid()}\n"


def test_of_many_that_start_with_one_new_name_one_does(tmp_path):
    together, outcomes = threading.Barrier(8), []

    def a_run(_):
        together.wait()
        try:
            with new_run(str(tmp_path / "run"), tmp_path, "lora") as path:
                RunDirectory(path).create({})
                outcomes.append("ran")
        except ValueError as error:
            outcomes.append(str(error).partition("; ")[2])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(a_run, range(8)))
    assert outcomes.count("ran") == 1
    refusals = {"wait until it ends, or stop it", "add --resume to resume it, or give another --run_dir"}
    assert len(outcomes) == 8 and set(outcomes) <= refusals | {"ran"}


def test_a_lock_that_its_owner_removed_is_made_anew(tmp_path, monkeypatch):
    """Its file may be open here already: to lock that would keep nobody out."""
    locks = []

    def removed_first(file, wait=False):
        locks.append(file)
        if len(locks) == 1:
            (tmp_path / "lock").unlink()
        return try_lock(file, wait)

    monkeypatch.setattr(run_directory, "try_lock", removed_first)
    with locked(tmp_path):
        assert len(locks) == 2 and (tmp_path / "lock").exists()
        with pytest.raises(ValueError, match="is still being trained"), locked(tmp_path):
            pass


@pytest.mark.parametrize("code", [None, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_a_run_goes_on_without(tmp_path, monkeypatch, code):
    def refuses(*_):
        raise OSError(code, "no locks")

    if code is None:
        monkeypatch.setattr(environment, "fcntl", None)
    else:
        monkeypatch.setattr(environment.fcntl, "flock", refuses)
    with new_run(None, tmp_path, "lora") as path:
        RunDirectory(path).create({})
    with locked(path):
        assert RunDirectory(path).load() is None


@pytest.mark.parametrize("text", [b"my notes", b"\xff\xfe"])
def test_a_file_named_lock_that_is_none_stays(tmp_path, text):
    (tmp_path / "lock").write_bytes(text)
    with pytest.raises(ValueError, match="lock already exists and is not the lock of a run"), locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_bytes() == text


def test_only_who_has_the_lock_removes_half_written_files_and_lines(tmp_path):
    run = RunDirectory(tmp_path)
    half = tmp_path / ".best.pt.x1y2.tmp"
    half.write_text("being written", encoding="utf-8")
    run.metrics_path.write_text('{"step": 1}\n', encoding="utf-8")
    with another_process_trains(tmp_path):
        before = content(tmp_path)
        for read in (run.load, run.shards):
            read()
            with pytest.raises(ValueError, match="is still being trained by process"):
                run.rewind_metrics()
        assert content(tmp_path) == before
    with locked(tmp_path):
        run.load()
        run.rewind_metrics()
    assert not half.exists() and run.metrics_path.read_text(encoding="utf-8") == ""


# The best model under its other name


def test_models_that_take_one_name_at_once_leave_one_of_them_whole_and_nothing_else(tmp_path):
    target = tmp_path / "finetune-5-2e-05.pt"
    bystander = tmp_path / f"{target.name}.tmp"
    bystander.write_text("of another program", encoding="utf-8")
    sources = [tmp_path / f"{i}.pt" for i in range(8)]
    for source in sources:
        source.write_text(source.name * 1000, encoding="utf-8")

    def many_times(source):
        for _ in range(50):
            link_or_copy(source, target)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(many_times, sources))
    assert any(target.samefile(source) for source in sources)
    assert {path.name for path in tmp_path.iterdir()} == {target.name, bystander.name, *(s.name for s in sources)}
    assert bystander.read_text(encoding="utf-8") == "of another program"
