"""A real run, killed by SIGKILL at random moments and by a full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from minillama.formats.checkpoint import write_checkpoint
from models import tiny_llama

pytestmark = pytest.mark.slow
KILLS = 25
OUTPUTS = ["dev-finetuning-output.txt", "test-finetuning-output.txt"]


class Runs:
    def __init__(self, folder, tokenizer):
        self.folder = folder
        lines = [f"{i % 3} ||| {('one good day ' if i % 2 else 'a dull film ') * (1 + i % 5)}{i}" for i in range(90)]
        for split in ("train", "dev", "test"):
            (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "names.json").write_text('["bad", "fair", "good"]', encoding="utf-8")
        shutil.copy(tokenizer, folder / "tokenizer.model")
        model = tiny_llama(vocab_size=512, max_seq_len=64, dim=128)
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    def start(self, run, *more):
        fixed = ["--option", "finetune", "--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model"]
        fixed += ["--label-names", "names.json", "--dev_out", OUTPUTS[0], "--test_out", OUTPUTS[1], "--lr", "1e-3"]
        fixed += ["--epochs", "40", "--batch_size", "8", "--save_every", "3"]
        for split in ("train", "dev", "test"):
            fixed += [f"--{split}", f"{split}.txt"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run_llama.py"), *fixed, *(["--run_dir", run] if run else []), *more],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def resume(self, run, *more):
        """Starts anew what was killed before it began; under another name, if `run` is one that was chosen."""
        if (self.folder / run / "options.json").exists():
            return self.start(run, "--resume", *more)
        return self.start(None if run.startswith("runs/") else run, *more)

    def folder_of(self, process):
        """The folder under runs/ that the process has locked, once it has."""
        while True:
            for lock in self.folder.glob("runs/*/lock"):
                if lock.read_text(encoding="utf-8") == f"{process.pid}\n":
                    return str(lock.parent.relative_to(self.folder))
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)

    def metrics(self, run):
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    def result(self, run, outputs=OUTPUTS):
        weights = torch.load(self.folder / run / "best.pt", weights_only=True)["model"]
        last = torch.load(self.folder / run / "last.pt", weights_only=True)["model"]
        predictions = [(self.folder / name).read_bytes() for name in outputs]
        for name in outputs:
            (self.folder / name).unlink()
        return self.metrics(run), predictions, {f"{k} best": v for k, v in weights.items()} | last


@pytest.fixture
def runs(asset, tmp_path):
    return Runs(tmp_path, asset("stories260K/tok512.model"))


def assert_same(got, wanted):
    assert got[0] == wanted[0]  # no step missing or twice
    assert got[1] == wanted[1]
    assert got[2].keys() == wanted[2].keys()
    assert all(torch.equal(got[2][name], tensor) for name, tensor in wanted[2].items())


@pytest.fixture
def whole(runs):
    assert runs.start("whole").wait(timeout=300) == 0
    return runs.result("whole")


def test_killed_and_resumed_twenty_five_times_it_ends_bit_for_bit_the_same(runs, whole):
    draw = random.Random(0)
    lines_a_kill = len(whole[0]) / (KILLS + 1)
    for kill in range(KILLS):
        process = runs.resume("killed")
        # Some way on from where the last one was killed, then at any moment: in a step, an evaluation, a save.
        while len(runs.metrics("killed")) < kill * lines_a_kill + draw.uniform(0, lines_a_kill):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = runs.resume("killed")
    assert process.wait(timeout=300) == 0
    assert_same(runs.result("killed"), whole)


def test_two_runs_at_once_killed_sixteen_times_end_bit_for_bit_as_each_alone(runs):
    """They start in the same second, share a working folder and the best model's name, and choose their own folders."""
    seeds, rounds, draw = ("1", "2"), 8, random.Random(0)
    outputs = {seed: [f"{seed}-{name}" for name in OUTPUTS] for seed in seeds}
    options = {s: ["--seed", s, "--dev_out", outputs[s][0], "--test_out", outputs[s][1]] for s in seeds}
    alone, folders, kills = {}, {}, 0
    for seed in seeds:
        assert runs.start(f"alone{seed}", *options[seed]).wait(timeout=300) == 0
        alone[seed] = runs.result(f"alone{seed}", outputs[seed])
    lines_a_round = len(alone["1"][0]) / rounds
    for number in range(rounds):
        going = {seed: runs.resume(folders.get(seed, "runs/none yet"), *options[seed]) for seed in seeds}
        # The first time before the runs begin, then some way on, each at a moment of its own.
        reach = {seed: number and (number - 1 + draw.random()) * lines_a_round for seed in seeds}
        while going:
            for seed, process in list(going.items()):
                folders[seed] = runs.folder_of(process)
                assert process.poll() is None, process.stderr.read()
                if len(runs.metrics(folders[seed])) >= reach[seed]:
                    time.sleep(draw.uniform(0, 0.05) if number else 0)
                    going.pop(seed).kill()
                    assert process.wait() == -signal.SIGKILL
                    kills += 1
            time.sleep(0.001)
    assert kills == 16
    going = {seed: runs.resume(folders[seed], *options[seed]) for seed in seeds}
    for seed, process in going.items():
        folders[seed] = runs.folder_of(process)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert_same(runs.result(folders[seed], outputs[seed]), alone[seed])
    assert folders["1"] != folders["2"]
    assert not torch.equal(*(next(iter(alone[seed][2].values())) for seed in seeds))  # they were not one run


def test_terminated_it_saves_first(runs, whole):
    for lines in (20, 200, 300):
        process = runs.resume("terminated")
        while len(runs.metrics("terminated")) < lines:
            assert process.poll() is None
            time.sleep(0.001)
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143 and "stopped by SIGTERM; resume with --resume" in err
        last = torch.load(runs.folder / "terminated" / "last.pt", weights_only=True)
        steps = [line for line in runs.metrics("terminated") if "loss" in line]
        assert last["progress"]["step"] == len(steps)  # nothing is lost
    assert runs.resume("terminated").wait(timeout=300) == 0
    assert_same(runs.result("terminated"), whole)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_costs_the_steps_since_the_last_save_only(runs, whole):
    disk = runs.folder / "full"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    process = runs.start("full")
    try:
        while len(runs.metrics("full")) < 100:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        with (disk / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
            while True:
                ballast.write(bytes(4096))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "No space left on device; the last good" in err.splitlines()[-1]
        assert torch.load(disk / "last.pt", weights_only=True)["progress"]["step"] >= 80
        (disk / "ballast").unlink()
        assert runs.resume("full").wait(timeout=300) == 0
        assert_same(runs.result("full"), whole)
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", str(disk)], check=True)
