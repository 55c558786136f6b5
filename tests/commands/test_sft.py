"""--option sft: supervised fine-tuning, run through run_llama.py on a model of a few thousand weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from llama import load_pretrained
from lora import merge_lora_weights
from minillama.formats.adapters import read_adapter
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint
from minillama.text.examples import read_examples, tokenize_examples
from minillama.training import answering as tasks
from minillama.training.evaluation import answer_prompts, describe_answers
from models import ADJECTIVES, ANIMALS, tiny_llama
from programs import Crash, Program, crashes_at_step, next_command
from tokenizer import Tokenizer

SHORT = ["--epochs", "2", "--batch_size", "4", "--warmup_steps", "1", "--max_new_tokens", "4", "--dtype", "fp32"]


def some_lines(count, first=0):
    """The colour, so to say, the animal is: the word before it."""
    pairs = [(adjective, animal) for adjective in ADJECTIVES for animal in ANIMALS]
    lines = []
    for n in range(first, first + count):
        (word, animal), (other, second) = pairs[n * 7 % 100], pairs[(n * 31 + 13) % 100]
        lines.append({"prompt": f"the {word} {animal} saw the {other} {second}. the {animal}", "answer": word, "n": n})
    return lines


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


class Command(Program):
    """A folder with examples, a model and its tokenizer; runs `run_llama.py` in it."""

    def __init__(self, folder, tokenizer, capsys):
        super().__init__(folder, capsys)
        for split, count, first in (("train", 17, 0), ("dev", 6, 17), ("test", 5, 23)):
            (folder / f"{split}.jsonl").write_text(jsonl(some_lines(count, first)), encoding="utf-8")
        (folder / "model.model").write_bytes(tokenizer.read_bytes())
        model = tiny_llama(vocab_size=320, causal=True, max_seq_len=64)
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    def sft(self, *more, out="out.safetensors", run_dir="run"):
        """Later options override earlier ones."""
        fixed = ["--option", "sft", "--train", "train.jsonl", "--dev", "dev.jsonl", "--model_out", out]
        fixed += ["--pretrained-model-path", "model.pt", "--run_dir", run_dir, *SHORT]
        return self(*fixed, *more)


@pytest.fixture
def command(small_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, small_tokenizer, capsys)


def test_a_model_is_written_that_gives_the_answers_in_the_files(command):
    code, out, err = command.sft("--test", "test.jsonl", "--lr", "0.01")
    assert code == 0, err
    model, tokenizer = load_pretrained("out.safetensors"), Tokenizer(tokenizer_model="out.model")
    assert (command.folder / "out.model").read_bytes() == (command.folder / "model.model").read_bytes()
    lines = []
    for split in ("dev", "test"):
        examples, _ = tokenize_examples(split, read_examples(f"{split}.jsonl"), tokenizer, 64, 4)
        answers = answer_prompts(model, examples, tokenizer, 1, 4)
        found = (command.folder / f"sft-{split}-answers.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line) for line in found.splitlines()] == [
            {"prompt": one.prompt, "answer": one.answer, "predicted": answer}
            for one, answer in zip(examples, answers, strict=True)
        ]
        lines.append(f"{split} {describe_answers(answers, examples)} ({len(examples)} rows)\n")
    assert out == "".join(lines)
    prompt = some_lines(1, 17)[0]["prompt"]
    arguments = next_command(err)
    assert arguments == ["--pretrained-model-path", "out.safetensors", "--temperature", "0", "--prompt", prompt]
    code, out, _ = command(*arguments, "--max_new_tokens", "4")
    predicted = json.loads((command.folder / "sft-dev-answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert code == 0 and out.split() == f"{prompt} {predicted['predicted']}".split()


def test_the_answers_are_learnt(command):
    code, _, err = command.sft("--epochs", "30", "--lr", "0.01", "--dev", "train.jsonl")
    assert code == 0, err
    *judged, last = [line for line in command.metrics() if "dev_f1" in line]
    assert last["final"] and not any("final" in line for line in judged)
    assert len(judged) == 30 and judged[-1]["dev_loss"] < 0.3 * judged[0]["dev_loss"]
    assert judged[-1]["dev_exact_match"] > 0.5 > judged[0]["dev_exact_match"]


@pytest.mark.parametrize("rows", [200, 0])
def test_the_best_is_kept_by_f1_and_by_the_loss_at_the_same_f1_or_where_nothing_is_answered(command, rows):
    settings = ["--dev", "train.jsonl", "--lr", "0.03", "--epochs", "15", "--schedule", "constant"]
    assert command.sft("--answer_rows", rows, *settings)[0] == 0
    judged = [line for line in command.metrics() if "dev_loss" in line]
    assert all(("dev_f1" in line) == (rows > 0) for line in judged)
    assert rows == 0 or max(line["dev_f1"] for line in judged) > 0
    best = max(judged, key=lambda line: (line.get("dev_f1", 0), -line["dev_loss"]))
    saved = torch.load("run/best.pt", weights_only=True)
    assert saved["epoch"] == 1 + judged.index(best)
    assert saved["scores"].items() <= best.items()


@pytest.mark.parametrize(
    "more", [[], ["--lora_rank", "2"], ["--lora_rank", "2", "--dora"]], ids=["all weights", "LoRA", "DoRA"]
)
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(command, monkeypatch, more):
    more = [*more, "--save_every", "2", "--lr", "0.01"]
    assert command.sft(*more, out="whole.safetensors", run_dir="whole")[0] == 0
    answers = (command.folder / "sft-dev-answers.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        crashes_at_step(patched, 8)
        with pytest.raises(Crash):
            command.sft(*more, out="again.safetensors", run_dir="again")
    assert not os.path.exists("again.safetensors")
    code, _, err = command("--resume", "--run_dir", "again")
    assert code == 0 and "resumed at epoch 2, step 6" in err, err
    assert command.metrics("again") == command.metrics("whole") and len(command.metrics("whole")) == 2 * (5 + 1) + 1
    assert (command.folder / "again.safetensors").read_bytes() == (command.folder / "whole.safetensors").read_bytes()
    assert (command.folder / "sft-dev-answers.jsonl").read_bytes() == answers


def test_a_stop_while_dev_is_answered_is_resumed(command, monkeypatch):
    assert command.sft(out="whole.safetensors", run_dir="whole")[0] == 0
    answer_prompts = tasks.answer_prompts

    def signalling(*arguments, **settings):
        signal.raise_signal(signal.SIGTERM)
        return answer_prompts(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "answer_prompts", signalling)
        assert command.sft(out="again.safetensors", run_dir="again")[0] == 128 + signal.SIGTERM
    assert command("--resume", "--run_dir", "again")[0] == 0
    assert (command.folder / "again.safetensors").read_bytes() == (command.folder / "whole.safetensors").read_bytes()


def test_micro_batches_and_windows_take_the_same_steps(command):
    wanted = None
    for n, more in enumerate(([], ["--micro_batch_size", "1"], ["--window", "64"])):
        code, _, err = command.sft(*more, "--lr", "0.001", run_dir=f"run{n}")
        assert code == 0 and ("rows of 64 tokens" in err) == ("--window" in more), err
        losses = [line["loss"] for line in command.metrics(f"run{n}") if "loss" in line]
        wanted = wanted or losses
        assert losses == pytest.approx(wanted, rel=1e-4) and len(losses) == 10


ATTENTION = {"compute_query", "compute_key", "compute_value", "compute_output"}
VARIANT = ["--dora", "--rslora", "--lora_plus", "16", "--lora_targets", "mlp", "compute_key"]


@pytest.mark.parametrize("more, trained", [([], ATTENTION), (VARIANT, {"w1", "w2", "w3", "compute_key"})])
def test_lora_trains_its_matrices_alone_and_is_merged_in_at_the_end(command, more, trained):
    code, _, err = command.sft("--lora_rank", "2", "--lora_alpha", "4", "--lr", "0.01", *more)
    assert code == 0 and ("LoRA        896 of" in err) == (not more), err
    before, after = (read_checkpoint(path).state for path in ("model.pt", "out.safetensors"))
    changed = {name.split(".")[-2] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == trained
    saved = torch.load("run/best.pt", weights_only=True)["model"]
    assert any(name.endswith("lora_magnitude") for name in saved) == ("--dora" in more)
    model = load_pretrained("model.pt")
    read_adapter(command.folder / "run/best.pt", model.config).apply(model)  # --adapter takes it, too
    merge_lora_weights(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items() if name in after)


def test_lora_plus_scales_the_steps_of_lora_b(command):
    assert command.sft("--lora_rank", "2", "--lora_plus", "16", run_dir="plus")[0] == 0
    assert command.sft("--lora_rank", "2", run_dir="plain")[0] == 0
    losses = [[line["loss"] for line in command.metrics(name) if "loss" in line] for name in ("plus", "plain")]
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]


def test_options_may_come_from_a_file(command):
    (command.folder / "sft.json").write_text(json.dumps({"option": "sft", "epochs": 1, "lora_rank": 2, "dora": True}))
    assert command.sft("--config", "sft.json")[0] == 0
    saved = json.loads((command.folder / "run" / "options.json").read_text(encoding="utf-8"))["options"]
    assert saved["dora"] and saved["lr"] == 5e-4 and saved["epochs"] == 2  # what is typed goes before the file


def test_without_data_the_demo_is_taken(command, monkeypatch):
    """Only named in the header: a window of one token, which no demo story fits, ends it there."""
    code, _, err = command("--option", "sft", "--model_out", "out.safetensors", "--run_dir", "run", "--window", "1")
    assert code == 2 and "using the demo data" in err
    for split in ("train", "dev", "test"):
        assert f"{split} {os.path.relpath(ROOT)}" in err or f"{split} {ROOT / 'data' / f'demo-qa-{split}.jsonl'}" in err


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--lora_rank", "2"]], ids=["DDP", "FSDP2", "DDP with LoRA"])
def test_two_processes_equal_one(command, more):
    """With batches that do not divide evenly, in micro-batches of two rows."""
    fixed = ["--batch_size", "5", "--micro_batch_size", "2", "--lr", "0.003", "--test", "test.jsonl"]
    lora = [one for one in more if one != "--fsdp"]
    assert command.sft(*fixed, *lora)[0] == 0
    one_process = (command.folder / "sft-test-answers.jsonl").read_bytes()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "run_llama.py")]
    arguments = ["--option", "sft", "--train", "train.jsonl", "--dev", "dev.jsonl", "--model_out", "two.safetensors"]
    arguments += ["--pretrained-model-path", "model.pt", *SHORT, *fixed, *more, "--run_dir", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *launch, *arguments], cwd=command.folder, env=environment,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("wrote two.safetensors") == 1 and result.stdout.count("test exact match") == 1
    for ours, theirs in zip(command.metrics("two"), command.metrics(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert (command.folder / "sft-test-answers.jsonl").read_bytes() == one_process
    one, two = (read_checkpoint(f"{name}.safetensors").state for name in ("out", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)


# Bad input


def text(name, content):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def a_model(**changes):
    def write(folder):
        model = tiny_llama(**({"vocab_size": 320, "causal": True, "max_seq_len": 64} | changes))
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    return write


GOOD = '{"prompt": "the cat", "answer": "a dog"}\n'
BAD = [
    *((f"{name} missing", [f"--{name}", "no.jsonl"], None, "no.jsonl: no such data file")
      for name in ("train", "dev", "test")),
    *((f"a line with {what}", [], text("dev.jsonl", GOOD + line), f"dev.jsonl, line 2: {message}")
      for what, line, message in (
          ("no JSON", "the cat", "not JSON (Expecting value"),
          ("a list", '["the cat", "a dog"]', "['the cat', 'a dog'] is not a JSON object"),
          ("no prompt", '{"answer": "a dog"}', 'there is no "prompt"; a line is {"prompt": "...", "answer": "..."}'),
          ("no answer", '{"prompt": "the cat"}', 'there is no "answer"'),
          ("a number", '{"prompt": "the cat", "answer": 3}', '"answer" is 3; it must be a text'),
          ("an empty prompt", '{"prompt": " ", "answer": "a dog"}', "\"prompt\" is ' '; it must be a text"),
          ("half a character", '{"prompt": "the \\ud83d", "answer": "a dog"}', "'the \\ud83d' is not UTF-8 text"),
          ("a long answer", GOOD.replace("a dog", "dog " * 99), "an answer of 297 tokens, or --max"),
      )),
    ("an empty file", [], text("train.jsonl", "\n"), "train.jsonl is empty"),
    ("not UTF-8", [], lambda f: (f / "dev.jsonl").write_bytes(b"\xff\n"), "dev.jsonl, line 1: not UTF-8"),
    ("room for no prompt", ["--max_new_tokens", "64"], None, "train.jsonl, line 1: an answer of 2 tokens, or --max"),
    ("no dev", ["--dev", ""], None, "option sft needs both"),
    ("no output", ["--model_out", ""], None, "needs --model_out, the file to write"),
    ("a model for its tokenizer", ["--model_out", "out.model"], None, "is its tokenizer's name"),
    ("an output that is read", ["--dev_out", "train.jsonl"], None, "train.jsonl is both input and output"),
    ("two outputs of one name", ["--test", "test.jsonl", "--dev_out", "a", "--test_out", "./a"], None, "the same file"),
    ("an output twice", ["--dev_out", "out.safetensors"], None, "out.safetensors are the same file"),
    ("a window too long", ["--window", "65"], None, "--window 65 is longer than the model's context of 64"),
    ("a rank too high", ["--lora_rank", "33"], None, "--lora_rank is 33, above the model's width of 32"),
    ("a variant without LoRA", ["--dora"], None, "all weights would be trained; add --lora_rank"),
    ("a regularizer of classes", ["--smart", "1"], None, "--smart belongs to --option finetune, lora; leave it out"),
    ("a template", ["--template", "{sentence} So"], None, "--template belongs to --option prompt"),
    ("8 bits", ["--quantize", "int8"], None, "--quantize is for commands that only run a model"),
    ("a model that sees all", [], a_model(causal=False), "add --attention causal"),
    ("another vocabulary", [], a_model(vocab_size=300), "has a vocabulary of 300"),
    ("rows below none", ["--answer_rows", "-1"], None, "argument --answer_rows: '-1' is not allowed"),
]  # fmt: skip


@pytest.mark.parametrize("what, more, change, message", BAD, ids=[case[0] for case in BAD])
def test_bad_input_gets_one_line_and_touches_nothing(command, what, more, change, message):
    if change:
        change(command.folder)
    before = command.files()
    code, out, err = command.sft(*more)
    assert code == 2 and out == "" and "Traceback" not in err
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    assert errors[0].startswith("run_llama.py: error: ") and message in errors[0]
    assert command.files() == before and not os.path.exists("run")


def test_prompts_too_long_for_the_window_are_cut_with_a_warning(command):
    code, _, err = command.sft("--window", "12")
    assert code == 0 and "prompts was cut: a row holds 12 tokens" in err


def test_a_run_does_not_go_on_with_another_answer(command):
    assert command.sft()[0] == 0
    lines = some_lines(6, 17)
    lines[0]["answer"] = "none"
    (command.folder / "dev.jsonl").write_text(jsonl(lines), encoding="utf-8")
    code, _, err = command("--resume", "--run_dir", "run")
    assert code == 2 and "was started with another model, or other training or dev tokens" in err


def test_the_same_examples_for_train_and_dev_are_told(command):
    code, _, err = command.sft("--dev", "train.jsonl", "--epochs", "1")
    assert code == 0 and "warning: --train and --dev have the same 17 rows (train.jsonl)" in err
