"""The process that runs a student's code: `python -m minillama.grading.harness FD`, started by sandbox.py.

It imports torch once, then forks a child for each run, which alone loads the student's modules. The child gets a copy
of the folder and the probes, never a right answer, and gives back arrays over a pipe. This process keeps the channel to
the grader, watches the clock, and ends what the child leaves behind.
"""

from __future__ import annotations

import errno
import importlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from minillama.environment import HERE
from minillama.grading import calls, loading, stand_ins, wire
from minillama.grading.confinement import (
    Limits,
    adopt_orphans,
    end_with_parent,
    give_up_root,
    limit_resources,
    restrict_writes,
    shown,
    watch,
)
from minillama.grading.parts import Case
from minillama.grading.runner import run_case

PAUSE = 0.2  # seconds between two looks at the files that a child writes
STOPPED = 70  # exit status of a child that broke a rule


def main() -> int:
    """Answers the requests of the grader until it closes the channel."""
    channel = int(sys.argv[1])
    adopt_orphans()
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # torch imports it at the first step of an optimizer, seconds later
    wire.send(channel, wire.packed({"ready": True}))
    while (raw := wire.receive(0)) is not None:
        header, arrays = wire.unpacked(raw)
        for reply in run(header, cases_of(header, arrays)):
            wire.send(channel, reply)
    return 0


def cases_of(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[Case]:
    """The probes of a request."""
    cases = []
    for i, (name, settings, names) in enumerate(header["cases"]):
        own = {key: np.array(arrays[f"{i}.{j}"]) for j, key in enumerate(names)}
        cases.append(Case(header["part"], name, settings, own))
    return cases


def run(header: dict[str, Any], cases: list[Case]) -> list[bytes]:
    """Runs the probes in a child; its messages, and last how it ended."""
    folder, limits = Path(header["folder"]), Limits(**header["limits"])
    token = secrets.token_bytes(16)
    reader, writer = os.pipe()
    deadline = time.monotonic() + limits.wall
    if (child := os.fork()) == 0:
        try:
            os.setsid()
            os.close(reader)
            run_child(header, cases, folder, limits, writer, token)
        finally:
            os._exit(1)
    os.close(writer)
    messages, end, size = [], "", 0
    try:
        while True:
            try:
                raw = wire.receive(reader, min(deadline, time.monotonic() + PAUSE), token)
            except TimeoutError:
                if time.monotonic() >= deadline:
                    end = f"it did not finish within {limits.wall:g} seconds"
                elif written(folder) > limits.files:
                    end = f"it wrote more than {limits.files >> 20} MB"
                if end:
                    break
                continue
            if raw is None:
                break
            size += len(raw)
            messages.append(raw)
            if len(messages) > 4 * len(cases) + 100 or size > 4 * wire.LARGEST:
                end = "it answered more than it was asked"
                break
    except wire.BadMessage as error:
        end = f"its answer cannot be read: {error}"
    os.close(reader)
    status = end_child(child)
    output = (folder.parent / "output.txt").stat().st_size
    end = end or ending(status, output, limits)
    return [*messages, wire.packed({"end": end, "output": output})]


def end_child(child: int) -> int:
    """Ends the child and what it started, as far as this can be known; its wait status."""
    for _ in range(50):  # after its last message the child ends by itself
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    for target in (-child,) if done else (-child, child):
        try:
            os.kill(target, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
    if not done:
        _, status = os.waitpid(child, 0)
    for _ in range(20):
        left = [-1] if os.getpid() == 1 else handed_over()
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)  # from process 1 of a namespace, -1 is all others in it
            except (ProcessLookupError, PermissionError):
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.01)
        except ChildProcessError:  # none is left
            break
    return status


def handed_over() -> list[int]:
    """The processes whose parent is now this one, because theirs has ended."""
    found = []
    for entry in os.scandir("/proc") if sys.platform == "linux" else ():
        try:
            values = Path(entry.path, "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:  # it has ended
            continue
        if len(values) > 1 and int(values[1]) == os.getpid():
            found.append(int(entry.name))
    return found


def ending(status: int, output: int, limits: Limits) -> str:
    """How a child ended by itself, in words; "" if it came to its end."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return f"it computed for more than {limits.seconds} seconds"
        return f"the process was ended by signal {number} ({signal.strsignal(number)})"
    if output >= limits.file_size:
        return f"it printed more than {limits.file_size >> 20} MB"
    return "" if os.WEXITSTATUS(status) == 0 else "the process ended early"


def written(folder: Path) -> int:
    """Bytes of all files below a folder, and of the output beside it."""
    total = 0
    for top, _, names in os.walk(folder.parent):
        for name in names:
            try:
                total += os.lstat(os.path.join(top, name)).st_size
            except OSError:
                pass
    return total


def run_child(
    header: dict[str, Any], cases: list[Case], folder: Path, limits: Limits, writer: int, token: bytes
) -> None:
    """The child's life: limits, the student's modules, the probes. Does not return."""
    writer = isolate_files(folder.parent / "output.txt", writer)

    def tell(**header: Any) -> None:
        wire.send(writer, wire.packed(header), token)

    def stop(reason: str) -> None:
        tell(stop=reason)
        os._exit(STOPPED)

    os.chdir(folder)
    tempfile.tempdir = str(folder)
    os.environ.update(HOME=str(folder), TMPDIR=str(folder), USER="student", TORCHINDUCTOR_CACHE_DIR=str(folder))
    ours = load_ours(header.pop("ours"))
    use_only_the_students_modules(folder)
    modules = loading.Modules(folder, tell)
    restrict_writes(folder)
    give_up_root([sys.executable, os.__file__, torch.__file__])
    end_with_parent()
    limit_resources(limits)
    random.seed(0)
    torch.manual_seed(0)
    # A traceback may show lines of these.
    harmless = [Path(file) for file in (__file__, loading.__file__, calls.__file__, run_case.__code__.co_filename)]
    watch(folder, [HERE], [Path(sys.prefix), Path(sys.base_prefix), *harmless], stop)
    if header["stand_ins"]:
        try:
            stand_ins.put_in(header["stand_ins"], modules, ours, header["causal"])
        except BaseException as error:
            tell(stand_ins=problem(error, folder, limits))
    for i, case in enumerate(cases):
        tell(begin=i)
        try:
            arrays = {name: np.asarray(array) for name, array in run_case(case, modules).items()}
            raw = wire.packed({"case": i}, arrays)
        except BaseException as error:  # a student's code may raise anything, SystemExit too
            tell(case=i, error=problem(error, folder, limits) | {"module": loading.does_not_load(error)})
        else:
            wire.send(writer, raw, token)
    sys.stdout.flush()
    tell(done=True)
    os._exit(0)  # without the exit handlers that a student's code may have set


def isolate_files(output: Path, writer: int) -> int:
    """Leaves open only an empty input, the output file, and the pipe at a random number, which is returned."""
    import fcntl  # Windows has none, and runs no student's code

    place = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, random.SystemRandom().randrange(100, 900))
    empty = os.open(os.devnull, os.O_RDONLY)
    printed = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(empty, 0)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.closerange(3, place)
    os.closerange(place + 1, 65536)
    return place


def load_ours(texts: dict[str, str]) -> dict[str, ModuleType]:
    """Our own modules, by name, for parts that are replaced. texts: each after those that it imports."""
    for name, text in texts.items():
        sys.modules[name] = ModuleType(name)
        exec(compile(text, f"our {name}.py", "exec"), vars(sys.modules[name]))
    return {name: sys.modules.pop(name) for name in texts}


def use_only_the_students_modules(folder: Path) -> None:
    """Makes `import llama` mean the module of the folder, and forgets our package."""
    sys.path[:] = [str(folder), *(path for path in sys.path if path and Path(path).resolve() != HERE)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "minillama"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def problem(error: BaseException, folder: Path, limits: Limits) -> dict[str, Any]:
    """An exception as plain values: type, text, and the innermost line of the student's own files, if any."""
    # Without source lines: reading them would open files that the student's process must not read.
    frames = list(traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False))
    own = [frame for frame in frames if os.path.realpath(frame.filename).startswith(os.path.realpath(folder) + os.sep)]
    text = shown(str(error))
    found: dict[str, Any] = {"type": type(error).__name__, "text": text}
    if isinstance(error, SyntaxError) and error.filename:
        found |= {
            "text": shown(error.msg),
            "file": Path(error.filename).name,
            "line": error.lineno or 0,
            "function": "",
        }
    elif own:
        found["file"] = os.path.relpath(os.path.realpath(own[-1].filename), os.path.realpath(folder))
        found |= {"line": own[-1].lineno or 0, "function": own[-1].name}
    if isinstance(error, SystemExit):
        found["rule"] = "it calls sys.exit"
    elif isinstance(error, MemoryError) or "allocate memory" in text:
        found["rule"] = f"it asked for more than {limits.memory >> 30} GB of memory"
    elif isinstance(error, OSError) and error.errno == errno.EFBIG:
        found["rule"] = f"it wrote more than {limits.file_size >> 20} MB"
    elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        found["rule"] = "it tried what is not allowed: " + text
    found["inside"] = bool(frames and own and frames[-1] is own[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
