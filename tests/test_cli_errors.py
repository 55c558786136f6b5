"""Bad input on the command line: one line says what is wrong, and no file is touched."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from minillama.formats.checkpoint import write_checkpoint
from models import tiny_llama
from programs import OUTPUT_NAMES, outputs, writes, writes_bytes

BEFORE = "from an earlier run\n"


# Bad input: (what it is, option, further arguments, what to write beforehand, what the line must name)


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
    *((f"{what} empty", "finetune", [], writes_bytes(name, b""), name) for what, name in FILES.items()),
    *((f"{what} a folder", "finetune", [], made_folder(name), name) for what, name in FILES.items()),
    *(
        (f"{name} not UTF-8", "lora", [], writes_bytes(name, b"0 ||| \xe4\n"), f"{name}, line 1: not UTF-8")
        for name in DATA
    ),
    *(
        (f"{name} {what}", option, [], writes(name, line), message)
        for option, name in (("finetune", "train.txt"), ("prompt", "dev.txt"), ("lora", "test.txt"))
        for what, line, message in (
            ("without separator", "0 ||| a\n1 b\n", f'{name}, line 2: no " ||| "'),
            ("label no integer", "0 ||| a\nfine ||| b\n", f"{name}, line 2: label 'fine'"),
            ("label outside", "0 ||| a\n2 ||| b\n", f"{name}, line 2: label '2' is none of 0 to 1"),
            ("empty sentence", "0 ||| a\n1 ||| \n0 ||| c\n", f"{name}, line 2: the sentence is empty"),
        )
    ),
    ("labels not of this data", "finetune", [], writes("names.json", json.dumps(list("abcde"))), "labels 0, 1"),
    ("labels no list", "prompt", [], writes("names.json", '{"bad": 0}'), "names.json should be a JSON list"),
    ("checkpoint cut short", "finetune", [], cut_short("model.pt", 0.5), "model.pt"),
    (
        "checkpoint unknown",
        "generate",
        [],
        writes_bytes("model.pt", bytes(range(256)) * 9),
        "model.pt is not a checkpoint",
    ),
    ("checkpoint a text", "prompt", [], writes("model.pt", "hello"), "model.pt is not a checkpoint"),
    ("checkpoint of another vocabulary", "generate", [], another_vocabulary, "vocabulary of 500"),
    ("checkpoint with NaN", "lora", [], poisoned, "layers.0.attention.compute_key.weight holds NaN"),
    ("checkpoint with code", "finetune", [], with_code, "model.pt is refused"),
    ("plain pickle with code", "generate", [], writes_bytes("model.pt", pickle.dumps(Code())), "model.pt is refused"),
    ("checkpoint of no kind", "generate", ["--pretrained-model-path", "names.json"], None, "names.json is not a check"),
    (
        "tokenizer no SentencePiece",
        "generate",
        [],
        writes("tokenizer.model", "x"),
        "tokenizer.model is not a tokenizer",
    ),
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
    (
        "a share of another schedule",
        "lora",
        ["--decay_share", "0.2"],
        None,
        "--decay_share is for --schedule linear, not constant",
    ),
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
    ("a template without a sentence", "prompt", ["--template", "It was"], None, "contain {sentence} exactly once"),
    ("a template of two", "prompt", ["--template", "{sentence} {sentence}"], None, "contain {sentence} exactly once"),
    (
        "a template with a slip",
        "prompt",
        ["--template", "{sentence} {label}"],
        None,
        "--template has {label}; it allows",
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
    ("mean of a prompt", "prompt", ["--pooling", "mean"], None, "is for --head linear"),
    ("mean of an answer", "finetune", ["--pooling", "mean", "--head", "prompt"], None, "is for --head linear"),
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
    ("a fold of no file", "prompt", ["--dev", "#fold=3"], None, "'#fold=3' lacks a file or a fold"),
    ("a fold of a text file", "prompt", ["--dev", "dev.txt#fold=3"], None, "dev.txt has no column beside label and"),
    ("two devices", "prompt", ["--use_gpu", "--device", "cpu"], None, "--use_gpu contradicts --device cpu"),
    ("no room for a sentence", "prompt", ["--label-names", "long.json"], long_names, "no room for a sentence"),
    (
        "labels that begin alike",
        "lora",
        ["--head", "prompt"],
        writes("names.json", '["awful", "average"]'),
        "same token",
    ),
    ("one file for both", "prompt", ["--test_out", "./dev-prompting-output.txt"], None, "test-prompting-output.txt"),
    *(
        (f"{option} {flag} {name}", option, [flag, name], None, f"{flag} is {name}; for --option {option}")
        for option in OUTPUT_NAMES
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
    told = [line for line in err.splitlines() if not line.startswith("warning: --train and --dev have the same")]
    assert told == ["run_llama.py: error: --use_gpu: no CUDA device is available here; leave it out to use the CPU"]


def test_an_output_folder_without_permission(command):
    locked = command.folder / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    code, _, err = command("prompt", "--dev_out", "locked/dev-prompting-output.txt")
    assert code == 2 and "locked/dev-prompting-output.txt cannot be written" in err


def test_a_write_that_fails_at_the_end_leaves_the_old_file(command, monkeypatch):
    """An error that `check_writable` cannot foresee: the disk is full when the predictions are written."""
    old = command.folder / outputs("prompt")[0]
    old.write_text(BEFORE, encoding="utf-8")
    before = command.files()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command("prompt")
    assert code == 2 and err.endswith("No space left on device\n") and command.files() == before
