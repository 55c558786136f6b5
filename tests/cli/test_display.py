"""Output streams that fail: a command whose results are files goes on, one that only prints stops."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from minillama.cli.display import Display, safe_display
from minillama.formats.checkpoint import write_checkpoint
from models import tiny_llama

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
LEFT = "{ sleep 0.1; true; }"  # a reader that reads nothing
WAYS = {
    "left": f" | {LEFT}",
    "both left": f" 2>&1 | {LEFT}",
    "full": " > /dev/full",
    "stderr full": " 2> /dev/full",
    "closed": " >&-",
    "both closed": " >&- 2>&-",
}


class Shell:
    """A folder with tiny data and a tiny model, and bash in it."""

    def __init__(self, folder, tokenizer):
        self.folder = folder
        lines = [f"{i % 2} ||| {'a bad film' if i % 2 == 0 else 'one good day 😀'} {i}" for i in range(4)]
        pairs = [{"prompt": f"what is {i}", "answer": "good 😀"} for i in range(3)]
        for split in ("train", "dev", "test"):
            (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
        (folder / "names.json").write_text('["bad", "good"]', encoding="utf-8")
        (folder / "model.model").write_bytes(tokenizer.read_bytes())
        model = tiny_llama(vocab_size=512, max_seq_len=64, causal=True)
        write_checkpoint(folder / "model.pt", model.state_dict(), model.config)

    def __call__(self, option, *more, way=""):
        """The finished process; its exit code is that of run_llama.py."""
        words = [sys.executable, str(ROOT / "run_llama.py"), "--option", option]
        words += ["--pretrained-model-path", "model.pt", "--max_new_tokens", "4", *more]
        if option in ("prompt", "finetune", "lora"):
            kind = {"prompt": "prompting", "finetune": "finetuning", "lora": "lora"}[option]
            words += ["--label-names", "names.json"]
            words += [w for s in ("train", "dev", "test") for w in (f"--{s}", f"{s}.txt")]
            words += [w for s in ("dev", "test") for w in (f"--{s}_out", f"{s}-{kind}-output.txt")]
        line = " ".join(f"'{word}'" for word in words)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.run(
            ["bash", "-c", f"{line}{way}; exit ${{PIPESTATUS[0]}}"],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )

    def lines(self, name):
        return len((self.folder / name).read_text(encoding="utf-8").splitlines())


@pytest.fixture
def shell(asset, tmp_path):
    return Shell(tmp_path, asset("stories260K/tok512.model"))


@pytest.mark.parametrize(
    "way",
    [
        *(WAYS["both left"], WAYS["full"], WAYS["both closed"]),
        *(pytest.param(WAYS[name], marks=pytest.mark.slow) for name in ("left", "stderr full")),
    ],
)
def test_predictions_are_whole_whatever_becomes_of_the_streams(shell, way):
    done = shell("prompt", way=way)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert shell.lines("dev-prompting-output.txt") == shell.lines("test-prompting-output.txt") == 4


def test_training_ends_with_its_files_and_says_that_the_display_was_lost(shell):
    done = shell("lora", "--epochs", "1", "--run_dir", "run", way=WAYS["left"])
    assert done.returncode == 0 and "warning: the standard output failed (" in done.stderr.splitlines()[-1]
    assert shell.lines("dev-lora-output.txt") == shell.lines("test-lora-output.txt") == 4
    assert "\ntest accuracy" in (shell.folder / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("way", [pytest.param("left", marks=pytest.mark.slow), "both closed"])
def test_both_generated_texts_are_whole(shell, way):
    assert shell("generate", "--prompt", "one day", way=WAYS[way]).returncode == 0
    for temperature in (0, 1):
        text = (shell.folder / f"generated-sentence-temp-{temperature}.txt").read_text(encoding="utf-8")
        assert text.startswith("one day") and text.endswith("\n")


@pytest.mark.slow
def test_answers_and_mixed_predictions_are_whole(shell):
    splits = [word for split in ("train", "dev", "test") for word in (f"--{split}", f"{split}.jsonl")]
    settings = ["--epochs", "1", "--model_out", "out.safetensors", "--run_dir", "run"]
    assert shell("sft", *splits, *settings, way=WAYS["left"]).returncode == 0
    assert shell.lines("sft-dev-answers.jsonl") == shell.lines("sft-test-answers.jsonl") == 3
    assert shell("finetune", "--epochs", "1", "--run_dir", "fine").returncode == 0
    mixed = ["--finetuned", "fine/best.pt", "--alphas", "0,1", "--dev_out", "d.txt", "--test_out", "t.txt"]
    assert shell("wise_ft", *mixed, way=WAYS["full"]).returncode == 0
    assert shell.lines("d.txt") == shell.lines("t.txt") == 4 and shell.lines("wise-ft-curve.csv") == 3


@pytest.mark.parametrize(
    "way, code, line",
    [
        ("left", 141, ""),
        ("full", 2, "run_llama.py: error: the standard output failed (No space left on device); write"),
        ("closed", 2, "run_llama.py: error: the standard output, which takes the text, is closed; write it"),
    ],
)
def test_a_command_that_only_prints_stops_where_nothing_can_be_printed(shell, way, code, line):
    done = shell("perplexity", "--corpus", "dev.txt", way=WAYS[way])
    assert done.returncode == code and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(line)


def test_what_an_encoding_cannot_express_is_shown_as_an_escape():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    Display(stream, 1).write("café 😀")
    assert stream.buffer.getvalue() == rb"caf\xe9 \U0001f600"


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("broken", [Broken, lambda: open(os.devnull), lambda: closed(io.StringIO())])
def test_a_failure_is_remembered_or_raised_where_the_output_is_required(broken):
    lenient, strict = Display(broken(), 1), Display(broken(), 1)
    for _ in range(2):
        assert lenient.write("text") == 4
        lenient.flush()
    assert lenient.failure is not None
    strict.require()
    with pytest.raises(OSError, match="Broken pipe|the standard output failed"):
        strict.write("text")


def closed(stream):
    stream.close()
    return stream


def test_the_streams_come_back(monkeypatch):
    ours = io.StringIO()
    monkeypatch.setattr("sys.stdout", ours)
    monkeypatch.setattr("sys.stderr", None)
    with pytest.raises(KeyError, match="stop"), safe_display() as out:
        print("shown")
        print("nowhere", file=sys.stderr)
        assert out.failure is None
        raise KeyError("stop")
    assert sys.stdout is ours and sys.stderr is None and ours.getvalue() == "shown\n"


def test_a_closed_stream_is_not_given_to_a_file_that_is_opened(tmp_path):
    """Output of C code to descriptor 1 or 2 would land in it."""
    code = "from minillama.cli.display import safe_display\nwith safe_display(): print(open('file', 'w').fileno() > 2)"
    line = f'"{sys.executable}" -c "{code}" 2>&-'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n"
