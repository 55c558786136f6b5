"""The speed of karpathy/llama2.c's programs `run` (float32) and `runq` (int8), on the weights of ours.

Nothing of llama2.c is in this project; you build its programs. They use OMP_NUM_THREADS threads, or all processors.

    git clone https://github.com/karpathy/llama2.c && cd llama2.c
    gcc -Ofast -march=native -fopenmp run.c -lm -o run
    gcc -Ofast -march=native -fopenmp runq.c -lm -o runq
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minillama.benchmarks.turns import Measurement

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


def contenders(programs: Path, inputs: Path) -> dict[str, Callable[[], Measurement]]:
    """The two programs in the folder `programs`, as contenders. inputs: the folder of `write_inputs`."""
    return {
        "llama2c": partial(measured, programs / "run", inputs),
        "llama2c-int8": partial(measured, programs / "runq", inputs),
    }


def measured(program: Path, inputs: Path) -> Measurement:
    """The seconds of one token, greedy, by the program's own report. Raises ValueError if it fails."""
    command = [str(program.resolve()), str(inputs / f"{program.name}.bin"), "-t", "0", "-n", str(NEW)]
    command += ["-z", str(inputs / "tokenizer.bin")]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    found = re.search(rb"achieved tok/s: (\d+(\.\d+)?)", done.stderr)
    rate = float(found[1]) if found else 0.0
    if done.returncode or not rate:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        raise ValueError(f"{program} failed with exit code {done.returncode}: {said[-1]}")
    return {"decode_seconds": 1 / rate}
