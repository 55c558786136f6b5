"""--option pretrain, run through run_llama.py on a model of a few thousand weights."""

from __future__ import annotations

import json
import math
import os
import re

import pytest
import torch

from llama import load_pretrained
from minillama.formats.checkpoint import read_checkpoint
from models import some_stories
from programs import MARK, SIZES, STORIES, next_command
from tokenizer import Tokenizer


@pytest.fixture
def command(pretrain_command):
    return pretrain_command


def judged(metrics):
    return [line["bits_per_byte"] for line in metrics if "bits_per_byte" in line]


def test_a_new_model_learns_and_is_written_with_its_tokenizer(command):
    code, out, err = command.pretrain("--max_steps", "60", "--eval_every", "20", "--batch_size", "8")
    assert code == 0 and out == "", err
    bits = judged(command.metrics())
    assert len(bits) == 3 and bits[0] > bits[1] > bits[2] and bits[2] < 0.9 * bits[0]
    found = read_checkpoint("out.safetensors")
    config = found.config
    assert (config.dim, config.n_layers, config.n_heads, config.kv_heads, config.max_seq_len) == (16, 1, 2, 1, 32)
    assert (config.vocab_size, config.norm, config.causal, found.kind) == (320, "rmsnorm", True, "mini-llama")
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
    more = ["--max_steps", "12", "--eval_every", "4", "--keep_state", "--optimizer", "adamw"]
    assert command.pretrain("--lr", "0.3", "--warmup_steps", "12", "--schedule", "constant", *more)[0] == 0
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
    assert "RMSNorm, causal" in err


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
    assert code == 2 and "a Hugging Face Llama supports no" in err and not os.path.exists("hf")


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
    """The example of --help: `--tokenizer mine.model --model_out mine.safetensors`."""
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
    steps = math.ceil((tokens - 1) // 32 / 8)
    assert f"steps       {steps} of 8 x 32 tokens" in err
    options = json.loads((command.folder / "run/options.json").read_text(encoding="utf-8"))["options"]
    defaults = {
        "lr": 4e-3,
        "optimizer": "muon",
        "schedule": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "held_out": 0.01,
    }
    assert {name: options[name] for name in defaults} == defaults and options["adam_beta2"] == 0.95
    rates = [line["lr"] for line in command.metrics() if "lr" in line]
    assert len(rates) == steps and rates[0] < 4e-3
