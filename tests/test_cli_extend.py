"""Finished runs on the command line: what their folders keep, and how they get more epochs."""

from __future__ import annotations

import json

import pytest
import torch

from minillama.formats.checkpoint import read_checkpoint
from minillama.training.run_directory import RunDirectory
from programs import SIZES, outputs
from run_llama import main

DROPOUT = ("--hidden_dropout_prob", "0.4")


def resume(command, *more):
    """(exit code, stderr)"""
    command.capsys.readouterr()
    code = main(["--resume", "--run_dir", "run", *more])
    return code, command.capsys.readouterr().err


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_run_keeps_its_best_model_and_no_state(command):
    assert command("finetune", "--run_dir", "run")[0] == 0
    assert command("finetune", "--run_dir", "kept", "--keep_state")[0] == 0
    sizes = {name: (command.folder / name / "last.pt").stat().st_size for name in ("run", "kept")}
    assert sizes["run"] < 4000 < (command.folder / "run" / "best.pt").stat().st_size < sizes["kept"]
    predictions = [(command.folder / name).read_bytes() for name in outputs("finetune")]
    before = metrics(command.folder / "run")
    code, err = resume(command)
    assert code == 0 and "; the run is finished" in err
    assert [(command.folder / name).read_bytes() for name in outputs("finetune")] == predictions
    assert metrics(command.folder / "run") == before


def test_a_finished_run_without_state_takes_no_more_epochs_and_stays_as_it_was(command):
    assert command("finetune", "--run_dir", "run")[0] == 0
    before = content(command.folder / "run")
    code, err = resume(command, "--epochs", "3")
    assert code == 2 and "run is finished and its optimizer's state was removed" in err.splitlines()[-1]
    assert "--keep_state" in err.splitlines()[-1]
    after = content(command.folder / "run")
    for name in ("options.json", "last.pt", "best.pt"):
        assert after[name] == before[name]


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_a_run_that_got_more_epochs_equals_bit_for_bit_one_that_had_them_from_the_start(command, option):
    long = ["--epochs", "8", *DROPOUT, "--lr", "0.003", "--max_grad_norm", "1"]
    assert command(option, *long, "--run_dir", "whole", "--keep_state")[0] == 0
    wanted = [(command.folder / name).read_bytes() for name in outputs(option)]
    assert command(option, *long, "--run_dir", "run", "--keep_state", "--epochs", "5")[0] == 0
    code, err = resume(command, "--epochs", "8")
    assert code == 0 and "resumed at epoch 6, step 15" in err and "notice" not in err
    whole, run = command.folder / "whole", command.folder / "run"
    assert metrics(run) == metrics(whole)
    assert [(command.folder / name).read_bytes() for name in outputs(option)] == wanted
    for name in ("best.pt", "last.pt"):
        first, second = (torch.load(folder / name, weights_only=True)["model"] for folder in (whole, run))
        assert first.keys() == second.keys() and all(torch.equal(second[key], first[key]) for key in first)
    saved = json.loads((run / "options.json").read_text(encoding="utf-8"))["options"]
    assert saved["epochs"] == 8
    assert (command.folder / f"{option}-8-0.003.pt").exists()
    code, err = resume(command)
    assert code == 0 and "; the run is finished" in err


def test_a_run_that_was_stopped_may_get_more_epochs_too(command):
    assert command("finetune", "--run_dir", "whole", "--epochs", "3")[0] == 0
    assert command("finetune", "--run_dir", "run", "--keep_state", "--epochs", "1")[0] == 0
    assert resume(command, "--epochs", "2")[0] == 0
    assert resume(command, "--epochs", "3")[0] == 0
    assert metrics(command.folder / "run") == metrics(command.folder / "whole")


def test_fewer_epochs_are_refused_in_one_line(command):
    assert command("finetune", "--run_dir", "run", "--epochs", "2", "--keep_state")[0] == 0
    code, err = resume(command, "--epochs", "1")
    assert code == 2 and err.splitlines()[-1].endswith(
        "epochs is 1, but run was started with 2; use that value, or more, or leave it out"
    )


def test_a_run_whose_epochs_had_other_steps_is_refused(command):
    assert command("finetune", "--run_dir", "run", "--keep_state")[0] == 0
    path = command.folder / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    state["progress"]["step"] += 1
    torch.save(state, path)
    code, err = resume(command, "--epochs", "2")
    assert code == 2 and "run is of a version with more or fewer steps an epoch" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "more, cause",
    [
        (["--schedule", "cosine"], "--schedule cosine"),
        (["--bregman", "1"], "--bregman without --bregman_beta"),
    ],
)
def test_what_depends_on_the_number_of_epochs_is_told(command, more, cause):
    assert command("finetune", "--run_dir", "run", "--keep_state", *more)[0] == 0
    code, err = resume(command, "--epochs", "2")
    told = [line for line in err.splitlines() if line.startswith("notice: ")]
    assert code == 0 and len(told) == 1 and told[0].startswith(f"notice: {cause} depends on the number of epochs")


def test_a_run_that_stopped_early_stays_finished(command):
    fixed = ["--run_dir", "run", "--keep_state", "--lr", "1e-9", "--patience", "1"]
    assert command("finetune", *fixed, "--epochs", "3")[0] == 0
    before = metrics(command.folder / "run")
    code, err = resume(command, "--epochs", "5")
    assert code == 0 and "; the run is finished: it stopped early" in err
    assert metrics(command.folder / "run") == before


def test_the_end_of_a_sharded_run_replaces_its_shards(tmp_path):
    run = RunDirectory(tmp_path)
    (tmp_path / "last-3-9").mkdir()
    (tmp_path / "last.json").write_text('{"folder": "last-3-9", "metrics_bytes": 0}', encoding="utf-8")
    run.drop_state()
    assert (tmp_path / "last-3-9").exists()  # training has not ended
    run.note_end({"base": 5, "progress": {"epoch": 3}})
    RunDirectory(tmp_path, writes=False).drop_state()
    run.drop_state()
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt"}
    assert run.load() == {"base": 5, "progress": {"epoch": 3}, "metrics_bytes": 0}


# pretrain


def pretrain(command, folder, epochs, *more):
    fixed = ["--option", "pretrain", "--corpus", "stories.txt", "--dtype", "fp32", "--lr", "0.01", "--held_out", "4"]
    fixed += [*SIZES, "--tokenizer", "tok.model", "--batch_size", "9", "--warmup_steps", "1", "--schedule", "constant"]
    return command(*fixed, "--epochs", epochs, "--run_dir", folder, "--model_out", f"{folder}.safetensors", *more)


def test_pretraining_logs_each_epoch_and_goes_on_for_more(pretrain_command):
    command = pretrain_command
    code, _, err = pretrain(command, "whole", 4)
    lines = [line.split(":")[0] for line in err.splitlines() if line.startswith("epoch ")]
    assert code == 0 and lines == ["epoch 1", "epoch 2", "epoch 3", "epoch 4"]
    assert [line["epoch"] for line in command.metrics("whole") if "train_loss" in line] == [1, 2, 3, 4]
    assert pretrain(command, "run", 2, "--keep_state")[0] == 0
    assert command("--resume", "--run_dir", "run", "--epochs", "4")[0] == 0
    assert command.metrics("run") == command.metrics("whole")
    one, two = (read_checkpoint(f"{name}.safetensors").state for name in ("whole", "run"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    written = (command.folder / "run.safetensors").read_bytes()
    code, _, err = command("--resume", "--run_dir", "whole", "--model_out", "run.safetensors")
    assert code == 0 and "; the run is finished" in err  # without a state
    assert (command.folder / "run.safetensors").read_bytes() == written


def test_pretraining_of_so_many_steps_takes_no_epochs(pretrain_command):
    assert pretrain(pretrain_command, "run", 1, "--max_steps", "2", "--keep_state")[0] == 0
    code, _, err = pretrain_command("--resume", "--run_dir", "run", "--epochs", "4")
    assert code == 2 and err.splitlines()[-1].endswith(
        "epochs is 4, but run was started with 1; use that value, or leave it out"
    )
