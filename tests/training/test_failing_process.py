"""One of two processes fails: the run ends soon, and its message is printed. Also work that one process does alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from minillama.environment import HERE
from minillama.training.distributed import Processes

# Runs run_llama.py as a program; process 1 fails in its third step, and notes the time.
FAILS = """
import os, pathlib, runpy, sys, time
sys.path.insert(0, {root!r})
import torch
from minillama.training.loop import Training

def fails(self, positions, lr):
    if self.progress.step == 2:
        pathlib.Path("failed").write_text(str(time.time()))
        raise {error}
    return step(self, positions, lr)

step = Training.step
if os.environ["RANK"] == "1":
    Training.step = fails
sys.argv[0] = {root!r} + "/run_llama.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAIN = ["--option", "finetune", "--epochs", "2", "--batch_size", "100", "--run_dir", "run", "--dtype", "fp32"]


def launched(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "program.py").write_text(program, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launch, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("ValueError('rank one broke')", "run_llama.py: error (process 1): rank one broke"),
        pytest.param(
            "torch.OutOfMemoryError('CUDA out of memory')",
            "error (process 1): 100 rows at once do not fit into the mem",
            marks=pytest.mark.slow,
        ),
        pytest.param("KeyError('a fault')", "KeyError: 'a fault'", marks=pytest.mark.slow),
    ],
    ids=["bad input", "out of memory", "a fault of the program"],
)
def test_the_run_ends_within_ten_seconds_with_the_message(error, told, tmp_path):
    done = launched(tmp_path, FAILS.format(root=str(HERE), error=error), *TRAIN)
    ended = time.time() - float((tmp_path / "failed").read_text(encoding="utf-8"))
    assert done.returncode != 0 and told in done.stderr, done.stderr
    assert ended < 10
    assert not [line for line in done.stderr.splitlines() if line.startswith("run_llama.py: error") and ".cc:" in line]
    of_ours = "minillama/training/loop.py" in done.stderr  # torchrun adds a traceback of its own
    assert of_ours is ("fault" in told)


ALONE = """
import time, torch
from minillama.training.distributed import process_group
with process_group(torch.device("cpu"), False) as processes:
    def work():
        assert processes.is_main
        time.sleep(1)
        return ["made", processes.rank]
    assert processes.from_main(work) == ["made", 0]
    assert processes.sum(1.5, torch.tensor(processes.rank)) == [3.0, 1.0]
print("fine", processes.rank)
"""


def test_work_of_the_main_process_reaches_the_others(tmp_path):
    done = launched(tmp_path, ALONE)
    assert done.returncode == 0 and done.stdout.count("fine") == 2, done.stderr
    assert Processes().from_main(lambda: 3) == 3
