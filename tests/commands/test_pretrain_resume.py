"""Pretraining that is stopped and resumed, and in two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from minillama.formats.checkpoint import read_checkpoint
from minillama.training import language_modelling as tasks
from programs import MARK, SHORT, SIZES, STORIES, Crash, crashes_at_step


@pytest.fixture
def command(pretrain_command):
    return pretrain_command


def signals_at_judgement(monkeypatch, number):
    score, calls = tasks.LanguageModelling.score, []

    def signalling(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return score(self, *arguments)

    monkeypatch.setattr(tasks.LanguageModelling, "score", signalling)


@pytest.mark.parametrize(
    ("stop", "optimizer"),
    [(lambda m: crashes_at_step(m, 5), "muon"), (lambda m: signals_at_judgement(m, 2), "adamw")],
)
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(command, monkeypatch, stop, optimizer):
    """Through a pass's end, too: the corpus has fewer windows than the run takes."""
    more = [
        "--save_every",
        "2",
        "--max_steps",
        "9",
        "--batch_size",
        "40",
        "--corpus",
        "stories.txt=0.4",
        "--keep_state",
        "--optimizer",
        optimizer,
        *("--schedule", "linear", "--decay_share", "0.5"),
    ]
    assert command.pretrain(*more, out="whole.safetensors", run_dir="whole")[0] == 0
    with monkeypatch.context() as patched:
        stop(patched)
        try:
            assert command.pretrain(*more, out="again.safetensors", run_dir="again")[0] == 128 + signal.SIGTERM
        except Crash:
            pass
    assert not os.path.exists("again.safetensors")
    code, _, err = command("--resume", "--run_dir", "again")
    assert code == 0 and "resumed at epoch 2, step" in err, err
    assert command.metrics("again") == command.metrics("whole") and len(command.metrics("whole")) == 9 + 3
    assert (command.folder / "again.safetensors").read_bytes() == (command.folder / "whole.safetensors").read_bytes()
    first, second = (torch.load(f"{run}/last.pt", weights_only=True) for run in ("whole", "again"))
    for name, state in first["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(second["optimizer"]["state"][name][key]))
                   for key, value in state.items())  # fmt: skip


def test_a_run_that_continues_a_model_can_be_stopped_and_resumed(command, monkeypatch):
    assert command.pretrain()[0] == 0
    start = ["--pretrained-model-path", "out.safetensors"]
    assert command.pretrain(*start, new=False, out="whole.safetensors", run_dir="whole")[0] == 0
    with monkeypatch.context() as patched:
        signals_at_judgement(patched, 1)
        assert command.pretrain(*start, new=False, out="again.safetensors", run_dir="again")[0] == 143
    assert command("--resume", "--run_dir", "again")[0] == 0
    assert (command.folder / "again.safetensors").read_bytes() == (command.folder / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("document", [0, -1], ids=["a training document", "a held-out one"])
def test_a_run_does_not_go_on_with_another_text(command, document):
    assert command.pretrain()[0] == 0
    changed = list(STORIES)
    changed[document] = changed[document].replace("the", "one", 1)
    (command.folder / "stories.txt").write_text(MARK.join(changed), encoding="utf-8")
    code, _, err = command("--resume", "--run_dir", "run")
    assert code == 2 and "run was started with another model, or other training or dev tokens" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [[], ["--differential", "--n_kv_heads", "2"], ["--optimizer", "muon"]],
    ids=["softmax", "differential", "muon"],
)
@pytest.mark.parametrize("more", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_two_processes_equal_one(command, more, choice):
    """With batches that do not divide evenly, in micro-batches of one row."""
    fixed = ["--batch_size", "5", "--micro_batch_size", "1", *choice]
    assert command.pretrain(*fixed)[0] == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "run_llama.py")]
    arguments = ["--option", "pretrain", "--corpus", "stories.txt", "--dtype", "fp32", "--lr", "0.01", "--tokenizer"]
    arguments += ["tok.model", *SIZES, *SHORT, *fixed, *more, "--tokens_dir", "other", "--run_dir", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *launch, *arguments, "--model_out", "two.safetensors"],
                            cwd=command.folder, env=environment, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("wrote two.safetensors") == 1 and result.stderr.count("40 documents") == 1
    wanted, got = command.metrics(), command.metrics("two")
    assert len(got) == len(wanted) == 6 + 2
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    one, two = (read_checkpoint(f"{name}.safetensors").state for name in ("out", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)
