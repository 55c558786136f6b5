"""Measurements in turns, each in its own process, so that changes of the machine affect all contenders.

Imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from minillama.environment import HERE

Measurement = dict[str, Any]


def in_turns(contenders: Mapping[str, Callable[[], Measurement]], rounds: int) -> dict[str, list[Measurement]]:
    """The measurements of each contender, one per round. A contender is a function that measures once."""
    from tqdm import tqdm

    found: dict[str, list[Measurement]] = {name: [] for name in contenders}
    for name in tqdm(list(contenders) * rounds, desc="measuring", leave=False, disable=None):
        found[name].append(contenders[name]())
    return found


def measured_in_a_process(name: str, argv: list[str]) -> Measurement:
    """The measurement of a contender by benchmark.py in a new process. argv: the arguments of benchmark.py."""
    command = [sys.executable, str(HERE / "benchmark.py"), *argv, "--contender", name]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode != 0:
        sys.exit(process.returncode)  # the process has printed its message
    return json.loads(process.stdout.splitlines()[-1])
