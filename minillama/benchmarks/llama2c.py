"""The speed of karpathy/llama2.c's programs `run` (float32) and `runq` (int8), on the weights of ours.

Nothing of llama2.c is in this project. To compare, its programs are built in a folder, with as many threads as ours:

    git clone https://github.com/karpathy/llama2.c && cd llama2.c
    gcc -Ofast -march=native -fopenmp run.c -lm -o run
    gcc -Ofast -march=native -fopenmp runq.c -lm -o runq
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

NEW = 128  # tokens
BUILD = "gcc -Ofast -march=native -fopenmp {name}.c -lm -o {name}"


def check_programs(folder: Path) -> None:
    """Raises ValueError if a program is missing; the message has the command that builds it."""
    for name in ("run", "runq"):
        if not os.access(folder / name, os.X_OK) or not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; build it in {folder}: {BUILD.format(name=name)}")


def write_inputs(folder: Path, model: str) -> None:
    """Writes the files that the programs read: the model as versions 0 and 2, and a vocabulary of made-up pieces."""
    from minillama.formats.checkpoint import read_checkpoint
    from minillama.formats.llama2c import write_llama2c

    checkpoint = read_checkpoint(model)
    for name, version in (("run", 0), ("runq", 2)):
        write_llama2c(folder / f"{name}.bin", checkpoint.config, checkpoint.complete_state(checkpoint.config), version)
    with open(folder / "tokenizer.bin", "wb") as file:
        file.write(struct.pack("<i", 8))  # length of the longest piece
        for token in range(checkpoint.config.vocab_size):
            piece = f"{token} ".encode()
            file.write(struct.pack("<fi", -float(token), len(piece)) + piece)


def measured(folder: Path, name: str, inputs: Path, threads: int) -> dict[str, Any]:
    """The time of one token of a program, greedy, from its own report. Raises ValueError if it fails."""
    command = [str((folder / name).resolve()), str(inputs / f"{name}.bin"), "-t", "0", "-n", str(NEW)]
    done = subprocess.run(
        [*command, "-z", str(inputs / "tokenizer.bin")],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    rate = re.search(rb"achieved tok/s: ([0-9.]+)", done.stderr)
    if done.returncode or rate is None:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(f"{folder / name} failed with exit code {done.returncode}: {(said or ['no message'])[-1]}")
    return {"decode_seconds": 1 / float(rate[1])}
