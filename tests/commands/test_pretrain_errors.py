"""Bad input for pretraining, perplexity and tokenizers: one line, and no file is touched."""

from __future__ import annotations

import os

import pytest

from minillama.formats.checkpoint import write_checkpoint
from models import tiny_llama


@pytest.fixture
def command(pretrain_command):
    return pretrain_command


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
    ("an empty text", "pretrain", ["--corpus", "a.txt"], text("a.txt", "\n"), "a.txt has no text"),
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
    ("a run in the texts' folder", "pretrain", ["--corpus", "."], None, "is inside --corpus ., and its log would be"),
    ("a model among the texts", "pretrain", ["--corpus", "texts", "--model_out", "texts/b.txt"],
     text("texts/a.txt", "a cat"), "texts/b.txt would be one of the texts of --corpus texts"),
    ("a tokenizer among the texts", "tokenizer", ["--corpus", "texts", "--model_out", "texts/a.txt"],
     text("texts/a.txt", "a cat"), "texts/a.txt would be one of the texts"),
    ("a text without a name", "pretrain", ["--corpus", ""], None, "--corpus '' names no text"),
    ("a weight of nothing", "pretrain", ["--corpus", "=2"], None, "--corpus '=2' names no text"),
    ("a weight for a tokenizer", "tokenizer", ["--corpus", "stories.txt=2"], None, "leave out the weights"),
    ("a weight beyond memory", "pretrain", ["--corpus", "stories.txt=1e12"], None, "windows in a pass, more than"),
    ("the run's own file", "pretrain", ["--run_dir", ".", "--model_out", "best.pt"], None, "the run's own files"),
    ("a preset of a continued one", "pretrain", [*FROM, "--preset", "mini"], a_model(), "--preset is for a new model"),
    ("part of a document held out", "pretrain", ["--held_out", "1.5"], None, "--held_out is 1.5; it must be a share"),
    ("a file for tokens", "pretrain", ["--tokens_dir", "tok.model/x"], None, "tok.model/x cannot be created"),
    ("too much held out", "pretrain", ["--held_out", "40"], None, "40 documents, so 40 cannot be held out"),
    ("less than none held out", "pretrain", ["--held_out", "-1"], None, "argument --held_out: '-1' is not allowed"),
    ("a window too long", "pretrain", ["--window", "33"], None, "--window 33 is longer than the model's context of 32"),
    ("a text too short", "pretrain", ["--corpus", "a.txt", "--held_out", "0"], text("a.txt", "a cat"), "too short for"),
    ("no output", "pretrain", ["--model_out", ""], None, "needs --model_out, the file to write"),
    ("an output nowhere", "pretrain", ["--model_out", "no/out.safetensors"], None, "there is no folder no"),
    ("an output that is read", "pretrain", ["--model_out", "stories.txt"], None, "is both input and output"),
    ("a model for its tokenizer", "pretrain", ["--model_out", "out.model"], None, "is its tokenizer's name"),
    ("heads that do not fit", "pretrain", ["--dim", "18", "--n_heads", "4"], None, "dim"),
    ("key heads that do not fit", "pretrain", ["--n_heads", "2", "--n_kv_heads", "3"], None, "n_kv_heads"),
    ("a size of none", "pretrain", ["--n_layers", "0"], None, "argument --n_layers: '0' is not allowed"),
    ("a model that sees all", "pretrain", ["--attention", "bidirectional"], None, "bidirectional: it would see"),
    ("a continued one that does", "pretrain", FROM, a_model(causal=False), "add --attention causal"),
    ("sizes of a continued one", "pretrain", [*FROM, "--dim", "32"], a_model(), "--dim is for a new model"),
    ("positions of a continued one", "pretrain", [*FROM, "--position", "alibi"], a_model(), "--position is for a new"),
    ("heads that make no pairs", "pretrain", ["--differential"], None, "n_kv_heads 1; differential attention takes"),
    ("ALiBi that sees all", "pretrain", ["--position", "alibi", "--attention", "bidirectional"], None, "needs causal"),
    ("positions of a new one", "perplexity", [*FROM, "--sliding_window", "8"], a_model(), "leave it out for --option"),
    ("no such positions", "pretrain", ["--position", "learned"], None, "argument --position: invalid choice:"),
    ("no window", "pretrain", ["--sliding_window", "0"], None, "argument --sliding_window: '0' is not allowed"),
    ("8 bits of what has none", "perplexity", [*FROM, "--quantize", "int8"], a_model(attention_type="differential"),
     "differential attention cannot be quantized"),
    ("no model to continue", "pretrain", [*FROM, "--tokenizer", "tok.model"], None, "model.pt: no such checkpoint"),
    ("another vocabulary", "pretrain", FROM, a_model(vocab_size=300), "has a vocabulary of 300"),
    ("a prompt that is no text", "pretrain", ["--sample_prompt", "\udce9"], None, "is not UTF-8 text"),
    ("a run there already", "pretrain", ["--run_dir", "tok.model"], None, "tok.model is a file"),
    ("no text", "tokenizer", ["--corpus", "none.txt"], None, "none.txt: no such text"),
    ("too many pieces", "tokenizer", ["--vocab_size", "100000"], None, "give another --vocab_size"),
    ("too few pieces", "tokenizer", ["--vocab_size", "20"], None, "give another --vocab_size"),
    ("fewer pieces than letters", "tokenizer", ["--vocab_size", "265"], None, "265 vs 2"),
    ("no output", "tokenizer", ["--model_out", ""], None, "needs --model_out"),
    ("an output that is read", "tokenizer", ["--model_out", "./stories.txt"], None, "is both input and output"),
    ("a missing text", "perplexity", [*FROM, "--corpus", "none.txt"], a_model(), "none.txt: no such text"),
    ("an empty text", "perplexity", [*FROM, "--corpus", "a.txt"], lambda f: (a_model()(f), text("a.txt", "")(f)),
     "a.txt holds no text"),
    ("a stride above", "perplexity", [*FROM, "--window", "8", "--stride", "9"], a_model(), "--stride 9 is above"),
    ("a window too long", "perplexity", [*FROM, "--window", "33"], a_model(), "context of 32"),
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
    assert (code, out) == (2, "") and f"--option {option} runs in a single process; start it without torchrun" in err


def test_a_file_whose_name_has_an_equals_sign(command):
    os.rename("stories.txt", "stories=2")
    assert command.pretrain("--corpus", "stories=2")[0] == 0
    code, _, err = command.pretrain("--corpus", "stories=2=0.5", run_dir="b")
    assert code == 0 and "stories=2: 40 documents" in err and "weight 0.5" in err
