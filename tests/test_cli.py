"""The command line: scores and predictions of each option, warnings, help, and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import CONFORMANCE, ROOT
from minillama.formats.checkpoint import write_checkpoint
from minillama.layers import precision
from minillama.text.labelled import read_rows
from minillama.training import loop as training
from minillama.training.regularizers import Smart
from models import tiny_llama
from programs import OUTPUT_NAMES, next_command, outputs, writes
from run_llama import main

# Warnings


@pytest.mark.parametrize("option", OUTPUT_NAMES)
def test_sentences_longer_than_the_context_are_cut_with_one_warning(command, option):
    for split in ("train", "dev", "test"):
        path = command.folder / f"{split}.txt"
        path.write_text(path.read_text(encoding="utf-8") + "0 ||| " + "long story " * 90 + "\n", encoding="utf-8")
    splits = ("dev", "test") if option == "prompt" else ("train", "dev", "test")
    total = sum(len(read_rows(f"{split}.txt", ["in", "of"])) for split in splits)
    code, _, err = command(option)
    count, room = (2, 62) if option == "prompt" else (3, 64)  # a label's three tokens: two must fit behind a row
    assert code == 0
    assert [line for line in err.splitlines() if "were cut" in line] == [
        f"warning: {count} of {total} sentences were cut; the model's context holds {room} tokens per row"
    ]
    written = (command.folder / outputs(option)[0]).read_text(encoding="utf-8")
    assert written.rstrip().endswith("long story " * 89 + "long story")  # the file has the whole sentence


def test_a_class_without_a_row_is_warned_of(command):
    writes("names.json", '["bad", "fair", "good"]')(command.folder)
    for split in ("train", "dev", "test"):
        writes(f"{split}.txt", "0 ||| a\n2 ||| b\n")(command.folder)
    code, _, err = command("finetune")
    assert code == 0 and "warning: train.txt has no row of fair" in err


def test_a_prompt_that_outgrows_the_context_is_warned_of(command):
    code, out, err = command("generate", "--prompt", "one day", "--max_new_tokens", "70", "--temperature", "0")
    assert code == 0 and out.startswith("one day") and "exceed the model's context of 64" in err


# What the options do


@pytest.mark.parametrize("option", OUTPUT_NAMES)
@pytest.mark.parametrize("pooling", ["last_token", "last_column"])
def test_an_option_prints_scores_and_writes_predictions(command, option, pooling):
    before = set(command.files())
    code, out, err = command(option, "--pooling", pooling)
    best = {"prompt": set(), "finetune": {"finetune-1-0.001.pt"}, "lora": {"lora-1-0.001.pt"}}[option]
    assert code == 0 and set(command.files()) - before == set(outputs(option)) | best
    loss = "" if option == "prompt" else r", loss \d\.\d{4}"
    scores = rf"accuracy [01]\.\d{{3}}, macro-F1 [01]\.\d{{3}}{loss} \(12 rows\)"
    scores += r"; 95 % interval 0\.\d{3} to [01]\.\d{3}, chance 0\.500, commonest class 0\.500 \(bad\)"
    assert re.fullmatch(rf"dev {scores}\ntest {scores}\n", out)
    for split, name in zip(("dev", "test"), outputs(option), strict=True):
        lines = (command.folder / name).read_text(encoding="utf-8").splitlines()
        source = (command.folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        assert [line[1:] for line in lines] == [line[1:] for line in source]
        accuracy = sum(a[0] == b[0] for a, b in zip(lines, source, strict=True)) / len(source)
        assert f"{split} accuracy {accuracy:.3f}" in out  # what is written is what was scored


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_after_training_it_says_where_the_model_is_and_the_command_that_asks_it_works(command, option):
    code, _, err = command(option)
    assert code == 0 and f"wrote {option}-1-0.001.pt, the best model on dev" in err
    arguments = next_command(err)
    assert arguments[:4] == ["--option", "classify", "--finetuned", f"{option}-1-0.001.pt"]
    assert main(arguments) == 0
    assert re.fullmatch(r"(bad|good) 0\.\d{3} \|\|\| your sentence\n", command.capsys.readouterr().out)


def test_after_prompting_there_is_no_model_to_name(command):
    assert "next " not in command("prompt")[2]


def test_fine_tuning_learns_and_predicts_with_the_best_model(command):
    code, out, err = command("finetune", "--epochs", "6", "--lr", "3e-3", "--hidden_dropout_prob", "0")
    assert code == 0 and "dev accuracy 1.000" in out
    saved = torch.load(command.folder / "finetune-6-0.003.pt", weights_only=True)
    assert saved["dev_accuracy"] == 1.0 and saved["label_names"] == ["bad", "good"] and saved["kind"] == "classifier"
    code, _, err = command("generate", "--pretrained-model-path", "finetune-6-0.003.pt")
    assert code == 2 and "is a fine-tuned classifier" in err


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_the_prompt_head_starts_as_the_zero_shot_classifier_and_learns(command, option):
    """With steps of no size it predicts what --option prompt does, for labels of one token."""
    writes("names.json", '["in", "of"]')(command.folder)
    assert command("prompt", "--dtype", "fp32")[0] == 0
    zero_shot = [(command.folder / name).read_bytes() for name in outputs("prompt")]
    assert len({line[:1] for line in zero_shot[0].splitlines()}) == 2  # it does tell rows apart
    code, _, err = command(option, "--head", "prompt", "--lr", "1e-30", "--dtype", "fp32")
    assert code == 0 and "besides the head" not in err
    assert [(command.folder / name).read_bytes() for name in outputs(option)] == zero_shot

    rate = "3e-3" if option == "finetune" else "0.05"
    code, out, _ = command(option, "--head", "prompt", "--epochs", "6", "--lr", rate, "--hidden_dropout_prob", "0")
    assert code == 0 and "dev accuracy 1.000" in out
    saved = torch.load(command.folder / f"{option}-6-{float(rate)}.pt", weights_only=True)
    assert saved["head"] == "prompt" and not any("classifier_head" in name for name in saved["model"])
    assert command(option)[0] == 0
    assert torch.load(command.folder / f"{option}-1-0.001.pt", weights_only=True)["head"] == "linear"


def test_regularizers_are_asked_for_by_option(command, monkeypatch):
    seen = []

    def train(model, task, *more, **settings):
        seen.append((task.smart, task.average and (task.average.weight, task.average.beta), task.r_drop))
        raise ValueError("enough")

    monkeypatch.setattr(training, "train", train)
    for option in ("finetune", "lora"):
        command(option)
        command(option, "--smart", "3", "--smart_eps", "1e-6", "--smart_step", "0.2", "--smart_noise", "1e-4")
        command(option, "--smart", "1", "--bregman", "2", "--r_drop", "5")
        command(option, "--bregman", "2", "--bregman_beta", "0.5")
    wanted = [
        (None, None, 0.0),
        (Smart(3.0, 1e-6, 0.2, 1e-4), None, 0.0),
        (Smart(1.0, 1e-3, 0.1, 1e-3), (2.0, None), 5.0),
        (None, (2.0, 0.5), 0.0),
    ]
    assert seen == wanted * 2


@pytest.mark.parametrize(
    "more, acts",
    [
        (["--head", "prompt"], True),  # the classifier's own, 0.3
        (["--head", "linear"], True),
        (["--head", "prompt", "--hidden_dropout_prob", "0"], False),
        (["--hidden_dropout_prob", "0"], False),
        (["--hidden_dropout_prob", "0", "--dropout", "0.1"], True),
        (["--hidden_dropout_prob", "0", "--pretrained-model-path", "dropping.pt"], True),  # the checkpoint's
        (["--hidden_dropout_prob", "0", "--pretrained-model-path", "dropping.pt", "--dropout", "0"], False),
    ],
)
def test_r_drop_is_refused_where_no_dropout_acts_and_only_there(command, monkeypatch, more, acts):
    def train(*more, **settings):
        raise ValueError("enough")

    model = tiny_llama(vocab_size=512, max_seq_len=64, dropout=0.2)
    write_checkpoint(command.folder / "dropping.pt", model.state_dict(), model.config)
    monkeypatch.setattr(training, "train", train)
    for option in ("finetune", "lora"):
        code, _, err = command(option, "--r_drop", "1", *more)
        said = "enough" if acts else "--r_drop compares two dropout masks, but all dropout is off"
        assert code == 2 and err.splitlines()[-1].startswith(f"run_llama.py: error: {said}")


def test_what_has_no_effect_on_an_option_is_not_refused(command):
    assert command("prompt", "--pooling", "last_column", "--micro_batch_size", "2", "--min_lr", "1")[0] == 0
    assert command("finetune", "--pooling", "last_column", "--micro_batch_size", "5")[0] == 0  # as a whole batch
    assert "a batch cannot be split" in command("finetune", "--pooling", "last_column", "--micro_batch_size", "4")[2]


def test_predictions_have_the_labels_of_the_label_file(command):
    for split in ("train", "dev", "test"):
        path = command.folder / f"{split}.txt"
        path.write_text(re.sub(r"^[01]", lambda m: str(int(m[0]) + 1), path.read_text(), flags=re.M))
    (command.folder / "names.json").write_text('{"1": "bad", "2": "good", "3": null}', encoding="utf-8")
    labels = {"1": "bad", "2": "good", "3": None}
    for option in ("prompt", "finetune"):
        code, out, err = command(option)
        assert code == 0, err
        found = [read_rows(command.folder / name, labels) for name in outputs(option)]
        gold = read_rows(command.folder / "dev.txt", labels)
        right = sum(a.label == b.label for a, b in zip(found[0], gold, strict=True)) / len(gold)
        assert f"dev accuracy {right:.3f}" in out


def test_a_test_set_without_gold_labels_is_predicted_and_not_scored(command):
    path = command.folder / "test.txt"
    path.write_text(re.sub(r"^1", "0", path.read_text(encoding="utf-8"), flags=re.M), encoding="utf-8")
    code, out, _ = command("prompt")
    assert code == 0 and "test has no gold labels" in out and "dev accuracy" in out
    assert len((command.folder / outputs("prompt")[1]).read_text(encoding="utf-8").splitlines()) == 12


def test_prompts_take_a_template_words_and_calibration(command):
    answers = {}
    for more in ([], ["--calibrate", "pmi"], ["--calibrate", "contextual"], ["--pooling", "last_column"]):
        code, out, err = command("prompt", "--template", "So: {sentence} It was ", "--label_words", "day, film", *more)
        assert code == 0 and "prompt      So: {sentence} It was" in err
        assert ("shares of the words without content: day " in err) == ("--calibrate" in more)
        answers[" ".join(more)] = out + (command.folder / outputs("prompt")[0]).read_text(encoding="utf-8")
    assert len(set(answers.values())) > 1


def test_tables_with_folds_and_words_for_labels_are_read_by_every_option(command):
    lines = [f"{'neg' if i % 2 else 'pos'}\tf{i % 3}\t{'a bad film' if i % 2 else 'a good day'} {i}" for i in range(18)]
    writes("all.tsv", "\n".join(lines))(command.folder)
    writes("names.json", '{"neg": "bad", "pos": "good"}')(command.folder)
    files = ["--train", "all.tsv#fold=f[01]", "--dev", "all.tsv#fold=f2", "--test", "all.tsv#fold=f2"]
    for option in OUTPUT_NAMES:
        code, out, err = command(option, *files)
        assert code == 0 and out.count("(6 rows)") == 2
    written = (command.folder / outputs("lora")[0]).read_text(encoding="utf-8").splitlines()
    assert [line.partition(" ||| ")[2] for line in written] == [line.split("\t")[2] for line in lines[2::3]]
    assert {line.partition(" ||| ")[0] for line in written} <= {"neg", "pos"}
    assert command("finetune", *files, "--dev_out", "all.tsv")[0] == 2


def test_prompt_reads_no_training_data(command):
    (command.folder / "train.txt").unlink()
    assert command("prompt")[0] == 0


@pytest.mark.parametrize("option", OUTPUT_NAMES)
def test_the_same_seed_gives_the_same_output(command, option):
    def result():
        code, out, _ = command(option, "--seed", "5")
        assert code == 0
        return out, [(command.folder / name).read_bytes() for name in outputs(option)]

    assert result() == result()


def test_generate_takes_temperature_and_seed(command):
    def continuation(*more):
        code, out, _ = command("generate", "--prompt", "one", "--max_new_tokens", "20", "--epsilon", "0", *more)
        assert code == 0
        return out

    greedy = continuation("--temperature", "0")
    assert continuation("--temperature", "0", "--seed", "7") == greedy
    drawn = continuation("--temperature", "2", "--seed", "7")
    assert continuation("--temperature", "2", "--seed", "7") == drawn
    assert continuation("--temperature", "2", "--seed", "8") != drawn
    assert not list(command.folder.glob("generated*"))


def test_without_a_temperature_generate_writes_both_files(command):
    code, out, _ = command("generate", "--prompt", "one day")
    files = [command.folder / f"generated-sentence-temp-{t}.txt" for t in (0, 1)]
    assert code == 0 and out == "".join(path.read_text(encoding="utf-8") for path in files)
    assert out.count("one day") == 2


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_the_tiny_story_teller_tells_its_published_story(asset, capsys, version):
    arguments = ["--pretrained-model-path", str(asset(f"stories260K/stories260K_{version}.bin"))]
    arguments += ["--tokenizer", str(asset("stories260K/tok512.model")), "--prompt", ""]
    assert main([*arguments, "--temperature", "0", "--max_new_tokens", "200"]) == 0
    published = asset("stories260K/greedy_200.txt").read_text(encoding="utf-8").strip()
    told = capsys.readouterr().out.strip()
    # The last few characters depend on where 200 steps end.
    assert len(published) > 400 and told[: len(published) - 8] == published[:-8]


@pytest.mark.parametrize(
    "option, more, words",
    [
        ("generate", [], ["seed 1337", "model.pt (mini-llama)", "float32", "RMSNorm, causal", "tokenizer.model"]),
        ("generate", ["--attention", "bidirectional", "--dtype", "bf16"], ["RMSNorm, bidirectional", "bfloat16"]),
        ("prompt", ["--dtype", "fp32"], ["dev dev.txt, test test.txt", "float32", "dev-prompting-output.txt"]),
        ("lora", ["--seed", "3"], ["seed 3", "train train.txt", "names.json", "lora-1-0.001.pt", "LoRA  "]),
    ],
)
def test_the_header_says_what_runs_and_what_it_writes(command, option, more, words):
    model = tiny_llama(vocab_size=512, max_seq_len=64, norm="rmsnorm", causal=True)
    write_checkpoint(command.folder / "model.pt", model.state_dict(), model.config)
    code, _, err = command(option, *more)
    assert code == 0
    for word in [*words, "2 layers, dim 32, 4 heads, 2 key/value heads, vocabulary 512, context 64", "cpu"]:
        assert word in err
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in err


def test_auto_scores_in_bf16_where_that_is_native_and_generates_in_float32(command, monkeypatch):
    for native, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "bf16_is_native", lambda device, native=native: native)
        assert f"matrix products in {dtype}" in command("prompt")[2]
        assert "matrix products in float32" in command("generate")[2]


def test_the_courses_model_is_layernorm_and_bidirectional(command):
    code, _, err = command("generate", "--pretrained-model-path", str(CONFORMANCE / "course_tiny.pt"))
    assert code == 0 and "(course)" in err and "LayerNorm, bidirectional" in err


def test_a_llama2c_file_of_ones_runs(command):
    sizes = dim, hidden, layers, heads, kv_heads, vocabulary, context = 8, 16, 1, 2, 2, 512, 16
    floats = vocabulary * dim + layers * (2 * dim + 4 * dim * dim + 3 * dim * hidden) + dim + context * dim // heads
    (command.folder / "ones.bin").write_bytes(struct.pack("<7i", *sizes) + np.ones(floats, "<f4").tobytes())
    code, out, err = command("generate", "--pretrained-model-path", "ones.bin", "--temperature", "0")
    assert code == 0 and "(llama2.c v0)" in err and "RMSNorm, causal" in err


# The process


def start(*arguments, folder=ROOT, **settings):
    command = [sys.executable, str(ROOT / "run_llama.py"), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def test_help_teaches_at_once_and_imports_no_torch():
    times = []
    for _ in range(3):  # the best of three: the machine may be busy
        begun = time.perf_counter()
        process = start("--help")
        out, _ = process.communicate()
        times.append(time.perf_counter() - begun)
        assert process.returncode == 0
    assert min(times) < 0.5
    assert "--option finetune --help" in out
    code = "import sys, run_llama; run_llama.parse([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_process_number_that_is_none_is_told_in_one_line(command, monkeypatch, name):
    for one, value in {"RANK": "0", "WORLD_SIZE": "2", name: "two"}.items():  # LOCAL_RANK counts beside these alone
        monkeypatch.setenv(one, value)
    code, out, err = command("finetune")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"the environment variable {name} is 'two'; it must be a whole number" in err and f"`unset {name}`" in err
    assert not (command.folder / "runs").exists()
    code, out, _ = command("finetune", "--help")
    assert code == 0 and "examples:" in out


@pytest.mark.parametrize("settings", [{"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "1"}])
def test_half_of_what_torchrun_sets_means_one_process(command, monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    code, out, err = command("finetune", "--run_dir", "run")
    assert code == 0 and "dev accuracy" in out and "processes" not in err
    assert (command.folder / "run" / "best.pt").exists()


def test_processes_that_cannot_meet_are_told_how_to_and_leave_no_folder(command, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command("finetune")
    assert code == 2 and "type `unset RANK WORLD_SIZE` for one process" in err.splitlines()[-1]
    assert not (command.folder / "runs").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_stops_with_130_and_leaves_no_half_written_file(command):
    """In the middle of training: after the first epoch's model was saved, long before the last epoch."""
    fixed = ["--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", "--label-names", "names.json"]
    for split in ("train", "dev", "test"):
        fixed += [f"--{split}", f"{split}.txt"]
    fixed += ["--dev_out", outputs("finetune")[0], "--test_out", outputs("finetune")[1], "--epochs", "100000"]
    process = start("--option", "finetune", *fixed, folder=command.folder)
    for line in process.stderr:
        if line.startswith("epoch 2:"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert re.fullmatch(
        r"run_llama.py: stopped by SIGINT; resume with --resume --run_dir runs/\S+", err.splitlines()[-1]
    )
    left = set(command.files())
    assert "finetune-100000-2e-05.pt" in left and not any(".tmp" in name or "output" in name for name in left)
    assert torch.load(command.folder / "finetune-100000-2e-05.pt", weights_only=True)["epoch"] >= 1
