"""Where tests find real files, and tiny seeded models."""

from __future__ import annotations

import json
import random
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config import LlamaConfig
from llama import Llama
from minillama.formats.checkpoint import write_checkpoint
from minillama.training.run_directory import RunDirectory
from run_llama import main
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFORMANCE = ROOT / "tests" / "conformance"
ASSETS = ROOT.parent / "shared" / "assets"
# Where fetch_data.py puts a file, by where a mirror has it.
IN_DATA = {"course/data/": "", "course/reference/": "reference/", "course/": ""}


def find_asset(name: str) -> Path:
    """The file that a mirror has at `name`: from data/, else from a mirror beside the project, else the test skips."""
    in_data = name
    for prefix, folder in IN_DATA.items():
        if name.startswith(prefix):
            in_data = folder + name.removeprefix(prefix)
            break
    for path in (ROOT / "data" / in_data, ASSETS / name):
        if path.is_file():
            return path
    pytest.skip(f"needs data/{in_data}, which `python fetch_data.py` brings")


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    return find_asset


def tiny_config(**changes: object) -> LlamaConfig:
    sizes: dict = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 32}
    return LlamaConfig(**(sizes | changes))


def tiny_llama(seed: int = 0, **changes: object) -> Llama:
    """A small model with weights large enough for its parts to matter."""
    torch.manual_seed(seed)
    model = Llama(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_stories(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Documents that are easy to learn: sentences of one pattern, drawn from few words."""
    draw = random.Random(seed).choice
    sentence = lambda: f"the {draw(ADJECTIVES)} {draw(ANIMALS)} {draw(VERBS)} the {draw(ADJECTIVES)} {draw(ANIMALS)}."  # noqa: E731
    return [" ".join(sentence() for _ in range(words // 6)) for _ in range(count)]


ADJECTIVES = "big small red happy quiet old young funny brave gentle".split()
ANIMALS = "cat dog bird fox owl mouse bear frog horse goat".split()
VERBS = "saw liked chased found helped met heard missed".split()


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
        """What the run tells of each epoch, but for the time it took."""
        lines = (self.folder / run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


def next_command(err: str) -> list[str]:
    """The arguments of the command that a run ends with, which says what its model is for."""
    told = err.rstrip().splitlines()[-1]
    python, script, *arguments = shlex.split(told.removeprefix("next "))
    assert told.startswith("next ") and python == "python" and Path(script).resolve() == ROOT / "run_llama.py"
    return arguments


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 320 pieces, made by `--option tokenizer` from a few hundred lines."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(some_stories(300, seed=1, words=12)), encoding="utf-8")
    path = folder / "small.model"
    arguments = ["--corpus", str(folder / "text.txt"), "--vocab_size", "320", "--model_out", str(path)]
    assert main(["--option", "tokenizer", *arguments]) == 0
    return path


@pytest.fixture(scope="session")
def llama_tokenizer(asset: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer(tokenizer_model=asset("course/tokenizer.model"))


TOKENIZERS = ["course/tokenizer.model", "tokenizers/gpt2_encoder.json", "bundled"]


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest, asset: Callable[[str], Path]) -> Tokenizer:
    if "gpt2" in request.param:
        pytest.importorskip("tiktoken", reason="needs tiktoken: pip install tiktoken")
    path = ROOT / "data" / "mini-llama.model" if request.param == "bundled" else asset(request.param)
    return Tokenizer(tokenizer_model=path)


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


@pytest.fixture
def command(asset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, asset("stories260K/tok512.model"), capsys)


def writes(name, content):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


@pytest.fixture
def command_of_words(command):
    """`command` whose labels are words of one token each."""
    writes("names.json", '["in", "of"]')(command.folder)
    return command


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


class Crash(Exception):
    """The power goes."""


def crashes_at_step(monkeypatch, step):
    metric = RunDirectory.metric

    def crashing(self, number, **values):
        metric(self, number, **values)
        if number == step:
            raise Crash

    monkeypatch.setattr(RunDirectory, "metric", crashing)


class BrokenFinder:
    """Has the import of one package fail with an error."""

    def __init__(self, package, error):
        self.package, self.error = package, error

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise self.error
        return None


def break_package(monkeypatch, package, error):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(sys, "meta_path", [BrokenFinder(package, error), *sys.meta_path])
