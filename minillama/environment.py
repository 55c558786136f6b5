"""The environment of the program: processes of torchrun, locks, optional packages, the project's commit.

Imports no torch, so that `--help` stays instant.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STARTED = time.perf_counter()  # about when the program started
HERE = Path(__file__).resolve().parent.parent  # the project's folder


class PackageError(ValueError):
    """An optional package is missing (`missing` is True) or broken."""

    def __init__(self, package: str, purpose: str, error: BaseException) -> None:
        module = getattr(error, "name", None) or ""
        self.missing = isinstance(error, ModuleNotFoundError) and module.partition(".")[0] == package
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.short = f"{purpose}, because {package} is broken here ({reason})"
        broken = f"{purpose}, and {package} is broken here ({reason}): pip install --force-reinstall {package}"
        super().__init__(f"{purpose}: pip install {package}" if self.missing else broken)


@contextmanager
def optional_package(package: str, purpose: str, passes: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns errors except Ctrl-C and `passes` into PackageError: `purpose`, the cause, and the command to type."""
    try:
        yield
    except BaseException as error:  # a broken package may raise anything, such as SystemExit or a Rust panic
        if isinstance(error, (KeyboardInterrupt, *passes)):
            raise
        raise PackageError(package, purpose, error) from error


class Process(NamedTuple):
    """The rank of this process, the number of processes, and the rank on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def this_process() -> Process:
    """This process, from the variables of torchrun; without RANK and WORLD_SIZE, a single one. Raises ValueError."""
    rank, world = map(_from_environment, ("RANK", "WORLD_SIZE"))
    if rank is None or world is None or (rank, world) == (0, 1):
        return Process()
    local_rank = _from_environment("LOCAL_RANK")
    if world < 1 or not 0 <= rank < world or (local_rank is not None and local_rank < 0):
        raise ValueError(
            f"the environment has RANK={rank}, WORLD_SIZE={world}, LOCAL_RANK={local_rank}; a rank must be from 0 to "
            "WORLD_SIZE - 1: start several processes with torchrun, or type `unset RANK WORLD_SIZE` for one"
        )
    return Process(rank, world, rank if local_rank is None else local_rank)


def _from_environment(name: str) -> int | None:
    """The integer in an environment variable; None if it is missing or empty."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        wanted = f"it must be a whole number, as torchrun sets it: type `unset {name}` to run one process"
        raise ValueError(f"the environment variable {name} is {text[:40]!r}; {wanted}") from None


def try_lock(file: IO[Any] | int, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed. False if another process has the lock; True without support."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # for example, an old network file system
        pass
    return True


def is_still_at(path: Path, file: IO[Any]) -> bool:
    """Whether the open `file` is still at `path`, neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for later allocations; elsewhere it does nothing.

    By default large blocks return to the system, which has to clear each page when it is used again. In training that
    takes a tenth of a step (docs/performance.md).
    """
    if sys.platform != "linux":
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own, which would return to the system when freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return the end of the heap only above 2 GiB


def project_commit(folder: Path = HERE) -> str | None:
    """The git commit of `folder`, with "-dirty" if tracked files differ; None without git or a repository."""
    import subprocess  # imported here, as hashlib below, so that `--help` stays instant

    # A git hook of another repository sets variables that point to it.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
        return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", "--", "run_llama.py"):  # a copy inside another repository
            return None
        commit = git("rev-parse", "HEAD")
        dirty = commit and git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if dirty else commit or None


def file_sha256(path: str | Path) -> str | None:
    """The SHA-256 of a file; None for a folder, a device or an unreadable file."""
    import hashlib

    digest = hashlib.sha256()
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
