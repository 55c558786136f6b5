"""Several processes compute what one does: replicated and sharded, with batches that do not divide evenly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from minillama.formats.checkpoint import write_checkpoint
from minillama.training.run_directory import locked
from models import tiny_llama

OUTPUTS = ["dev-finetuning-output.txt", "test-finetuning-output.txt"]
TOLERANCE = 1e-5  # float32, summed in another order


@pytest.fixture(scope="module")
def folder(asset, tmp_path_factory):
    """Data, a model, and the run of a process alone to compare with."""
    folder = tmp_path_factory.mktemp("processes")
    lines = [f"{i % 2} ||| {('a bad dull film ' if i % 2 == 0 else 'one good day ') * (1 + i % 4)}" for i in range(13)]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "names.json").write_text('["bad", "good"]', encoding="utf-8")
    model = tiny_llama(vocab_size=512, max_seq_len=64)
    write_checkpoint(folder / "model.pt", model.state_dict(), model.config)
    os.symlink(asset("stories260K/tok512.model"), folder / "tokenizer.model")
    process = start(folder, "alone", "--micro_batch_size", "100", processes=1)
    assert process.wait(timeout=120) == 0
    return folder


def start(folder, run, *more, processes=2):
    """Thirteen rows, four at a time: the last batch has one row, so that of two processes one has none."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    fixed = ["--option", "finetune", "--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model"]
    fixed += ["--label-names", "names.json", "--dev_out", OUTPUTS[0], "--test_out", OUTPUTS[1], "--dtype", "fp32"]
    fixed += ["--hidden_dropout_prob", "0", "--batch_size", "4", "--epochs", "3", "--lr", "1e-3", "--save_every", "2"]
    for split in ("train", "dev", "test"):
        fixed += [f"--{split}", f"{split}.txt"]
    return subprocess.Popen(
        [sys.executable, *launch, str(ROOT / "run_llama.py"), *fixed, *(["--run_dir", run] if run else []), *more],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(folder, run):
    path = folder / run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_equals_the_run_alone(folder, run, alone="alone"):
    wanted, got = metrics(folder, alone), metrics(folder, run)
    assert len(got) == len(wanted) == 3 * 4 + 3 + 1
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():  # the classes and the confusion matrices exactly
            assert ours[name] == (value if isinstance(value, list) else pytest.approx(value, abs=TOLERANCE))
    weights, reference = (torch.load(folder / r / "best.pt", weights_only=True)["model"] for r in (run, alone))
    assert weights.keys() == reference.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, reference[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [[], pytest.param(["--fsdp"], marks=pytest.mark.slow)], ids=["replicas", "FSDP2"])
def test_two_processes_equal_one_through_a_stop_and_a_resumption(folder, more):
    """In micro-batches of one row; stopped by SIGTERM in the middle, and resumed."""
    run = f"two {len(more)}"
    process = start(folder, run, "--micro_batch_size", "1", *more)
    while process.poll() is None and len(metrics(folder, run)) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("run_llama.py: stopped by SIGTERM") == 1
    assert 5 <= len(metrics(folder, run)) < 15

    process = start(folder, run, "--micro_batch_size", "1", *more, "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count("resumed at epoch") == 1 and "2 processes" in err
    assert out.count("dev accuracy") == out.count("test accuracy") == 1  # one of them talks
    assert_equals_the_run_alone(folder, run)
    for name in OUTPUTS:
        assert len((folder / name).read_text(encoding="utf-8").splitlines()) == 13


@pytest.mark.slow
def test_two_processes_equal_one_with_regularizers(folder):
    """SMART's noise is each process's own; so small, it changes the term by less than the tolerance."""
    more = ["--smart", "1", "--smart_eps", "1e-5", "--smart_step", "1e-3", "--smart_noise", "1e-5"]
    more += ["--bregman", "5", "--bregman_beta", "0.5"]
    for run, processes in (("regularized", 1), ("two regularized", 2)):
        process = start(folder, run, "--micro_batch_size", "2", *more, processes=processes)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert metrics(folder, "regularized")[3]["loss"] > metrics(folder, "alone")[3]["loss"] + 1e-4
    assert_equals_the_run_alone(folder, "two regularized", "regularized")


def test_a_run_goes_on_with_as_many_processes_as_before(folder):
    process = start(folder, "alone", "--micro_batch_size", "100", "--resume", processes=2)
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode != 0 and "alone was started with 1 process, not 2; type python run_llama.py --option" in err
    )


@pytest.mark.slow
def test_the_processes_of_a_run_share_the_folder_that_one_of_them_made_and_locked(folder):
    process = start(folder, None, "--epochs", "1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (run,) = (path for path in (folder / "runs").iterdir() if path.name != "predictions")
    assert {"options.json", "best.pt", "lock"} <= {path.name for path in run.iterdir()}
    with locked(run):
        process = start(folder, f"runs/{run.name}", "--epochs", "1", "--resume")
        _, err = process.communicate(timeout=120)
    told = f"run_llama.py: error: runs/{run.name} is still being trained by process {os.getpid()}"
    assert process.returncode != 0 and err.count(told) == 1
