"""A run's folder: options, metrics, log, the state to resume from, and a lock.

    options.json     the resolved options, and the versions of Python, torch and the project
    metrics.jsonl    a line for each step and each epoch, and a last line with the scores of dev and test
    log.txt          the messages of the run
    last.pt          everything that training needs to resume (with FSDP a folder of shards, named in last.json); of a
                     finished run without --keep_state only its position and checksum
    best.pt          the best model so far
    lock             the id of the process that trains the run, which locks this file
    events.*         the same metrics for TensorBoard, if it is installed

`last` and `best` are replaced atomically, so a crash leaves the version before. The lock ends with its process, even
if this is killed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch

from minillama.environment import is_still_at, project_commit, try_lock
from minillama.formats.files import atomic_file, read_torch, write_json, write_torch
from minillama.formats.names import RUN_FILES
from minillama.training.loggers import TensorBoard

_locked: set[Path] = set()  # lock files locked by this process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a run's folder. Raises ValueError if another process has locked it, or if locking fails."""
    path = folder.resolve() / "lock"
    with _open_lock(folder / "lock") as file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _locked.add(path)
        try:
            yield
        finally:
            _locked.discard(path)


def _open_lock(path: Path) -> IO[str]:
    """The lock file, created if missing, open and locked."""
    while True:
        try:
            file = path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}; give another --run_dir") from error
        is_ours = try_lock(file)
        file.seek(0)
        owner = file.read(20).strip()
        if is_ours and is_still_at(path, file):
            if owner and not owner.isdigit():
                file.close()
                raise ValueError(f"{path} already exists and is not the lock of a run; give another --run_dir")
            return file
        file.close()
        if not is_ours:
            who = f"process {owner}" if owner.isdigit() else "another process"
            raise ValueError(f"{path.parent} is still being trained by {who}; wait until it ends, or stop it")
        # Otherwise the owner has just removed the file, so the loop tries again.


@contextmanager
def new_run(named: str | None, parent: Path, option: str) -> Iterator[Path]:
    """Creates and locks the folder of a new run: `named`, or under `parent` with a name from the time and the option.

    If the block ends without options.json in the folder, everything created is removed. Raises ValueError if the folder
    holds a run, is locked by another process, or cannot be created.
    """
    stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{option}"
    for i in count(1):
        path = Path(named) if named else parent / (stem if i == 1 else f"{stem}-{i}")
        made = _make_folders(path)
        if named or path in made:
            break
    lock = path / "lock"
    free = False
    made_lock = not lock.exists()
    try:
        with locked(path):
            try:
                RunDirectory(path).check_free()
                free = True
                yield path
            finally:
                # Removed under the lock: a process that opened the file meanwhile notices, and creates another.
                if made_lock and not (free and (path / "options.json").exists()):
                    with suppress(OSError):  # Windows removes no open file
                        lock.unlink()
    finally:
        _remove_empty(made)


def _make_folders(path: Path, tries: int = 20) -> list[Path]:
    """Creates a folder and its missing parents; returns the created ones, the deepest first.

    Raises ValueError, and removes what it created, if this fails.
    """
    made: list[Path] = []
    for folder in (*reversed(path.parents), path):
        try:
            if not folder.is_dir():
                folder.mkdir()
                made.insert(0, folder)
        except OSError as error:
            # Another process may have created this folder just now, or removed a parent that it had created.
            if isinstance(error, FileExistsError | FileNotFoundError) and tries:
                return _make_folders(path, tries - 1) + made
            _remove_empty(made)
            if folder.is_file():
                raise ValueError(f"{folder} is a file; --run_dir takes a folder, new or empty") from error
            raise ValueError(f"{folder} cannot be created: {error.strerror}; give another --run_dir") from error
    return made


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty, or gone
            folder.rmdir()


def latest_run_path(parent: Path) -> Path:
    """The folder of the last active run under `parent`. Raises FileNotFoundError without any run.

    If that run is still being trained, it is the last run that stopped before its end, if any.
    """
    runs = [path.parent for path in parent.glob("*/options.json")]
    if not runs:
        raise FileNotFoundError(f"there is no run under {parent} to resume; name its folder with --run_dir")

    def active(run: Path) -> float:
        """The time of its last change, except in the lock: a command that refuses to resume changes the lock too."""
        files = (run / name for name in RUN_FILES if name != "lock")
        return max(file.stat().st_mtime for file in files if file.exists())

    latest, *earlier = sorted(runs, key=active, reverse=True)
    if is_locked(latest):
        return next((run for run in earlier if not is_locked(run) and not is_finished(run)), latest)
    return latest


def is_locked(run: Path) -> bool:
    """Whether a process trains the run."""
    try:
        with (run / "lock").open("rb") as file:
            return not try_lock(file)
    except OSError:  # without a lock
        return False


def is_finished(run: Path) -> bool:
    """Whether a run's metrics have their last line, the final scores."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()[-1:] if path.exists() else []
    return any(b'"final": true' in line for line in lines)


class RunDirectory:
    """One run's folder. Only the process with `writes` changes it; the others only read it."""

    def __init__(self, path: str | os.PathLike[str], writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self.metrics_path = self.path / "metrics.jsonl"
        self.best_path = self.path / "best.pt"
        self.last_path = self.path / "last.pt"
        self.shards_path = self.path / "last.json"  # names the folder of the last good shards
        self.tensorboard = TensorBoard(self.path)
        self.saved_bytes = 0  # of the metrics, at the state that was read
        self.end: dict[str, Any] = {}  # the position and the checksum of a finished run

    def check_free(self) -> None:
        """Raises ValueError if the folder holds a run, or a part of one."""
        if (self.path / "options.json").exists():
            raise ValueError(f"{self.path} holds a run; add --resume to resume it, or give another --run_dir")
        for path in (self.last_path, self.shards_path, self.best_path, self.metrics_path):
            if path.exists():
                raise ValueError(f"{path} already exists, but no options.json; give another --run_dir, new or empty")

    def create(self, options: dict[str, Any]) -> None:
        """Writes the options into the folder, which exists (see `new_run`)."""
        if not self.writes:
            return
        versions = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
        write_json(
            self.path / "options.json", {"options": options, "versions": {**versions, "commit": project_commit()}}
        )

    def change_options(self, **values: Any) -> None:
        """Replaces some of the saved options."""
        path = self.path / "options.json"
        if self.writes:
            content = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, content | {"options": content["options"] | values})

    def options(self) -> dict[str, Any]:
        """The options of the run. Raises FileNotFoundError or ValueError if they are missing or damaged."""
        path = self.path / "options.json"
        try:
            options = json.loads(path.read_text(encoding="utf-8"))["options"]
            if not isinstance(options, dict):
                raise TypeError("no options")
            return options
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path} holds no run (no options.json); leave out --resume") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; the run cannot be resumed") from error

    def metric(self, step: int, **values: Any) -> None:
        """Adds a line to the metrics, and its numbers to TensorBoard's events."""
        if not self.writes:
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.tensorboard.metric(step, {name: value for name, value in values.items() if isinstance(value, float)})

    def finish(self, **scores: Any) -> None:
        """Adds the last line to the metrics: the scores of the best model. Resuming removes the line again."""
        if not self.writes:
            return
        with self.metrics_path.open("r+", encoding="utf-8") as file:
            step = json.loads(file.read().splitlines()[-1])["step"]
            file.write(json.dumps({"step": step, "final": True, **scores}) + "\n")

    def log(self, line: str) -> None:
        """Adds a line to the log."""
        if self.writes:
            with (self.path / "log.txt").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def save(self, state: dict[str, Any]) -> None:
        """Replaces last.pt by `state` and the current size of the metrics."""
        if not self.writes:
            return
        self._settle_metrics()
        write_torch(self.last_path, state | {"metrics_bytes": self._metrics_bytes()})

    def load(self) -> dict[str, Any] | None:
        """The last saved state, or None; see `rewind_metrics`. Raises ValueError if it is damaged."""
        state = read_torch(self.last_path) if self.last_path.exists() else None
        if state is not None and not (isinstance(state, dict) and "base" in state and "metrics_bytes" in state):
            raise ValueError(f"{self.last_path} is not the state of a run; restore it, or start a new run")
        self.saved_bytes = state["metrics_bytes"] if state else 0
        return state

    def rewind_metrics(self) -> None:
        """Cuts the metrics back to the state that was read, because later steps will be repeated, and removes
        half-written files.

        This happens under the lock, and only if this process writes. Raises ValueError if lines are missing, or if
        another process has the lock.
        """
        found, size = self._metrics_bytes(), self.saved_bytes
        if found < size:
            raise ValueError(f"{self.metrics_path} has {found} of {size} bytes; restore it, or start a new run")
        if not self.writes:
            return
        with nullcontext() if self.path.resolve() / "lock" in _locked else locked(self.path):
            if found > size:
                os.truncate(self.metrics_path, size)
            for name in (self.last_path.name, self.shards_path.name, self.best_path.name):
                for half in self.path.glob(f".{name}.*.tmp"):
                    half.unlink()

    def note_end(self, end: dict[str, Any]) -> None:
        """Notes the end of training, for `drop_state`: the position and the checksum, as in the whole state."""
        self.end = end | {"metrics_bytes": self._metrics_bytes()}

    def drop_state(self) -> None:
        """Removes the weights and the optimizer's state of the finished run. Its position and checksum stay, so that a
        resumed run still checks its data, and predicts again from best.pt.
        """
        if not self.writes or not self.end:
            return
        write_torch(self.last_path, self.end)
        self.shards_path.unlink(missing_ok=True)
        for shards in self.path.glob("last-*"):
            shutil.rmtree(shards, ignore_errors=True)

    def _metrics_bytes(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def _settle_metrics(self) -> None:
        """Waits until the metrics are on disk, before a state refers to them."""
        if self.metrics_path.exists():
            with self.metrics_path.open("ab") as file:  # Windows flushes no file that is open for reading only
                os.fsync(file.fileno())

    # Sharded states: a new folder for each save, and a file with its name, which is replaced last

    def save_shards(self, name: str, state: dict[str, Any], wait: Callable[[], None]) -> None:
        """Saves the shards of all processes in a new folder; every process calls this. wait: waits for all processes.

        Raises OSError, and keeps the last good folder, if a shard cannot be written.
        """
        from torch.distributed import checkpoint

        folder = self.path / f"last-{name}"
        if self.writes:
            shutil.rmtree(folder, ignore_errors=True)
            self._settle_metrics()
        wait()
        try:
            checkpoint.save(state, checkpoint_id=folder)
        except BaseException as error:
            if self.writes:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, checkpoint.CheckpointException):  # has the failures of all processes
                causes = [failure for failure, _ in error.failures.values()]
                full_disk = [failure for failure in causes if isinstance(failure, OSError)]
                reasons = "; ".join(dict.fromkeys(map(str, full_disk or causes)))
                raise OSError(f"the shards could not be saved: {reasons}") from error
            raise
        wait()
        if self.writes:
            with atomic_file(self.shards_path) as file:
                json.dump({"folder": folder.name, "metrics_bytes": self._metrics_bytes()}, file)
            for old in self.path.glob("last-*"):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def load_shards(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with the values saved in `folder`. Raises ValueError if they are damaged."""
        from torch.distributed import checkpoint

        try:
            checkpoint.load(state, checkpoint_id=folder)
        except (checkpoint.CheckpointException, EOFError, OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder}, the run's last state, is damaged; restore it, or start a new run") from error
        return state

    def shards(self) -> Path | None:
        """The folder of the last good shards, or None; see `rewind_metrics`."""
        pointer = self.shards_path
        try:
            saved = json.loads(pointer.read_text(encoding="utf-8")) if pointer.exists() else None
            size = int(saved["metrics_bytes"]) if saved else 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{pointer} is damaged; restore it, or start a new run") from error
        self.saved_bytes = size
        return self.path / saved["folder"] if saved else None
