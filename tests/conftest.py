"""Where tests find real files, and the fixtures that several test files need."""

from __future__ import annotations

import base64
import http.server
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from fitting import Fit
from minillama.formats.tokenizer_json import write_huggingface_tokenizer
from minillama.formats.tokenizers import LLAMA3_PATTERN
from models import some_stories
from prepare_submit import CODE, required_outputs
from programs import Command, GenerateCommand, PretrainCommand, writes
from run_llama import main
from small_mirror import BODY, LABELS, WEIGHTS, Handler
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


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 320 pieces, made by `--option tokenizer` from a few hundred lines."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(some_stories(300, seed=1, words=12)), encoding="utf-8")
    path = folder / "small.model"
    arguments = ["--corpus", str(folder / "text.txt"), "--vocab_size", "320", "--model_out", str(path)]
    assert main(["--option", "tokenizer", *arguments]) == 0
    return path


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: Path) -> Tokenizer:
    return Tokenizer(tokenizer_model=small_tokenizer)


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


@pytest.fixture
def command(asset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, asset("stories260K/tok512.model"), capsys)


@pytest.fixture
def command_of_words(command):
    """`command` whose labels are words of one token each."""
    writes("names.json", '["in", "of"]')(command.folder)
    return command


@pytest.fixture
def pretrain_command(small_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return PretrainCommand(tmp_path, small_tokenizer, capsys)


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


@pytest.fixture
def fit(tmp_path):
    return Fit(tmp_path)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.fixture(scope="module")
def tokenizers(asset, tmp_path_factory):
    """A tokenizer of a kind, opened once."""
    opened = {}

    def of(kind):
        if kind not in opened:
            if kind == "huggingface":
                path = tmp_path_factory.mktemp("huggingface")
                write_huggingface_tokenizer(Tokenizer(tokenizer_model=ROOT / "data/mini-llama.model"), path)
                path = path / "tokenizer.json"
            else:
                names = {"llama3": "tokenizers/llama3_tokenizer.model", "gpt2": "tokenizers/gpt2_encoder.json"}
                path = asset(names.get(kind, "course/tokenizer.model"))
            opened[kind] = Tokenizer(tokenizer_model=path)
        return opened[kind]

    return of


@pytest.fixture(scope="module")
def llama3_elsewhere(asset):
    """Llama 3's ranks in the tokenizers library: all pairs that make a token, by its rank."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    rows = [row.split() for row in asset("tokenizers/llama3_tokenizer.model").read_bytes().splitlines()]
    vocab = {"".join(letters[b] for b in base64.b64decode(token)): int(rank) for token, rank in rows}
    pairs = [(t[:i], t[i:]) for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    pairs.sort(key=lambda pair: vocab["".join(pair)])
    independent = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    independent.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    independent.decoder = decoders.ByteLevel()
    return independent


@pytest.fixture
def generate_command(small_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return GenerateCommand(tmp_path, small_tokenizer, capsys)


@pytest.fixture
def mirror(tmp_path) -> Path:
    root = tmp_path / "mirror"
    (root / "course" / "data").mkdir(parents=True)
    (root / "course/data/train.txt").write_bytes(BODY)
    (root / "course/data/labels.json").write_bytes(LABELS)
    (root / "course/tokenizer.model").write_bytes(b"pieces")
    (root / "model.pt").write_bytes(WEIGHTS)  # the other spot a mirror may use
    return root


@pytest.fixture
def server(mirror):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.mode, server.ranges, server.sent = mirror, "", [], []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def into(tmp_path) -> Path:
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    return folder


SENTENCES = ["A warm , funny film .", "No ||| one goes\u2028unindicted here .", "Na\u00efve\x85."]

MORE_CODE = ("config.py", "minillama/__init__.py", "minillama/text/batches.py")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A complete project with the source data of all four prediction pairs."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "minillama" / "text" / "__pycache__").mkdir(parents=True)
    (folder / "minillama" / "text" / "__pycache__" / "batches.pyc").write_bytes(b"\0")
    for name in (*CODE, *MORE_CODE):
        (folder / name).write_text(f'"""{name}"""\n')
    for name in required_outputs():
        write_rows(folder / name, SENTENCES)
    for corpus in ("sst", "cfimdb"):
        for split in ("dev", "test"):
            write_rows(folder / "data" / f"{corpus}-{split}.txt", SENTENCES, label=0)
    return folder


def write_rows(path: Path, sentences: list[str], label: int = 1) -> None:
    path.write_bytes("".join(f"{label} ||| {sentence}\n" for sentence in sentences).encode())
