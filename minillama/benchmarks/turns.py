"""Measurements in turns, each in its own process, so that changes of the machine affect all contenders."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from minillama.environment import HERE


def in_turns(names: Sequence[str], rounds: int, argv: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The measurements of each contender, one per round. argv: the arguments of benchmark.py."""
    from tqdm import tqdm

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in tqdm(list(names) * rounds, desc="measuring", leave=False, disable=None):
        command = [sys.executable, str(HERE / "benchmark.py"), *argv, "--contender", name]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode != 0:
            sys.exit(process.returncode)  # the process has printed its message
        found[name].append(json.loads(process.stdout.splitlines()[-1]))
    return found


def medians(measurements: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {figure: statistics.median(one[figure] for one in measurements) for figure in measurements[0]}
