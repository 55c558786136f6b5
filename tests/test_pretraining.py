"""Pretraining, perplexity and tokenizers as their user meets them, through run_llama.py, on a model of a few thousand
weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, Program, next_command, some_stories, tiny_llama
from llama import load_pretrained
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint
from minillama.formats.huggingface import write_huggingface
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from minillama.text.documents import DOCUMENT_END
from minillama.training import language_modelling as tasks
from minillama.training.run_directory import RunDirectory
from run_llama import main
from test_evaluation import brute_force
from tokenizer import Tokenizer

SIZES = ["--dim", "16", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1", "--max_seq_len", "32"]
SHORT = ["--max_steps", "6", "--eval_every", "3", "--batch_size", "4", "--warmup_steps", "1", "--held_out", "4"]
STORIES = some_stories(40, words=48)
MARK = f"\n{DOCUMENT_END}\n"


class Command(Program):
    """A folder with a text and a tokenizer; runs `run_llama.py` in it."""

    def __init__(self, folder, tokenizer, capsys):
        super().__init__(folder, capsys)
        (folder / "stories.txt").write_text(MARK.join(STORIES), encoding="utf-8")
        (folder / "tok.model").write_bytes(tokenizer.read_bytes())

    def pretrain(self, *more, out="out.safetensors", new=True, run_dir="run"):
        """Later options override earlier ones."""
        fixed = [
            "--option",
            "pretrain",
            "--corpus",
            "stories.txt",
            "--dtype",
            "fp32",
            "--lr",
            "0.01",
            "--model_out",
            out,
        ]
        fixed += [*SHORT, "--run_dir", run_dir, *([*SIZES, "--tokenizer", "tok.model"] if new else [])]
        return self(*fixed, *more)


@pytest.fixture
def command(small_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, small_tokenizer, capsys)


def judged(metrics):
    return [line["bits_per_byte"] for line in metrics if "bits_per_byte" in line]


# What the options do


def test_a_new_model_learns_and_is_written_with_its_tokenizer(command):
    code, out, err = command.pretrain("--max_steps", "60", "--eval_every", "20", "--batch_size", "8")
    assert code == 0 and out == "", err
    bits = judged(command.metrics())
    assert len(bits) == 3 and bits[0] > bits[1] > bits[2] and bits[2] < 0.9 * bits[0]
    found = read_checkpoint("out.safetensors")
    config = found.config
    assert (config.dim, config.n_layers, config.n_heads, config.kv_heads, config.max_seq_len) == (16, 1, 2, 1, 32)
    assert (config.vocab_size, config.norm, config.causal, found.kind) == (320, "layernorm", True, "mini-llama")
    assert (command.folder / "out.model").read_bytes() == (command.folder / "tok.model").read_bytes()
    best = torch.load("run/best.pt", weights_only=True)["model"]
    model = load_pretrained("out.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())
    for words in ("new, random weights", "40 documents", "of them held out; weight 1", "60 of 8 x 32 tokens"):
        assert words in err
    assert (
        "wrote out.safetensors\nits tokenizer is out.model" in err
        and "bits per byte" in err
        and "Once upon a time" in err
    )


def test_what_is_written_is_the_best_and_not_the_last(command):
    assert command.pretrain("--lr", "5", "--schedule", "constant", "--max_steps", "12", "--eval_every", "4")[0] == 0
    bits = judged(command.metrics())
    assert bits[-1] > min(bits)
    model = load_pretrained("out.safetensors").state_dict()
    states = [torch.load(f"run/{name}.pt", weights_only=True)["model"] for name in ("best", "last")]
    same = [all(torch.equal(tensor, state[name]) for name, tensor in model.items()) for state in states]
    assert same == [True, False]


def test_a_texts_weight_is_how_often_it_is_read(command):
    passes = []
    for weight in ("1", "3"):
        err = command.pretrain("--corpus", f"stories.txt={weight}", "--batch_size", "40", run_dir=f"run{weight}")[2]
        passes.append(float(re.search(r"([\d.]+) passes over the corpus", err)[1]))
    assert passes[0] == pytest.approx(3 * passes[1], rel=0.02)


@pytest.mark.parametrize("option", ["seed", "adam_beta2", "dropout"])
def test_seed_dropout_and_adams_memory_reach_the_training(command, option):
    """From one checkpoint, where nothing else is random."""
    assert command.pretrain("--max_steps", "2")[0] == 0
    losses = {}
    for value in {"seed": ("1", "2"), "adam_beta2": ("0.5", "0.99"), "dropout": ("0", "0.3")}[option]:
        arguments = ["--pretrained-model-path", "out.safetensors", "--max_steps", "3", f"--{option}", value]
        assert command.pretrain(*arguments, new=False, out="more.safetensors", run_dir=f"run{value}")[0] == 0
        losses[value] = [line["loss"] for line in command.metrics(f"run{value}") if "loss" in line][:3]
    first, second = losses.values()
    assert first[2] != second[2] and (first[0] != second[0]) == (option != "adam_beta2")


def test_what_was_written_generates_by_the_command_that_is_told(command):
    _, _, err = command.pretrain("--sample_prompt", "the big")
    arguments = next_command(err)
    assert arguments == ["--pretrained-model-path", "out.safetensors", "--temperature", "0.8", "--prompt", "the big"]
    code, out, _ = command(*arguments)
    assert code == 0 and out.startswith("the big")


def test_a_new_tokenizer_is_told_with_the_command_that_trains_with_it(command):
    _, _, err = command(
        "--option", "tokenizer", "--corpus", "stories.txt", "--vocab_size", "300", "--model_out", "n.model"
    )
    arguments = next_command(err)
    assert arguments[:4] == ["--option", "pretrain", "--tokenizer", "n.model"]
    code, _, err = command(*arguments, *SIZES, "--max_steps", "1", "--batch_size", "1", "--dtype", "fp32")
    assert code == 0 and (command.folder / "my-model.safetensors").is_file(), err


def test_what_was_written_generates_with_the_tokenizer_beside_it(command):
    assert command.pretrain()[0] == 0
    os.remove("tok.model")
    arguments = ["--option", "generate", "--pretrained-model-path", "out.safetensors", "--prompt", "the big cat"]
    code, out, err = command(*arguments, "--temperature", "0", "--max_new_tokens", "5")
    assert (
        code == 0
        and out.startswith("the big cat")
        and re.search(r"^tokenizer   out\.model \(sentencepiece\)$", err, flags=re.M)
    )
    assert "LayerNorm, causal" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--position", "alibi", "--sliding_window", "8"], "ALiBi positions, sliding window of 8"),
        (["--differential", "--n_kv_heads", "2"], "differential attention"),
    ],
    ids=["alibi", "differential"],
)
def test_how_a_new_model_attends_is_in_its_checkpoint_for_every_other_option(command, options, words):
    code, _, err = command.pretrain(*options, "--norm", "rmsnorm")
    assert code == 0 and f"convention  RMSNorm, causal attention, {words}\n" in err, err
    assert load_pretrained("out.safetensors").config.convention == f"RMSNorm, causal attention, {words}"
    path = ["--pretrained-model-path", "out.safetensors"]
    for dtype in ("fp32", "bf16"):
        arguments = ["--prompt", "the big cat", "--temperature", "0", "--max_new_tokens", "9", "--dtype", dtype]
        code, out, err = command("--option", "generate", *path, *arguments)
        assert code == 0 and out.startswith("the big cat") and words in err, err
    code, out, err = command("--option", "perplexity", *path, "--corpus", "stories.txt")
    assert code == 0 and "bits per byte" in out and words in err
    code, _, err = command.pretrain(*path, new=False, out="more.safetensors", run_dir="more")
    assert code == 0 and words in err
    code, _, err = command("--option", "convert", *path, "--to", "huggingface", "--model_out", "hf")
    assert code == 2 and "a Hugging Face Llama holds no model with" in err and not os.path.exists("hf")


def test_training_goes_on_from_its_own_output(command):
    assert command.pretrain("--max_steps", "40", "--eval_every", "40")[0] == 0
    before = judged(command.metrics())[-1]
    more = ["--pretrained-model-path", "out.safetensors", "--lr", "1e-9", "--max_steps", "1"]
    code, _, err = command.pretrain(*more, new=False, out="more.safetensors", run_dir="more")
    assert code == 0 and "model       out.safetensors (mini-llama)" in err and "tokenizer   out.model" in err
    assert judged(command.metrics("more")) == [pytest.approx(before, rel=1e-4)]
    more = ["--pretrained-model-path", "out.safetensors", "--max_steps", "40", "--eval_every", "40"]
    assert command.pretrain(*more, new=False, out="more.safetensors", run_dir="again")[0] == 0
    assert judged(command.metrics("again"))[-1] < before - 0.02
    assert read_checkpoint("more.safetensors").config == read_checkpoint("out.safetensors").config


def test_the_tokenizer_that_lies_where_the_models_would_go_is_left_there(command):
    """As in the examples of --help: `--tokenizer mine.model --model_out mine.safetensors`."""
    before = os.stat("tok.model")
    code, _, err = command.pretrain(out="tok.safetensors")
    assert code == 0, err
    assert os.stat("tok.model").st_mtime_ns == before.st_mtime_ns and os.path.samestat(before, os.stat("tok.model"))


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_the_model_is_rounded_to_the_type_asked_for(command, name, dtype):
    assert command.pretrain("--out_dtype", name)[0] == 0
    best = torch.load("run/best.pt", weights_only=True)["model"]
    state = read_checkpoint("out.safetensors").state
    assert all(tensor.dtype == dtype and torch.equal(tensor, best[key].to(dtype)) for key, tensor in state.items())
    assert "output.weight" not in state  # it is tied


def test_several_texts_are_mixed_and_judged_each(command):
    for folder in ("a", "b"):
        os.mkdir(folder)
    stories = [some_stories(30, seed=i, words=48) for i in (5, 6)]
    for folder, documents in zip(("a", "b"), stories, strict=True):
        (command.folder / folder / "text.txt").write_text(MARK.join(documents), encoding="utf-8")
    code, _, err = command.pretrain("--corpus", "a/text.txt=2", "b/text.txt=0.5", "stories.txt")
    assert code == 0, err
    last = command.metrics()[-1]
    each = [last[f"bits_per_byte_{name}"] for name in ("a/text.txt", "b/text.txt", "stories")]
    assert len(set(each)) == 3 and last["bits_per_byte"] == pytest.approx(sum(each) / 3)
    assert "weight 2" in err and "weight 0.5" in err and len(list((command.folder / "runs/tokens").iterdir())) == 3


def test_a_folder_is_one_text_tokenized_once(command):
    os.mkdir("texts")
    for i in range(3):
        (command.folder / f"texts/{i}.txt").write_text(MARK.join(some_stories(9, seed=i)), encoding="utf-8")
    assert command.pretrain("--corpus", "texts", "--tokens_dir", "tokens")[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (command.folder / "tokens").iterdir()}
    code, _, err = command.pretrain("--corpus", "texts", "--tokens_dir", "tokens", run_dir="b")
    assert code == 0 and "texts: 27 documents" in err and "bits_per_byte_texts" in command.metrics("b")[-1]
    assert {path.name: path.stat().st_mtime_ns for path in (command.folder / "tokens").iterdir()} == before
    assert len(before) == 3


def test_epochs_are_passes_over_the_corpus(command):
    code, _, err = command("--option", "pretrain", "--corpus", "stories.txt", "--model_out", "out.safetensors", *SIZES,
                           "--tokenizer", "tok.model", "--dtype", "fp32", "--run_dir", "run")  # fmt: skip
    assert code == 0, err
    tokenizer = Tokenizer(tokenizer_model="tok.model")
    tokens = sum(len(tokenizer.encode(story, bos=True, eos=True)) for story in STORIES[:-1])  # 1 % is one document
    steps = math.ceil((tokens - 1) // 32 / 32)
    assert f"steps       {steps} of 32 x 32 tokens" in err
    options = json.loads((command.folder / "run/options.json").read_text(encoding="utf-8"))["options"]
    defaults = {"lr": 1e-3, "schedule": "cosine", "weight_decay": 0.1, "max_grad_norm": 1.0, "held_out": 0.01}
    assert {name: options[name] for name in defaults} == defaults and options["adam_beta2"] == 0.95
    rates = [line["lr"] for line in command.metrics() if "lr" in line]
    assert len(rates) == steps and rates[0] < 1e-3


# Perplexity


def figures(out):
    pattern = (
        r"(\S+): ([\d,]+) documents, ([\d,]+) bytes, ([\d,]+) tokens: perplexity ([\d.]+), bits per token ([\d.]+), "
    )
    found = re.findall(pattern + r"bits per byte ([\d.]+)\n", out)
    return [(path, *(float(number.replace(",", "")) for number in numbers)) for path, *numbers in found]


@pytest.mark.parametrize("more, window, stride", [([], 32, 16), (["--window", "9", "--stride", "4"], 9, 4)])
def test_perplexity_is_that_of_a_loop_over_the_tokens(command, more, window, stride):
    assert command.pretrain()[0] == 0
    (command.folder / "other.txt").write_text("zw\u00f6lf dogs\n\n" + MARK.join(["x", STORIES[0]]), encoding="utf-8")
    arguments = ["--option", "perplexity", "--pretrained-model-path", "out.safetensors", *more]
    code, out, err = command(*arguments, "--corpus", "other.txt", "stories.txt", "--held_out", "2")
    assert code == 0 and out.count("\n") == 2, err
    model, tokenizer = load_pretrained("out.safetensors"), Tokenizer(tokenizer_model="out.model")
    texts = {"other.txt": ["zw\u00f6lf dogs\n\nx", STORIES[0]], "stories.txt": STORIES[-2:]}
    for (path, documents), found in zip(texts.items(), figures(out), strict=True):
        ids = [tokenizer.encode(document, bos=True, eos=False) for document in documents]
        nats, tokens = brute_force(model, ids, window, stride)
        size = sum(len(document.encode()) for document in documents)
        assert found[:4] == (path, len(documents), size, tokens)
        assert found[4] == pytest.approx(math.exp(nats / tokens), abs=2e-3)
        assert found[5] == pytest.approx(nats / tokens / math.log(2), abs=1e-4)
        assert found[6] == pytest.approx(nats / size / math.log(2), abs=1e-4)


def test_perplexity_of_all_documents_unless_some_were_held_out(command):
    assert command.pretrain()[0] == 0
    arguments = ["--option", "perplexity", "--pretrained-model-path", "out.safetensors", "--corpus", "stories.txt"]
    for more, count in (([], 40), (["--held_out", "4"], 4), (["--held_out", "0.1"], 4), (["--held_out", "40"], 40)):
        assert figures(command(*arguments, *more)[1])[0][1] == count


# Stopping and going on


class Crash(Exception):
    """The power goes."""


def crashes_at_step(monkeypatch, step):
    metric = RunDirectory.metric

    def crashing(self, number, **values):
        metric(self, number, **values)
        if number == step:
            raise Crash

    monkeypatch.setattr(RunDirectory, "metric", crashing)


def signals_at_judgement(monkeypatch, number):
    score, calls = tasks.LanguageModelling.score, []

    def signalling(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return score(self, *arguments)

    monkeypatch.setattr(tasks.LanguageModelling, "score", signalling)


@pytest.mark.parametrize("stop", [lambda m: crashes_at_step(m, 5), lambda m: signals_at_judgement(m, 2)])
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(command, monkeypatch, stop):
    """Through a pass's end, too: the corpus has fewer windows than the run takes."""
    more = ["--save_every", "2", "--max_steps", "9", "--batch_size", "40", "--corpus", "stories.txt=0.4"]
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
    assert code == 2 and "run was started from another model, or other training or dev tokens" in err


@pytest.mark.slow
@pytest.mark.parametrize("choice", [[], ["--differential", "--n_kv_heads", "2"]], ids=["softmax", "differential"])
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


# Bad input


def text(name, content):
    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return write


def made_folder(name):
    return lambda folder: (folder / name).mkdir()


def a_model(name="model.pt", **changes):
    def write(folder):
        model = tiny_llama(**({"vocab_size": 320, "causal": True} | changes))
        write_checkpoint(folder / name, model.state_dict(), model.config)
        (folder / "model.model").write_bytes((folder / "tok.model").read_bytes())

    return write


FROM = ["--pretrained-model-path", "model.pt"]
BAD = [
    ("a missing text", "pretrain", ["--corpus", "none.txt"], None, "none.txt: no such text"),
    ("an empty text", "pretrain", ["--corpus", "a.txt"], text("a.txt", "\n"), "a.txt holds no text"),
    ("a folder without text", "pretrain", ["--corpus", "f"], made_folder("f"), "f is a folder without a .txt file"),
    ("no text at all", "pretrain", ["--corpus"], None, "expected at least one argument"),
    ("not UTF-8", "pretrain", ["--corpus", "a.txt"], lambda f: (f / "a.txt").write_bytes(b"\xff"), "is not UTF-8"),
    *(
        (f"a weight of {weight}", option, ["--corpus", f"stories.txt={weight}"], None, f"the weight '{weight}' is not")
        for option in ("pretrain", "perplexity", "tokenizer")
        for weight in ("x", "-1", "0", "nan", "inf", "")
    ),
    ("a text twice", "pretrain", ["--corpus", "stories.txt", "./stories.txt"], None, "stories.txt is named twice"),
    ("a text in its folder", "pretrain", ["--corpus", "texts", "texts/a.txt=2"], text("texts/a.txt", "a cat"),
     "a.txt is named twice"),
    ("a run in the texts' folder", "pretrain", ["--corpus", "."], None, "lies in --corpus ., and its log would be"),
    ("a model among the texts", "pretrain", ["--corpus", "texts", "--model_out", "texts/b.txt"],
     text("texts/a.txt", "a cat"), "texts/b.txt would be one of the texts of --corpus texts"),
    ("a tokenizer among the texts", "tokenizer", ["--corpus", "texts", "--model_out", "texts/a.txt"],
     text("texts/a.txt", "a cat"), "texts/a.txt would be one of the texts"),
    ("a text without a name", "pretrain", ["--corpus", ""], None, "--corpus '' names no text"),
    ("a weight of nothing", "pretrain", ["--corpus", "=2"], None, "--corpus '=2' names no text"),
    ("a weight for a tokenizer", "tokenizer", ["--corpus", "stories.txt=2"], None, "leave out the weights"),
    ("a weight beyond memory", "pretrain", ["--corpus", "stories.txt=1e12"], None, "windows of one pass, more than"),
    ("the run's own file", "pretrain", ["--run_dir", ".", "--model_out", "best.pt"], None, "a file of the run's own"),
    ("a preset of a continued one", "pretrain", [*FROM, "--preset", "mini"], a_model(), "--preset is of a new model"),
    ("part of a document held out", "pretrain", ["--held_out", "1.5"], None, "--held_out is 1.5; it must be a share"),
    ("a file for tokens", "pretrain", ["--tokens_dir", "tok.model/x"], None, "--tokens_dir tok.model/x cannot be made"),
    ("too much held out", "pretrain", ["--held_out", "40"], None, "40 documents, and 40 of them would be held out"),
    ("less than none held out", "pretrain", ["--held_out", "-1"], None, "argument --held_out: '-1' is not allowed"),
    ("a window too long", "pretrain", ["--window", "33"], None, "--window 33 is longer than the model's context of 32"),
    ("a text too short", "pretrain", ["--corpus", "a.txt", "--held_out", "0"], text("a.txt", "a cat"), "too short for"),
    ("no output", "pretrain", ["--model_out", ""], None, "needs --model_out, the file to write"),
    ("an output nowhere", "pretrain", ["--model_out", "no/out.safetensors"], None, "there is no folder no"),
    ("an output that is read", "pretrain", ["--model_out", "stories.txt"], None, "is to be read and to be written"),
    ("a model for its tokenizer", "pretrain", ["--model_out", "out.model"], None, "its tokenizer would go"),
    ("heads that do not fit", "pretrain", ["--dim", "18", "--n_heads", "4"], None, "dim"),
    ("key heads that do not fit", "pretrain", ["--n_heads", "2", "--n_kv_heads", "3"], None, "n_kv_heads"),
    ("a size of none", "pretrain", ["--n_layers", "0"], None, "argument --n_layers: '0' is not allowed"),
    ("a model that sees all", "pretrain", ["--attention", "bidirectional"], None, "bidirectional: it would see"),
    ("a continued one that does", "pretrain", FROM, a_model(causal=False), "add --attention causal"),
    ("sizes of a continued one", "pretrain", [*FROM, "--dim", "32"], a_model(), "--dim is of a new model"),
    ("positions of a continued one", "pretrain", [*FROM, "--position", "alibi"], a_model(), "--position is of a new"),
    ("heads that make no pairs", "pretrain", ["--differential"], None, "n_kv_heads 1; differential attention takes"),
    ("ALiBi that sees all", "pretrain", ["--position", "alibi", "--attention", "bidirectional"], None, "needs causal"),
    ("positions of a new one", "perplexity", [*FROM, "--sliding_window", "8"], a_model(), "leave it out for --option"),
    ("no such positions", "pretrain", ["--position", "learned"], None, "argument --position: invalid choice:"),
    ("no window", "pretrain", ["--sliding_window", "0"], None, "argument --sliding_window: '0' is not allowed"),
    ("8 bits of what has none", "perplexity", [*FROM, "--quantize", "int8"], a_model(attention_type="differential"),
     "differential attention cannot be quantized"),
    ("no model to continue", "pretrain", [*FROM, "--tokenizer", "tok.model"], None, "model.pt: no such checkpoint"),
    ("another vocabulary", "pretrain", FROM, a_model(vocab_size=300), "has a vocabulary of 300"),
    ("a prompt that is no text", "pretrain", ["--sample_prompt", "\udce9"], None, "is no UTF-8 text"),
    ("a run there already", "pretrain", ["--run_dir", "tok.model"], None, "tok.model is a file"),
    ("no text", "tokenizer", ["--corpus", "none.txt"], None, "none.txt: no such text"),
    ("too many pieces", "tokenizer", ["--vocab_size", "100000"], None, "give another --vocab_size"),
    ("too few pieces", "tokenizer", ["--vocab_size", "20"], None, "give another --vocab_size"),
    ("fewer pieces than letters", "tokenizer", ["--vocab_size", "265"], None, "265 vs 2"),
    ("no output", "tokenizer", ["--model_out", ""], None, "needs --model_out"),
    ("an output that is read", "tokenizer", ["--model_out", "./stories.txt"], None, "to be read and to be written"),
    ("a missing text", "perplexity", [*FROM, "--corpus", "none.txt"], a_model(), "none.txt: no such text"),
    ("an empty text", "perplexity", [*FROM, "--corpus", "a.txt"], lambda f: (a_model()(f), text("a.txt", "")(f)),
     "a.txt holds no text"),
    ("a stride above", "perplexity", [*FROM, "--window", "8", "--stride", "9"], a_model(), "--stride 9: windows of 8"),
    ("a window too long", "perplexity", [*FROM, "--window", "33"], a_model(), "the context of 32"),
    ("a model that sees all", "perplexity", FROM, a_model(causal=False), "add --attention causal"),
    ("fewer documents", "perplexity", [*FROM, "--held_out", "41"], a_model(), "stories.txt has 40 documents"),
    ("a share of one", "perplexity", [*FROM, "--held_out", "0.5", "--corpus", "a.txt"],
     lambda f: (a_model()(f), text("a.txt", "one story")(f)), "a.txt has 1 documents"),
    ("another vocabulary", "perplexity", FROM, a_model(vocab_size=300), "has a vocabulary of 300"),
]  # fmt: skip


@pytest.mark.parametrize("what, option, more, change, message", BAD, ids=[f"{case[1]}: {case[0]}" for case in BAD])
def test_bad_input_gets_one_line_and_touches_nothing(command, what, option, more, change, message):
    if change:
        change(command.folder)
    before = command.files()
    if option == "pretrain":
        code, out, err = command.pretrain(*more, new="--pretrained-model-path" not in more)
    else:
        code, out, err = command("--option", option, "--corpus", "stories.txt", "--tokenizer", "tok.model",
                                 *(["--model_out", "new.model"] if option == "tokenizer" else []), *more)  # fmt: skip
    assert code == 2 and out == "" and "Traceback" not in err
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    assert errors[0].startswith("run_llama.py: error: ") and message in errors[0]
    assert command.files() == before and not os.path.exists("run")


@pytest.mark.parametrize("option", ["perplexity", "tokenizer"])
def test_what_one_process_does_is_refused_to_several(command, monkeypatch, option):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    a_model()(command.folder)
    code, out, err = command("--option", option, *FROM, "--corpus", "stories.txt", "--model_out", "new.model")
    assert (code, out) == (2, "") and f"--option {option} runs in one process; start it without torchrun" in err


def test_a_file_whose_name_has_an_equals_sign(command):
    os.rename("stories.txt", "stories=2")
    assert command.pretrain("--corpus", "stories=2")[0] == 0
    code, _, err = command.pretrain("--corpus", "stories=2=0.5", run_dir="b")
    assert code == 0 and "stories=2: 40 documents" in err and "weight 0.5" in err


def test_perplexity_without_bos_counts_what_is_scored_as_transformers_does(tmp_path, small_tokenizer, capsys):
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(vocab_size=320, norm="rmsnorm", causal=True, max_seq_len=64)
    (tmp_path / "m").mkdir()
    write_huggingface(tmp_path / "m", model.config, model.state_dict(), 1, 2)
    write_huggingface_tokenizer(Tokenizer(tokenizer_model=small_tokenizer), tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    documents = ["the boy ran home", "a", "She saw a dog."]
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(documents))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    nats, tokens, size = 0.0, 0, 0
    for document in documents:
        ids = encode(document, return_tensors="pt").input_ids
        assert ids[0, 0] != 1
        if (count := ids.shape[1] - 1) > 0:
            nats, tokens = nats + count * float(theirs(ids, labels=ids).loss), tokens + count
        size += len(document.encode()) - len(encode.decode(ids[0, :1]).encode())
    arguments = ["--option", "perplexity", "--corpus", str(tmp_path / "t.txt")]
    for name in ("tokenizer.model", "tokenizer.json"):  # each by itself is without bos, by what lies beside it
        typed = ["--pretrained-model-path", str(tmp_path / "m"), "--tokenizer", str(tmp_path / "m" / name)]
        assert main([*arguments, *typed]) == 0
        out = capsys.readouterr().out
        assert f"{size:,} bytes, {tokens:,} tokens: " in out
        found = [float(number) for number in re.findall(r"(?:perplexity|per byte) ([\d.]+)", out)]
        assert found == pytest.approx([math.exp(nats / tokens), nats / size / math.log(2)], rel=1e-4)
