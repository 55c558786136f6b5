"""Runs a student's modules on probes, in processes of their own with limits, and gives back arrays.

Each run gets a fresh copy of the folder in a temporary place. What comes back are numbers only; they are compared with
the right answers in this process, which never loads a student's code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minillama.environment import HERE
from minillama.grading import wire
from minillama.grading.confinement import NOBODY, Limits
from minillama.grading.kit import solved_text
from minillama.grading.kit_setups import PLAIN, Setup
from minillama.grading.parts import Case
from minillama.grading.reading import HOMES

OURS = ("config", "rope", "llama")  # modules with the parts that may be replaced, each after those that it imports
PROVIDED = ("config.py", "tokenizer.py")  # ours are taken if a folder has none
COMPANIONS = {"llama": ("config", "rope")}  # modules of ours that a module of ours needs
SKIPPED = {"__pycache__", "node_modules", "venv", "env", "runs", "data"}  # and all names that begin with a dot
LARGEST_FILE = 2 << 20  # bytes; larger ones, such as checkpoints, are not copied
LARGEST_COPY = 30 << 20
MOST_FILES = 2000
DEFAULT_LIMITS = Limits()
START = 300.0  # seconds that the import of torch may take
# What `unshare` takes away: the network, and other processes. The first line is for root.
NAMESPACES = (
    ("--net", "--pid", "--fork", "--kill-child"),
    ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
    ("--user", "--map-root-user", "--net"),
)


class SandboxError(RuntimeError):
    """The harness itself does not start or answer."""


class Problem(NamedTuple):
    """An exception of a student's code: its type and text, and the innermost line of the student's files, if any.

    rule: how it broke a rule, in words. module: the module that does not load, if that was it. inside: whether the
    student's line itself raised it, and no library.
    """

    type: str
    text: str
    file: str = ""
    line: int = 0
    function: str = ""
    rule: str = ""
    module: str = ""
    inside: bool = False

    @property
    def words(self) -> str:
        """`KeyError: x`."""
        return f"{self.type}: {self.text}" if self.text else self.type

    @property
    def place(self) -> str:
        """`llama.py, line 12 (forward)`; "" if it is outside the student's files."""
        function = f" ({self.function})" if self.function and self.function != "<module>" else ""
        return f"{self.file}, line {self.line}{function}" if self.file else ""


@dataclass
class Run:
    """The outcome of a run. answers: arrays of each probe that has an answer, by its index. problems: exceptions.

    end: why the run ended before its last probe, in words; "" if it did not. at: the probe it was at, if any. loading:
    the module that was being loaded then, if any. loads: all modules that began to load; open: those that did not end.
    stand_ins: the problem with putting in our parts, if any. done: whether it came to its end.
    """

    answers: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    problems: dict[int, Problem] = field(default_factory=dict)
    end: str = ""
    at: int | None = None
    loading: str = ""
    loads: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    stand_ins: Problem | None = None
    done: bool = False
    seconds: float = 0.0


class Sandbox:
    """Runs the modules of one folder. Use it in a `with` statement: it holds a process and a temporary folder."""

    def __init__(self, folder: Path, setup: Setup, limits: Limits = DEFAULT_LIMITS) -> None:
        self.folder, self.setup, self.limits = folder, setup, limits
        self.ours: set[str] = set()  # modules of the folder that are replaced by ours
        self.process: subprocess.Popen[bytes] | None = None
        self.channel = -1
        self.place = Path(tempfile.mkdtemp(prefix="grade-"))
        os.chmod(self.place, 0o711)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        shutil.rmtree(self.place, ignore_errors=True)

    def put_ours(self, module: str) -> None:
        """Takes our module in the place of the folder's from now on, with those of ours that it needs.

        The module that a part is about stays the student's.
        """
        self.ours |= {module, *COMPANIONS.get(module, ())}

    def start(self) -> None:
        """Starts the harness without waiting for it."""
        if self.process is not None:
            return
        reader, writer = os.pipe()
        wrapped = ["unshare", *namespaces()] if namespaces() else []
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
        environment |= {"PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": "", "HOME": str(self.place)}
        with (self.place / "harness.txt").open("wb") as log:
            self.process = subprocess.Popen(
                [*wrapped, sys.executable, "-m", "minillama.grading.harness", str(writer)],
                cwd=HERE,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writer],
                start_new_session=True,
            )
        os.close(writer)
        self.channel, self.ready = reader, False

    def close(self) -> None:
        """Ends the harness and all that it started."""
        if self.process is None:
            return
        self.process.kill()  # with --kill-child, the namespace ends with it
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        os.close(self.channel)
        self.process = None

    def run(self, part: str, cases: Sequence[Case], stand_ins: Sequence[str] = ()) -> Run:
        """Runs the probes of a part, with our own parts in the place of those named in `stand_ins`."""
        started = time.monotonic()
        run = Run()
        copy = self.copy(HOMES[part])
        header, arrays = request(part, self.setup, cases, stand_ins, copy, self.limits)
        try:
            self.start()
            self.wait_until_ready()
            assert self.process is not None and self.process.stdin is not None
            wire.send(self.process.stdin.fileno(), wire.packed(header, arrays))
            deadline = time.monotonic() + self.limits.wall + 30
            while "end" not in (message := self.message(deadline))[0]:
                note(run, *message, len(cases))
            run.end = run.end or str(message[0]["end"])
        except (wire.BadMessage, TimeoutError, BrokenPipeError, SandboxError) as error:
            if not self.ready:
                raise SandboxError(f"the grader's process does not start: {self.log()}") from error
            run.end = run.end or "it ended the process that runs it"
            self.close()
        finally:
            shutil.rmtree(copy.parent, ignore_errors=True)
        if not run.end and not run.done:
            run.end = "the process ended before it had answered, as with os._exit"
        if not run.end:
            run.at = None
        run.seconds = time.monotonic() - started
        return run

    def wait_until_ready(self) -> None:
        if not self.ready:
            self.message(time.monotonic() + START)
            self.ready = True

    def message(self, deadline: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        raw = wire.receive(self.channel, deadline)
        if raw is None:
            raise SandboxError("the process has ended")
        return wire.unpacked(raw)

    def log(self) -> str:
        lines = (self.place / "harness.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it says nothing"

    def copy(self, kept: str) -> Path:
        """A fresh copy of the folder, with our config.py, tokenizer.py and package where it has none.

        Modules that are replaced are ours, except the one named `kept`.
        """
        copy = Path(tempfile.mkdtemp(prefix="run-", dir=self.place)) / "hand-in"
        os.chmod(copy.parent, 0o711)
        copy.mkdir()
        copy_files(self.folder, copy)
        for name in PROVIDED:
            if not (copy / name).exists():
                shutil.copyfile(HERE / name, copy / name)
        for module in self.ours - {kept}:
            (copy / f"{module}.py").write_text(our_text(self.setup, f"{module}.py"), encoding="utf-8")
        if "llama" in self.ours:  # ours needs our package
            shutil.rmtree(copy / "minillama", ignore_errors=True)
        if not (copy / "minillama").exists():
            shutil.copytree(HERE / "minillama", copy / "minillama", ignore=shutil.ignore_patterns("grading"))
        if os.geteuid() == 0:  # the student's process becomes another user
            for top, _, names in os.walk(copy):
                for path in (top, *(os.path.join(top, name) for name in names)):
                    os.chown(path, NOBODY, NOBODY)
        return copy


def our_text(setup: Setup, name: str) -> str:
    """Our module for a setup: this repository's for an edition, as its `generate` knows every rule, and the solution's
    for a variant.
    """
    if setup == PLAIN[setup.edition]:
        return (HERE / name).read_text(encoding="utf-8")
    return solved_text(setup, name)


def judged_files(source: Path) -> list[Path]:
    """The files of moderate size in a folder; no links, caches, data or hidden files."""
    found: list[Path] = []
    size = 0
    for top, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if kept(name) and not os.path.islink(os.path.join(top, name)))
        for name in sorted(names):
            path = Path(top, name)
            if not kept(name) or name.endswith(".pyc") or path.is_symlink() or not path.is_file():
                continue
            length = path.stat().st_size
            if length <= LARGEST_FILE and size + length <= LARGEST_COPY and len(found) < MOST_FILES:
                size += length
                found.append(path)
    return found


def copy_files(source: Path, into: Path) -> None:
    """Copies the files that are judged."""
    for path in judged_files(source):
        target = into / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def kept(name: str) -> bool:
    return not name.startswith(".") and name not in SKIPPED


def request(
    part: str, setup: Setup, cases: Sequence[Case], stand_ins: Sequence[str], copy: Path, limits: Limits
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The message that asks the harness for a run."""
    header = {
        "part": part,
        "folder": str(copy),
        "stand_ins": list(stand_ins),
        "ours": {name: solved_text(setup, f"{name}.py") for name in (OURS if stand_ins else ())},
        "causal": setup.causal_argument,
        "limits": limits._asdict(),
        "cases": [[case.name, case.settings, list(case.arrays)] for case in cases],
    }
    arrays = {f"{i}.{j}": array for i, case in enumerate(cases) for j, array in enumerate(case.arrays.values())}
    return header, arrays


def note(run: Run, header: dict[str, Any], arrays: dict[str, np.ndarray], count: int) -> None:
    """Adds a message of the student's process to a run. Nothing in it is trusted."""
    if isinstance(reason := header.get("stop"), str):
        run.end = run.end or reason[:300]
    elif isinstance(module := header.get("loading"), str):
        run.loads.append(module[:50])
        run.open.append(module[:50])
        run.loading = run.open[-1]
    elif "loaded" in header:
        run.open = run.open[:-1]
        run.loading = run.open[-1] if run.open else ""
    elif header.get("done") is True:
        run.done = True
    elif isinstance(found := header.get("stand_ins"), dict):
        run.stand_ins = problem_of(found)
    elif isinstance(i := header.get("begin", header.get("case")), int) and 0 <= i < count:
        run.at = i
        if isinstance(found := header.get("error"), dict):
            run.problems[i] = problem_of(found)
        elif "case" in header:
            run.answers[i] = arrays


def problem_of(found: dict[str, Any]) -> Problem:
    """A problem from the values of a message; wrong types become empty ones."""
    kinds = {"type": str, "text": str, "file": str, "function": str, "rule": str, "module": str}
    texts = {name: str(found[name])[:300] for name in kinds if isinstance(found.get(name), str)}
    line = found["line"] if isinstance(found.get("line"), int) else 0
    return Problem(**({"type": "Exception", "text": ""} | texts), line=line, inside=found.get("inside") is True)


@lru_cache(maxsize=1)
def namespaces() -> tuple[str, ...]:
    """The options of `unshare` that the system allows; empty if none."""
    program = shutil.which("unshare")
    for options in NAMESPACES[0 if os.geteuid() == 0 else 1 :] if program and os.name == "posix" else ():
        try:
            done = subprocess.run([str(program), *options, "true"], capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ()
        if done.returncode == 0:
            return options
    return ()
