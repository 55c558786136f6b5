"""Measurements in turns, each in a process of its own, so that all contenders meet the same machine."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from minillama.environment import HERE


def in_turns(names: Sequence[str], rounds: int, argv: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The measurements of each contender, one a round. argv: the arguments of benchmark.py."""
    from tqdm import tqdm

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in tqdm(list(names) * rounds, desc="measuring", leave=False, disable=None):
        command = [sys.executable, str(HERE / "benchmark.py"), *argv, "--contender", name]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode != 0:
            sys.exit(process.returncode)  # its message is on stderr already
        found[name].append(json.loads(process.stdout.splitlines()[-1]))
    return found


def medians(measurements: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {figure: statistics.median(one[figure] for one in measurements) for figure in measurements[0]}
