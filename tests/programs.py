"""Runs of the commands in a folder with small files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import run_llama
from llama import llama_from_checkpoint
from minillama.formats.checkpoint import read_checkpoint, write_checkpoint
from minillama.text.documents import DOCUMENT_END
from minillama.training.run_directory import RunDirectory
from models import some_stories, tiny_llama
from run_llama import main
from tokenizer import Tokenizer


class Program:
    """Runs `run_llama.py` in a folder, by its main function."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self.capsys.readouterr()
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as exit:
            code = exit.code
        return code, *self.capsys.readouterr()

    def metrics(self, run_dir: str = "run") -> list[dict]:
        """The run's line about each epoch, without its time."""
        lines = (self.folder / run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


def next_command(err: str) -> list[str]:
    """The arguments of the command that a run ends with, which says what its model is for."""
    told = err.rstrip().splitlines()[-1]
    python, script, *arguments = shlex.split(told.removeprefix("next "))
    assert told.startswith("next ") and python == "python"
    assert Path(script).resolve() == Path(run_llama.__file__).resolve()
    return arguments


OUTPUT_NAMES = {"prompt": "prompting", "finetune": "finetuning", "lora": "lora"}


def outputs(option):
    """The two files that this option is told to write here."""
    return [f"{split}-{OUTPUT_NAMES[option]}-output.txt" for split in ("dev", "test")]


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
        if option in OUTPUT_NAMES:
            fixed += ["--dev_out", outputs(option)[0], "--test_out", outputs(option)[1]]
        self.capsys.readouterr()
        try:
            code = main(["--option", option, *fixed, *more])
        except SystemExit as exit:
            code = exit.code
        return code, *self.capsys.readouterr()

    def files(self):
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


def writes(name, content):
    """Writes a file with this text into the folder that it is called with."""
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def writes_bytes(name, data):
    """Writes a file with these bytes into the folder that it is called with."""
    return lambda folder: (folder / name).write_bytes(data)


def fine_tuned(command, option="finetune", head="linear", *more):
    """The path of a model that this option has trained for an epoch."""
    rate = "3e-3" if option == "finetune" else "0.05"
    more = ["--dtype", "fp32", *more]
    assert command(option, "--head", head, "--lr", rate, "--epochs", "1", "--run_dir", "run", *more)[0] == 0
    return "run/best.pt"


def run_with(command, option, *more, finetuned="run/best.pt"):
    """Exit code, stdout and stderr of an option that takes a fine-tuned model."""
    command.capsys.readouterr()
    try:
        code = main(["--option", option, "--finetuned", finetuned, "--dtype", "fp32", *more])
    except SystemExit as exit:
        code = exit.code
    return code, *command.capsys.readouterr()


SIZES = ["--dim", "16", "--n_layers", "1", "--n_heads", "2", "--n_kv_heads", "1", "--max_seq_len", "32"]
SHORT = ["--max_steps", "6", "--eval_every", "3", "--batch_size", "4", "--warmup_steps", "1", "--held_out", "4"]
STORIES = some_stories(40, words=48)
MARK = f"\n{DOCUMENT_END}\n"


class PretrainCommand(Program):
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


class Crash(Exception):
    """The power goes."""


def crashes_at_step(monkeypatch, step):
    metric = RunDirectory.metric

    def crashing(self, number, **values):
        metric(self, number, **values)
        if number == step:
            raise Crash

    monkeypatch.setattr(RunDirectory, "metric", crashing)


class GenerateCommand(Program):
    """Runs `--option generate` in a folder with a small causal model; later options override."""

    def __init__(self, folder, tokenizer, capsys):
        super().__init__(folder, capsys)
        (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
        model = tiny_llama(vocab_size=320, max_seq_len=128, causal=True)
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    def __call__(self, *more):
        """(exit code, stdout, stderr)"""
        return super().__call__("--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", *more)


def generated(command, *more, tokens="16"):
    code, out, err = command("--prompt", "one day", "--max_new_tokens", tokens, *more)
    assert code == 0, err
    return out, err


def made_of(command):
    """The model and the tokenizer in the command's folder."""
    llama = llama_from_checkpoint(read_checkpoint(command.folder / "model.pt"))
    return llama, Tokenizer(tokenizer_model=command.folder / "tokenizer.model")
