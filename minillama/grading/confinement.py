"""Limits for a process that runs a student's code: time, memory, files, processes, network.

Each limit that the system offers is used, one behind the other:

- resource limits: CPU time, address space, size of a file, number of processes;
- root gives up its rights and becomes user 65534;
- Landlock (Linux 5.13 or newer): no writing outside the copy, no TCP, no signals to other processes;
- an audit hook of Python, which also knows what was tried: it tells and ends the process.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

NOBODY = 65534
PARENT_DEATH_SIGNAL, CHILD_SUBREAPER = 1, 36  # linux/prctl.h
KEEP_CAPABILITIES, CAPABILITY_VERSION, READ_ANYTHING = 8, 0x20080522, 1 << 2  # linux/prctl.h, linux/capability.h
WRITABLE = ("/dev/null", "/dev/tty", "/dev/shm")
PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}
SIGNALS = {"os.kill", "os.killpg", "signal.pthread_kill"}
NETWORK = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "socket.sendmsg", "urllib.Request"}
# Events whose arguments are paths that would change.
CHANGES = {f"os.{name}" for name in "remove rmdir mkdir rename link symlink truncate chmod chown utime".split()}
CHANGES |= {f"shutil.{name}" for name in ("rmtree", "move", "chown", "copymode", "copystat", "unpack_archive")}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Limits(NamedTuple):
    """The limits of one run of a student's code."""

    seconds: int = 30  # of CPU time
    wall: float = 90.0  # seconds
    memory: int = 3 << 30  # bytes of address space, beyond what is in use at the start
    file_size: int = 16 << 20  # bytes of one file, and of the output
    files: int = 64 << 20  # bytes of all files in the copy
    processes: int = 40  # more than there are, threads included


def limit_resources(limits: Limits) -> None:
    """Sets the resource limits of this process and its children."""

    def lower(kind: int, soft: int, hard: int | None = None) -> None:
        try:
            most = resource.getrlimit(kind)[1]
            fits = [value if most == resource.RLIM_INFINITY else min(value, most) for value in (soft, hard or soft)]
            resource.setrlimit(kind, (fits[0], fits[1]))
        except (ValueError, OSError):  # macOS refuses some
            pass

    lower(resource.RLIMIT_CPU, limits.seconds, limits.seconds + 2)
    lower(resource.RLIMIT_FSIZE, limits.file_size)
    lower(resource.RLIMIT_CORE, 0)
    lower(resource.RLIMIT_NOFILE, 1024)
    if sys.platform == "linux":
        lower(resource.RLIMIT_AS, address_space() + limits.memory)
        lower(resource.RLIMIT_NPROC, running_threads(os.getuid()) + limits.processes)


def address_space() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def running_threads(user: int) -> int:
    """How many threads of a user the system runs."""
    count = 0
    for process in os.scandir("/proc"):
        try:
            if process.name.isdigit() and process.stat().st_uid == user:
                count += len(os.listdir(f"/proc/{process.name}/task"))
        except OSError:  # it has ended
            pass
    return count


def give_up_root(readable: list[str]) -> bool:
    """Becomes user 65534 if this process is root; says whether it did.

    If that user cannot read all these files of Python, the process keeps one right of root: to read any file.
    """
    if os.geteuid() != 0:
        return False
    try:
        os.seteuid(NOBODY)
    except OSError:  # root of a user namespace that has no other user
        return False
    can_read = all(os.access(path, os.R_OK, effective_ids=True) for path in readable)
    os.seteuid(0)
    if not can_read:
        ctypes.CDLL(None).prctl(KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    if not can_read:
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
        rights = (ctypes.c_uint32 * 6)(READ_ANYTHING, READ_ANYTHING)  # effective, permitted, inheritable; twice
        ctypes.CDLL(None).capset(header, rights)
    return True


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose own parent ends, so that it can end them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    """Makes this process end when its parent does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


# Landlock's numbers, the same on all processors (linux/landlock.h).
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
VERSION_FLAG, PATH_BENEATH, NO_NEW_PRIVS = 1, 1, 38
WRITE_FILE = 1 << 1
WRITES = {1: sum(1 << bit for bit in (1, *range(4, 13))), 2: 1 << 13, 3: 1 << 14}  # by Landlock's version


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def restrict_writes(folder: Path) -> bool:
    """Forbids this process to write outside `folder`, by Landlock; says whether the system has it."""
    if sys.platform != "linux":
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    version = call(CREATE_RULESET, None, 0, VERSION_FLAG)
    if version < 1:
        return False
    writes = sum(rights for since, rights in WRITES.items() if version >= since)
    rules = _Ruleset(writes, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call(CREATE_RULESET, ctypes.byref(rules), size, 0)
    if ruleset < 0:
        return False
    try:
        for path, allowed in ((str(folder), writes), ("/dev/null", WRITE_FILE)):
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            done = call(ADD_RULE, ruleset, PATH_BENEATH, ctypes.byref(_Beneath(allowed, parent)), 0)
            os.close(parent)
            if done < 0:
                return False
        ctypes.CDLL(None).prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
        return call(RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def watch(folder: Path, unreadable: list[Path], readable: list[Path], stop: Callable[[str], None]) -> None:
    """Calls stop(reason) when Python code tries what is forbidden: it must end the process.

    It may write below `folder` only, and not read below `unreadable`, except what is also below `readable`.
    """
    own = os.path.realpath(folder)
    closed, opened = ([os.path.realpath(path) for path in paths] for paths in (unreadable, readable))

    def beneath(path: str, top: str) -> bool:
        return path == top or path.startswith(top + os.sep)

    def resolved(path: Any, directory: Any = -1) -> str:
        text = os.fsdecode(os.fspath(path))
        if isinstance(directory, int) and directory >= 0 and not os.path.isabs(text):
            try:
                text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
            except OSError:
                pass
        # The last part is not followed: removing a link removes the link.
        top, name = os.path.split(os.path.abspath(text))
        return os.path.join(os.path.realpath(top), name)

    def check_change(path: Any, directory: Any = -1) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = resolved(path, directory)
            if not beneath(place, own):
                stop(f"it tried to change {shown(place)}, outside its own folder")

    def check_open(path: Any, mode: Any, flags: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a file that is open already
        place = os.path.realpath(os.fsdecode(os.fspath(path)))
        if isinstance(flags, int) and flags & WRITING:
            if not beneath(place, own) and not any(beneath(place, top) for top in WRITABLE):
                stop(f"it tried to write {shown(place)}, outside its own folder")
        elif any(beneath(place, top) for top in closed) and not any(beneath(place, top) for top in (own, *opened)):
            stop(f"it tried to read {shown(place)}, which belongs to the grader")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            check_open(*args)
        elif event in CHANGES:
            if event in ("os.rename", "os.link"):
                check_change(args[0], args[2])
                check_change(args[1], args[3])
            elif event == "os.symlink":
                check_change(args[1], args[2])
            elif event in ("os.remove", "os.rmdir"):
                check_change(args[0], args[1])
            elif event in ("os.mkdir", "os.chmod"):
                check_change(args[0], args[2])
            else:
                for path in args[:1]:
                    check_change(path)
        elif event in PROCESSES:
            stop("it tried to start another process")
        elif event in SIGNALS:
            stop("it tried to end a process")
        elif event in NETWORK:
            stop("it tried to use the network")

    sys.addaudithook(hook)


def shown(text: str) -> str:
    """A path or message as one short line without strange characters."""
    plain = re.sub(r"[^\x20-\x7e]+", " ", text).strip()
    return plain if len(plain) <= 200 else plain[:197] + "..."
