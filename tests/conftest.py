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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import LlamaConfig  # noqa: E402
from llama import Llama  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

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
        from run_llama import main

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
    from run_llama import main

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
