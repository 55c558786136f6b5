"""Memory of a process: its peak so far, and how much it may take.

On the CPU it is resident memory: all that the process keeps in the machine's memory, Python and its libraries
included. On CUDA it is what torch has allocated on the card.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

PROCESS = Path("/proc/self/status")
MACHINE = Path("/proc/meminfo")
CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # of version 2 and version 1, below /sys/fs/cgroup


def kilobytes(path: Path, name: str) -> int | None:
    """A line such as `VmRSS:  1234 kB` of a file of /proc, in bytes; None if it is missing."""
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def used_memory(device: torch.device) -> int | None:
    """The memory that the process has now, in bytes; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return kilobytes(PROCESS, "VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """The most memory that the process had so far, in bytes; None if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = kilobytes(PROCESS, "VmHWM")
    if found is None:
        with suppress(ImportError):  # Windows has no such module
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def forget_peak(device: torch.device) -> None:
    """Lets the next peak begin at the memory that is used now, if the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        PROCESS.with_name("clear_refs").write_text("5")


def memory_limit(device: torch.device) -> int | None:
    """The most memory that the process can have, in bytes: what it has and what is free. None if it is unknown.

    Limits of a container (cgroup) and of the shell (`ulimit -v`) count.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    mine, free = used_memory(device), kilobytes(MACHINE, "MemAvailable")
    limits = [mine + free] if mine is not None and free is not None else _whole_machine()
    for name in CGROUPS:
        with suppress(OSError, ValueError):  # a container without a limit says "max"
            limits.append(int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii")))
    with suppress(ImportError):
        import resource

        most, addresses = resource.getrlimit(resource.RLIMIT_AS)[0], kilobytes(PROCESS, "VmSize")
        if most != resource.RLIM_INFINITY and mine is not None and addresses is not None:
            limits.append(mine + max(0, most - addresses))
    return min(limits, default=None)


def _whole_machine() -> list[int]:
    """The memory of the machine, where it is not known how much is free."""
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return []
