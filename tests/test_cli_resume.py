"""The folder of a run on the command line: the files in it, and how a run is resumed."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
from sklearn.metrics import confusion_matrix

from llama import load_pretrained
from lora import lora_layers
from minillama.formats import files
from minillama.formats.adapters import read_adapter
from minillama.formats.checkpoint import write_checkpoint
from minillama.training import classification as tasks
from minillama.training.run_directory import locked
from models import tiny_llama
from programs import outputs, writes
from run_llama import main


def test_a_run_leaves_options_metrics_log_and_checkpoints(command):
    assert command("lora", "--run_dir", "runs/a", "--epochs", "2")[0] == 0
    run = command.folder / "runs" / "a"
    found = {path.name for path in run.iterdir()}
    assert {"options.json", "metrics.jsonl", "log.txt", "last.pt", "best.pt"} <= found
    saved = json.loads((run / "options.json").read_text(encoding="utf-8"))
    assert saved["options"]["epochs"] == 2 and saved["options"]["dtype"] != "auto"
    assert saved["versions"]["torch"] == torch.__version__
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 2 * 3 + 2 + 1
    assert "confusion matrix" in (run / "log.txt").read_text(encoding="utf-8")
    commit = saved["versions"]["commit"]
    assert commit is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", commit)
    best = (command.folder / "lora-2-0.001.pt").read_bytes()
    assert best == (run / "best.pt").read_bytes()

    code, _, err = command("lora", "--run_dir", "runs/a")
    assert code == 2 and "runs/a holds a run; add --resume" in err
    assert (command.folder / "lora-2-0.001.pt").read_bytes() == best


def last_scores(run):
    """The last line of the metrics."""
    return json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def test_a_run_ends_with_the_scores_that_were_printed_and_resuming_adds_none(command):
    code, out, err = command("finetune", "--run_dir", "run", "--epochs", "2")
    assert code == 0
    run = command.folder / "run"
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    scores = json.loads(lines[-1])
    for split, printed in zip(("dev", "test"), out.splitlines(), strict=True):
        told = [scores[f"{split}_{name}"] for name in ("accuracy", "macro_f1", "loss")]
        printed, chance = printed.split("; ")
        assert printed == "{} accuracy {:.3f}, macro-F1 {:.3f}, loss {:.4f} (12 rows)".format(split, *told)
        assert re.fullmatch(r"95 % interval \S+ to \S+, chance 0.500, commonest class 0.500 \(bad\)", chance)
        predicted, gold = (
            [int(line.partition(" ||| ")[0]) for line in (command.folder / name).read_text("utf-8").splitlines()]
            for name in (f"{split}-finetuning-output.txt", f"{split}.txt")
        )
        assert scores[f"{split}_confusion"] == confusion_matrix(gold, predicted).tolist()
    assert scores["classes"] == ["bad", "good"]
    assert (scores["step"], scores["final"]) == (6, True)
    epochs = [line for line in map(json.loads, lines) if "train_loss" in line]
    assert len(epochs) == 2
    best = max(epochs, key=lambda line: (line["dev_accuracy"], -line["dev_loss"]))
    assert scores["dev_accuracy"] == best["dev_accuracy"]
    assert scores["dev_loss"] == pytest.approx(best["dev_loss"], abs=1e-4)
    assert f"loss {epochs[0]['dev_loss']:.4f} (best so far)" in err
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert log.endswith(f"\n{out}") and log.count("test accuracy") == 1
    assert main(["--resume", "--run_dir", "run"]) == 0
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() == lines


def test_the_last_line_of_a_run_without_gold_labels_has_no_scores(command):
    writes("test.txt", "0 ||| a\n0 ||| b\n")(command.folder)
    assert command("lora", "--run_dir", "run")[0] == 0
    scores = last_scores(command.folder / "run")
    assert scores["test_accuracy"] is scores["test_loss"] is None and scores["dev_accuracy"] is not None


def test_a_lora_run_of_any_kind_leaves_an_adapter_that_is_read_as_what_it_was(command):
    kind = ["--rslora", "--dora", "--lora_plus", "16", "--lora_targets", "mlp", "compute_key", "--lora_rank", "3"]
    assert command("lora", *kind)[0] == 0
    content = torch.load(command.folder / "lora-1-0.001.pt", weights_only=True)
    base = load_pretrained(command.folder / "model.pt")
    adapter = read_adapter(command.folder / "lora-1-0.001.pt", base.config)
    assert (adapter.rank, adapter.alpha, adapter.rslora, adapter.dora) == (3, 1.0, True, True)
    assert {name.split(".")[-2] for name in adapter.state} == {"w1", "w2", "w3", "compute_key"}
    assert len(adapter.state) == 2 * 4 * 3
    assert all(torch.equal(tensor, content["model"][f"llama.{name}"]) for name, tensor in adapter.state.items())
    adapter.apply(base)
    name, layer = next(lora_layers(base))
    magnitude = layer.original_layer.weight.norm(dim=1)
    assert not torch.equal(layer.lora_magnitude, magnitude) and layer.lora_B.any()
    assert layer.scaling == pytest.approx(1 / 3**0.5)
    code, out, _ = command("generate", "--adapter", "lora-1-0.001.pt", "--temperature", "0")
    assert code == 0 and out


def test_a_resumed_run_needs_no_option_twice_and_ends_the_same(command, monkeypatch):
    assert command("finetune", "--run_dir", "whole", "--epochs", "3", "--hidden_dropout_prob", "0.4")[0] == 0
    wanted = [(command.folder / name).read_bytes() for name in outputs("finetune")]
    evaluations = []

    def stops(*arguments, **settings):
        evaluations.append(1)
        if len(evaluations) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **settings)

    evaluate = tasks.evaluate
    monkeypatch.setattr(tasks, "evaluate", stops)
    code, out, err = command("finetune", "--run_dir", "runs/b", "--epochs", "3", "--hidden_dropout_prob", "0.4")
    assert (code, out) == (143, "") and "resume with --resume --run_dir runs/b" in err
    for name in outputs("finetune"):
        (command.folder / name).unlink()
    assert main(["--resume"]) == 0
    _, err = command.capsys.readouterr()
    assert "resumed at epoch 2, step 6, from runs/b" in err
    assert [(command.folder / name).read_bytes() for name in outputs("finetune")] == wanted
    whole, again = (torch.load(command.folder / d / "best.pt", weights_only=True) for d in ("whole", "runs/b"))
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in whole["model"].items())


def test_resuming_with_an_option_that_contradicts_says_which(command):
    assert command("finetune", "--run_dir", "a")[0] == 0
    for more, wanted in (
        (["--lr", "0.5"], "lr is 0.5, but a was started with 0.001"),
        (["--option", "lora"], "option is lora, but a was started with finetune"),
        (["--seed", "2"], "seed is 2, but a was started with 1337"),
        (["--train", "dev.txt"], "train is dev.txt, but a was started with train.txt"),
    ):
        command.capsys.readouterr()
        assert main(["--resume", "--run_dir", "a", *more]) == 2
        assert f"run_llama.py: error: {wanted}" in command.capsys.readouterr().err
    path = command.folder / "train.txt"
    path.write_text(path.read_text(encoding="utf-8") + "1 ||| one more\n", encoding="utf-8")
    assert main(["--resume", "--run_dir", "a", "--save_every", "7"]) == 2
    assert "other training or dev rows" in command.capsys.readouterr().err


def test_dtype_auto_goes_on_in_what_auto_was(command):
    assert command("finetune", "--run_dir", "a", "--dtype", "auto")[0] == 0
    assert main(["--resume", "--run_dir", "a", "--dtype", "auto"]) == 0


def test_a_run_goes_on_whatever_the_parts_of_what_it_had_off_were_by_default_then(command):
    assert command("finetune", "--run_dir", "a")[0] == 0
    path = command.folder / "a" / "options.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["options"] |= {"smart_eps": 1e-5, "smart_step": 1e-3, "smart_noise": 1e-5}
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert main(["--resume", "--run_dir", "a"]) == 0
    saved["options"]["smart"] = 1.0
    path.write_text(json.dumps(saved), encoding="utf-8")
    assert main(["--resume", "--run_dir", "a", "--smart_eps", "1e-3"]) == 2
    assert "smart_eps is 0.001, but a was started with 1e-05" in command.capsys.readouterr().err


@pytest.mark.parametrize("name", ["last.pt", "last.json", "best.pt", "metrics.jsonl"])
def test_a_run_starts_in_a_folder_without_parts_of_another(command, name):
    (command.folder / "a").mkdir()
    (command.folder / "a" / name).write_text("mine", encoding="utf-8")
    status, _, err = command("finetune", "--run_dir", "a")
    assert status == 2 and f"{name} already exists" in err
    assert (command.folder / "a" / name).read_text(encoding="utf-8") == "mine"


def test_damaged_options_are_told_in_one_line(command):
    assert command("finetune", "--run_dir", "a")[0] == 0
    for text in ("{", '{"options": 5}', "[]"):
        (command.folder / "a" / "options.json").write_text(text, encoding="utf-8")
        assert main(["--resume", "--run_dir", "a"]) == 2
        assert "options.json is damaged" in command.capsys.readouterr().err


def test_the_best_model_has_its_name_again_after_another_run_took_it(command):
    assert (
        command("finetune", "--run_dir", "a")[0] == 0 and command("finetune", "--run_dir", "b", "--seed", "2")[0] == 0
    )
    (named,) = command.folder.glob("finetune-*.pt")
    assert main(["--resume", "--run_dir", "a"]) == 0
    assert named.samefile(command.folder / "a" / "best.pt")


def test_predictions_are_those_of_the_runs_own_model_whoever_took_its_other_name(command, monkeypatch):
    def and_another_run_takes_the_name(source, target):
        write_checkpoint(target, tiny_llama(seed=7, vocab_size=512).state_dict(), tiny_llama(vocab_size=512).config)

    assert command("finetune", "--run_dir", "a")[0] == 0
    wanted = [(command.folder / name).read_bytes() for name in outputs("finetune")]
    monkeypatch.setattr(files, "link_or_copy", and_another_run_takes_the_name)
    assert command("finetune", "--run_dir", "b")[0] == 0
    assert [(command.folder / name).read_bytes() for name in outputs("finetune")] == wanted


def test_a_run_that_is_still_going_is_not_resumed_and_nothing_changes(command):
    assert command("finetune", "--run_dir", "runs/a")[0] == 0
    folder = command.folder / "runs" / "a"
    state = lambda: {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}  # noqa: E731
    with locked(folder):
        before, written = state(), command.files()
        told = f"runs/a is still being trained by process {os.getpid()}; wait until it ends, or stop it"
        for more in (["--run_dir", "runs/a"], []):
            command.capsys.readouterr()
            assert main(["--resume", *more]) == 2
            assert command.capsys.readouterr().err == f"run_llama.py: error: {told}\n"
        code, _, err = command("lora", "--run_dir", "runs/a")
        assert code == 2 and err.splitlines()[-1] == f"run_llama.py: error: {told}"
        assert (state(), command.files()) == (before, written)
    assert main(["--resume"]) == 0


@pytest.mark.parametrize("named", [[], ["--run_dir", "deep/mine"]], ids=["chosen", "named"])
def test_a_run_that_fails_before_it_begins_leaves_no_folder(command, named):
    (command.folder / "names.json").write_text('["bad"]', encoding="utf-8")
    code, _, err = command("finetune", *named)
    assert code == 2 and "names.json" in err
    assert not (command.folder / "runs").exists() and not (command.folder / "deep").exists()


def test_the_two_generated_sentences_go_to_two_files(command):
    names = ["--generated_sentence_low_temp_out", "s.txt", "--generated_sentence_high_temp_out", "./s.txt"]
    assert main(["--option", "generate", *names]) == 2
    assert "two of s.txt, ./s.txt are the same file" in command.capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--resume"], "there is no run under runs to resume"),
        (["--resume", "--run_dir", "none"], "none holds no run"),
        (["--option", "prompt", "--run_dir", "a"], "--run_dir belongs to --option finetune, lora, pretrain"),
    ],
)
def test_a_run_that_is_not_there_cannot_be_resumed(command, arguments, wanted):
    ending = ["--dev_out", "dev-prompting-output.txt"]
    assert main([*arguments, *ending]) == 2 and wanted in command.capsys.readouterr().err
