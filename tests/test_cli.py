"""The command line as its user meets it: what the options do, what is printed where, and what bad input gets."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from conftest import CONFORMANCE, ROOT, next_command, tiny_llama
from llama import load_pretrained
from lora import lora_layers
from minillama.formats import files
from minillama.formats.adapters import read_adapter
from minillama.formats.checkpoint import write_checkpoint
from minillama.layers import precision
from minillama.text.labelled import read_rows
from minillama.training import classification as tasks
from minillama.training import loop as training
from minillama.training.regularizers import Smart
from minillama.training.run_directory import locked
from run_llama import main

OPTIONS = {"prompt": "prompting", "finetune": "finetuning", "lora": "lora"}
BEFORE = "from an earlier run\n"


def outputs(option):
    return [f"{split}-{OPTIONS[option]}-output.txt" for split in ("dev", "test")]


class Command:
    """A folder with small data and a small model; runs `run_llama.py` in it, with options that later ones override."""

    def __init__(self, folder, tokenizer, capsys):
        self.folder, self.capsys = folder, capsys
        lines = [f"{i % 2} ||| {'a bad dull film' if i % 2 == 0 else 'one good day'} {i}" for i in range(12)]
        for split in ("train", "dev", "test"):
            (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "names.json").write_text('["bad", "good"]', encoding="utf-8")
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        model = tiny_llama(vocab_size=512, max_seq_len=64)
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    def __call__(self, option, *more):
        """(exit code, stdout, stderr)"""
        fixed = ["--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", "--label-names", "names.json"]
        fixed += ["--epochs", "1", "--lr", "0.001", "--batch_size", "5", "--max_new_tokens", "5"]
        for split in ("train", "dev", "test"):
            fixed += [f"--{split}", f"{split}.txt"]
        if option in OPTIONS:
            fixed += ["--dev_out", outputs(option)[0], "--test_out", outputs(option)[1]]
        self.capsys.readouterr()
        try:
            code = main(["--option", option, *fixed, *more])
        except SystemExit as exit:
            code = exit.code
        return code, *self.capsys.readouterr()

    def files(self):
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


@pytest.fixture
def command(asset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, asset("stories260K/tok512.model"), capsys)


# Bad input: (what it is, option, further arguments, what to write beforehand, what the line must name)


def text(name, content):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def removed(name):
    return lambda folder: (folder / name).unlink()


def made_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def cut_short(name, share):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: int(share * 1e5)])


def poisoned(folder):
    saved = torch.load(folder / "model.pt", weights_only=True)
    saved["model"]["layers.0.attention.compute_key.weight"][1, 2] = torch.nan
    torch.save(saved, folder / "model.pt")


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def with_code(folder):
    torch.save({"model": Code(), "model_args": {}}, folder / "model.pt")


def long_names(folder):
    (folder / "long.json").write_text(json.dumps(["a" * 200, "b"]), encoding="utf-8")


def another_vocabulary(folder):
    model = tiny_llama(vocab_size=500)
    write_checkpoint(folder / "model.pt", model.state_dict(), model.config)


FILES = {"train": "train.txt", "dev": "dev.txt", "test": "test.txt", "labels": "names.json"}
FILES |= {"checkpoint": "model.pt", "tokenizer": "tokenizer.model"}
DATA = [name for name in FILES.values() if name.endswith((".txt", ".json"))]
BAD = [
    *((f"{what} missing", "finetune", [], removed(name), name) for what, name in FILES.items()),
    *((f"{what} empty", "finetune", [], content(name, b""), name) for what, name in FILES.items()),
    *((f"{what} a folder", "finetune", [], made_folder(name), name) for what, name in FILES.items()),
    *((f"{name} not UTF-8", "lora", [], content(name, b"0 ||| \xe4\n"), f"{name}, line 1: not UTF-8") for name in DATA),
    *(
        (f"{name} {what}", option, [], text(name, line), message)
        for option, name in (("finetune", "train.txt"), ("prompt", "dev.txt"), ("lora", "test.txt"))
        for what, line, message in (
            ("without separator", "0 ||| a\n1 b\n", f'{name}, line 2: no " ||| "'),
            ("label no integer", "0 ||| a\nfine ||| b\n", f"{name}, line 2: label 'fine'"),
            ("label outside", "0 ||| a\n2 ||| b\n", f"{name}, line 2: label '2' is none of 0 to 1"),
            ("empty sentence", "0 ||| a\n1 ||| \n0 ||| c\n", f"{name}, line 2: the sentence is empty"),
        )
    ),
    ("labels not of this data", "finetune", [], text("names.json", json.dumps(list("abcde"))), "labels 0, 1"),
    ("labels no list", "prompt", [], text("names.json", '{"bad": 0}'), "names.json should be a JSON list"),
    ("checkpoint cut short", "finetune", [], cut_short("model.pt", 0.5), "model.pt"),
    ("checkpoint unknown", "generate", [], content("model.pt", bytes(range(256)) * 9), "model.pt is no checkpoint"),
    ("checkpoint a text", "prompt", [], text("model.pt", "hello"), "model.pt is no checkpoint"),
    ("checkpoint of another vocabulary", "generate", [], another_vocabulary, "vocabulary of 500"),
    ("checkpoint with NaN", "lora", [], poisoned, "layers.0.attention.compute_key.weight holds NaN"),
    ("checkpoint with code", "finetune", [], with_code, "model.pt is refused"),
    ("plain pickle with code", "generate", [], content("model.pt", pickle.dumps(Code())), "model.pt is refused"),
    ("checkpoint of no kind", "generate", ["--pretrained-model-path", "names.json"], None, "names.json is no check"),
    ("tokenizer no SentencePiece", "generate", [], text("tokenizer.model", "x"), "tokenizer.model is no SentencePiece"),
    *(
        (f"{flag} {value}", option, [flag, value], None, f"argument {flag}: {value!r} is not allowed")
        for flag, option, values in (
            ("--epsilon", "generate", ("-0.1", "1", "2", "nan", "x")),
            ("--temperature", "generate", ("-1", "inf", "nan", "warm")),
            ("--max_new_tokens", "generate", ("-1", "1.5")),
            ("--batch_size", "prompt", ("0", "-3", "2.5")),
            ("--lora_rank", "lora", ("0", "-1")),
            ("--lora_alpha", "lora", ("0", "-1")),
            ("--lora_plus", "lora", ("0", "-16", "inf")),
            ("--epochs", "finetune", ("0", "-1", "x")),
            ("--lr", "finetune", ("0", "-0.001", "nan", "inf")),
            ("--hidden_dropout_prob", "finetune", ("1", "-0.1")),
            ("--max_sentence_len", "prompt", ("0",)),
            ("--seed", "generate", ("-1", "1.5", str(1 << 63))),
        )
        for value in values
    ),
    ("an unknown option", "guess", [], None, "invalid choice: 'guess'"),
    ("an unknown flag", "generate", ["--temprature", "1"], None, "--temprature"),
    ("an unknown target", "lora", ["--lora_targets", "q_proj"], None, "--lora_targets: invalid choice: 'q_proj'"),
    ("no target", "lora", ["--lora_targets"], None, "argument --lora_targets: expected at least one argument"),
    *(
        (f"{flags[0]} without LoRA", option, flags, None, f"{flags[0]} belongs to --option lora; leave it out")
        for option, *flags in (
            ("finetune", "--dora"),
            ("generate", "--rslora"),
            ("prompt", "--lora_plus", "16"),
            ("finetune", "--lora_targets", "all"),
        )
    ),
    ("an unknown dtype", "generate", ["--dtype", "int8"], None, "invalid choice: 'int8'"),
    ("a device there is not", "prompt", ["--device", "cuda:99"], None, "cuda:99"),
    ("a device of no such name", "prompt", ["--device", "gpu"], None, "--device gpu"),
    ("a minimum above", "lora", ["--min_lr", "1"], None, "--min_lr 1 is above --lr 0.001"),
    ("a file for a run", "lora", ["--run_dir", "train.txt"], None, "train.txt is a file; --run_dir takes a folder"),
    ("shards in fp16", "lora", ["--fsdp", "--dtype", "fp16"], None, "--fsdp does not go with --dtype fp16"),
    ("shards of one process", "lora", ["--fsdp"], None, "--fsdp needs several processes"),
    ("a regularizer of shards", "lora", ["--smart", "1", "--fsdp"], None, "--smart does not go with --fsdp"),
    ("a regularizer compiled", "finetune", ["--r_drop", "1", "--compile"], None, "--r_drop does not go with --compile"),
    ("a regularizer of nothing", "prompt", ["--bregman", "1"], None, "--bregman belongs to --option finetune, lora"),
    (
        "two masks of no dropout",
        "finetune",
        ["--r_drop", "1", "--dropout", "0", "--hidden_dropout_prob", "0"],
        None,
        "--r_drop compares two dropout masks",
    ),
    ("a template without a sentence", "prompt", ["--template", "It was"], None, "must have {sentence} once"),
    ("a template of two", "prompt", ["--template", "{sentence} {sentence}"], None, "must have {sentence} once"),
    (
        "a template with a slip",
        "prompt",
        ["--template", "{sentence} {label}"],
        None,
        "--template has {label}; it takes",
    ),
    ("a template too long", "prompt", ["--template", "{sentence}" + " so" * 99], None, "no room for a sentence"),
    ("one label word", "prompt", ["--label_words", "good"], None, "argument --label_words: 'good' is not allowed"),
    ("an empty label word", "prompt", ["--label_words", "good,,bad"], None, "'good,,bad' is not allowed"),
    ("a label word twice", "prompt", ["--label_words", "good, good"], None, "'good, good' is not allowed"),
    (
        "words for other classes",
        "prompt",
        ["--label_words", "a,b,c"],
        None,
        "has 3 words, names.json 2 classes (bad, g",
    ),
    ("no such calibration", "prompt", ["--calibrate", "yes"], None, "invalid choice: 'yes'"),
    (
        "calibrated padding",
        "prompt",
        ["--calibrate", "pmi", "--pooling", "last_column"],
        None,
        "leave out --calibrate pmi, or --pooling",
    ),
    *(
        (f"{flag} of {option}", option, [flag, value, *more], None, f"{flag} belongs to --option prompt{also}; leave")
        for option in ("finetune", "generate")
        for flag, value, also, more in (
            ("--calibrate", "pmi", "", ["--head", "prompt"]),
            ("--template", "{sentence} so", " and to --head prompt of finetune and lora", []),
            ("--label_words", "a,b", " and to --head prompt of finetune and lora", []),
        )
    ),
    ("a fold of no file", "prompt", ["--dev", "#fold=3"], None, "'#fold=3' names no file and fold"),
    ("a fold of a text file", "prompt", ["--dev", "dev.txt#fold=3"], None, "dev.txt has no column beside label and"),
    ("two devices", "prompt", ["--use_gpu", "--device", "cpu"], None, "--use_gpu contradicts --device cpu"),
    ("no room for a sentence", "prompt", ["--label-names", "long.json"], long_names, "no room for a sentence"),
    ("labels that begin alike", "lora", ["--head", "prompt"], text("names.json", '["awful", "average"]'), "same token"),
    ("one file for both", "prompt", ["--test_out", "./dev-prompting-output.txt"], None, "test-prompting-output.txt"),
    *(
        (f"{option} {flag} {name}", option, [flag, name], None, f"{flag} is {name}; for --option {option}")
        for option in OPTIONS
        for flag in ("--dev_out", "--test_out")
        for name in ("out.txt", "x-advanced-output.txt")
    ),
    *(
        (f"{option} writes {flag} {name}", option, [flag, name], None, message)
        for option, flag, name, message in (
            ("prompt", "--dev_out", "none/dev-prompting-output.txt", "there is no folder none"),
            ("lora", "--test_out", "/proc/test-lora-output.txt", "/proc/test-lora-output.txt cannot be written"),
            ("generate", "--generated_sentence_low_temp_out", "none/low.txt", "there is no folder none"),
        )
    ),
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what, option, more, change, message", BAD, ids=[case[0] for case in BAD])
def test_bad_input_gets_one_line_and_touches_nothing(command, what, option, more, change, message):
    if change:
        change(command.folder)
    for name in [*outputs("prompt"), *outputs("lora"), *outputs("finetune"), "finetune-1-0.001.pt"]:
        (command.folder / name).write_text(BEFORE, encoding="utf-8")
    before = command.files()
    code, out, err = command(option, *more)
    errors = [line for line in err.splitlines() if "error" in line]
    assert code == 2 and out == "" and "Traceback" not in err
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0]
    assert errors[0].startswith("run_llama.py: error: ") and message in errors[0]
    assert command.files() == before  # the file "ran" is not there either


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("option", ["generate", "finetune"])
def test_use_gpu_without_cuda_says_so(command, option):
    before = command.files()
    code, out, err = command(option, "--use_gpu")
    assert (code, out) == (2, "") and command.files() == before
    assert (
        err
        == "run_llama.py: error: cuda: no CUDA device is available here; leave out --use_gpu, or give --device cpu\n"
    )


def test_an_output_folder_without_permission(command):
    locked = command.folder / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    code, _, err = command("prompt", "--dev_out", "locked/dev-prompting-output.txt")
    assert code == 2 and "locked/dev-prompting-output.txt cannot be written" in err


def test_a_write_that_fails_at_the_end_leaves_the_old_file(command, monkeypatch):
    """What `check_writable` cannot foresee: the disk is full when the predictions are written."""
    old = command.folder / outputs("prompt")[0]
    old.write_text(BEFORE, encoding="utf-8")
    before = command.files()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command("prompt")
    assert code == 2 and err.endswith("No space left on device\n") and command.files() == before


# Warnings


@pytest.mark.parametrize("option", OPTIONS)
def test_sentences_longer_than_the_context_are_cut_with_one_warning(command, option):
    for split in ("train", "dev", "test"):
        path = command.folder / f"{split}.txt"
        path.write_text(path.read_text(encoding="utf-8") + "0 ||| " + "long story " * 90 + "\n", encoding="utf-8")
    splits = ("dev", "test") if option == "prompt" else ("train", "dev", "test")
    total = sum(len(read_rows(f"{split}.txt", ["in", "of"])) for split in splits)
    code, _, err = command(option)
    count, room = (2, 62) if option == "prompt" else (3, 64)  # a label's three tokens: two must fit behind a row
    assert code == 0
    assert [line for line in err.splitlines() if "warning" in line] == [
        f"warning: {count} of {total} sentences were cut; the model's context has room for {room} tokens a row"
    ]
    written = (command.folder / outputs(option)[0]).read_text(encoding="utf-8")
    assert written.rstrip().endswith("long story " * 89 + "long story")  # the file has the whole sentence


def test_a_class_without_a_row_is_warned_of(command):
    text("names.json", '["bad", "fair", "good"]')(command.folder)
    for split in ("train", "dev", "test"):
        text(f"{split}.txt", "0 ||| a\n2 ||| b\n")(command.folder)
    code, _, err = command("finetune")
    assert code == 0 and "warning: train.txt has no row of fair" in err


def test_a_prompt_that_outgrows_the_context_is_warned_of(command):
    code, out, err = command("generate", "--prompt", "one day", "--max_new_tokens", "70", "--temperature", "0")
    assert code == 0 and out.startswith("one day") and "exceed the model's context of 64" in err


# What the options do


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pooling", ["last_token", "last_column"])
def test_an_option_prints_scores_and_writes_predictions(command, option, pooling):
    before = set(command.files())
    code, out, err = command(option, "--pooling", pooling)
    best = {"prompt": set(), "finetune": {"finetune-1-0.001.pt"}, "lora": {"lora-1-0.001.pt"}}[option]
    assert code == 0 and set(command.files()) - before == set(outputs(option)) | best
    loss = "" if option == "prompt" else r", loss \d\.\d{4}"
    scores = rf"accuracy [01]\.\d{{3}}, macro-F1 [01]\.\d{{3}}{loss} \(12 rows\)"
    if option == "prompt":
        scores += r"; 95 % interval 0\.\d{3} to [01]\.\d{3}, chance 0\.500, commonest class 0\.500"
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
    assert code == 0 and f"wrote {option}-1-0.001.pt, the model that is best on dev" in err
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
    text("names.json", '["in", "of"]')(command.folder)
    assert command("prompt", "--dtype", "fp32")[0] == 0
    zero_shot = [(command.folder / name).read_bytes() for name in outputs("prompt")]
    assert len({line[:1] for line in zero_shot[0].splitlines()}) == 2  # it does tell rows apart
    code, _, err = command(option, "--head", "prompt", "--lr", "1e-30", "--dtype", "fp32")
    assert code == 0 and "beside the head" not in err
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
        said = "enough" if acts else "--r_drop compares two dropout masks, and no dropout acts here"
        assert code == 2 and err.splitlines()[-1].startswith(f"run_llama.py: error: {said}")


def test_what_has_no_effect_on_an_option_is_not_refused(command):
    assert command("prompt", "--pooling", "last_column", "--micro_batch_size", "2", "--min_lr", "1")[0] == 0
    assert command("finetune", "--pooling", "last_column", "--micro_batch_size", "5")[0] == 0  # as a whole batch
    assert "a batch cannot be parted" in command("finetune", "--pooling", "last_column", "--micro_batch_size", "4")[2]


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
        assert ("without content, of these words: day " in err) == ("--calibrate" in more)
        answers[" ".join(more)] = out + (command.folder / outputs("prompt")[0]).read_text(encoding="utf-8")
    assert len(set(answers.values())) > 1


def test_tables_with_folds_and_words_for_labels_are_read_by_every_option(command):
    lines = [f"{'neg' if i % 2 else 'pos'}\tf{i % 3}\t{'a bad film' if i % 2 else 'a good day'} {i}" for i in range(18)]
    text("all.tsv", "\n".join(lines))(command.folder)
    text("names.json", '{"neg": "bad", "pos": "good"}')(command.folder)
    files = ["--train", "all.tsv#fold=f[01]", "--dev", "all.tsv#fold=f2", "--test", "all.tsv#fold=f2"]
    for option in OPTIONS:
        code, out, err = command(option, *files)
        assert code == 0 and out.count("(6 rows)") == 2
    written = (command.folder / outputs("lora")[0]).read_text(encoding="utf-8").splitlines()
    assert [line.partition(" ||| ")[2] for line in written] == [line.split("\t")[2] for line in lines[2::3]]
    assert {line.partition(" ||| ")[0] for line in written} <= {"neg", "pos"}
    assert command("finetune", *files, "--dev_out", "all.tsv")[0] == 2


def test_prompt_reads_no_training_data(command):
    (command.folder / "train.txt").unlink()
    assert command("prompt")[0] == 0


@pytest.mark.parametrize("option", OPTIONS)
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


# The run's folder


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
        assert printed == "{} accuracy {:.3f}, macro-F1 {:.3f}, loss {:.4f} (12 rows)".format(split, *told)
        predicted, gold = (
            [int(line.partition(" ||| ")[0]) for line in (command.folder / name).read_text("utf-8").splitlines()]
            for name in (f"{split}-finetuning-output.txt", f"{split}.txt")
        )
        assert scores[f"{split}_confusion"] == confusion_matrix(gold, predicted).tolist()
    assert scores["classes"] == ["bad", "good"]
    assert (scores["step"], scores["final"]) == (6, True)
    epochs = [line for line in map(json.loads, lines) if "train_loss" in line]
    assert len(epochs) == 2 and scores["dev_loss"] == pytest.approx(
        next(line for line in epochs if line["dev_accuracy"] == scores["dev_accuracy"])["dev_loss"], abs=1e-4
    )
    assert f"loss {epochs[0]['dev_loss']:.4f} (best so far)" in err
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert log.endswith(f"\n{out}") and log.count("test accuracy") == 1
    assert main(["--resume", "--run_dir", "run"]) == 0
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines() == lines


def test_the_last_line_of_a_run_without_gold_labels_has_no_scores(command):
    text("test.txt", "0 ||| a\n0 ||| b\n")(command.folder)
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
    assert (code, out) == (143, "") and "go on with --resume --run_dir runs/b" in err
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
    assert status == 2 and f"{name} exists already" in err
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
    assert "both generated sentences would go to s.txt" in command.capsys.readouterr().err


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
    for word in ("--option", "--epsilon", "--lora_rank", "examples:", "default: 1337"):
        assert word in out
    code = "import sys, run_llama; run_llama.parse_options([]); sys.exit('torch' in sys.modules)"
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
    assert code == 2 and "start them with torchrun, or type `unset RANK WORLD_SIZE` for one" in err.splitlines()[-1]
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
        r"run_llama.py: stopped by SIGINT; go on with --resume --run_dir runs/\S+", err.splitlines()[-1]
    )
    left = set(command.files())
    assert "finetune-100000-2e-05.pt" in left and not any(".tmp" in name or "output" in name for name in left)
    assert torch.load(command.folder / "finetune-100000-2e-05.pt", weights_only=True)["epoch"] >= 1
