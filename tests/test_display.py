"""A result is not lost because its display is: real processes with a reader that leaves, a full or a closed stdout."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from display import Display, safe_display
from test_cli import Command, outputs


class Failing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "full"), ValueError("closed file")])
def test_a_stream_that_fails_is_lost_and_goes_on(error):
    display = Display(Failing(error), 1)
    assert print("a", "b", file=display, flush=True) is None and display.failure is error


def test_a_stream_that_is_needed_says_what_failed():
    display = Display(Failing(OSError(28, "No space left on device")), 1)
    display.required = True
    with pytest.raises(OSError, match=r"the standard output failed \(No space left on device\)"):
        print("a", file=display)
    display = Display(Failing(BrokenPipeError(32, "Broken pipe")), 1)
    display.required = True
    with pytest.raises(BrokenPipeError):
        print("a", file=display)


def test_the_streams_are_put_back_and_what_they_cannot_say_is_escaped(monkeypatch):
    latin = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", latin)
    monkeypatch.setattr(sys, "stderr", None)
    with safe_display() as stdout:
        print("né 🙂")
        print("lost", file=sys.stderr)
        assert not stdout.closed_by_caller and sys.stderr.closed_by_caller
    assert sys.stdout is latin and sys.stderr is None
    assert latin.buffer.getvalue() == b"n\\xe9 \\U0001f642\n"


@pytest.fixture
def shell(asset, tmp_path, monkeypatch, capsys):
    """Runs a line of the shell in a folder with data and a model, in which $FINETUNE and others are our commands."""
    monkeypatch.chdir(tmp_path)
    Command(tmp_path, asset("stories260K/tok512.model"), capsys)
    for split in ("train", "dev", "test"):
        with (tmp_path / f"{split}.txt").open("a", encoding="utf-8") as file:
            file.write("1 ||| one good day é 🙂\n")
    program = (
        f'"{sys.executable}" "{ROOT / "run_llama.py"}" --pretrained-model-path model.pt --tokenizer tokenizer.model'
    )
    data = (
        "--train train.txt --dev dev.txt --test test.txt --label-names names.json --epochs 1 --batch_size 5 --lr 1e-3"
    )

    def named(option):
        dev, test = outputs(option)
        return f"{program} --option {option} {data} --dev_out {dev} --test_out {test}"

    commands = {"GENERATE": f"{program} --max_new_tokens 5 --prompt é"} | {
        option.upper(): named(option) for option in ("prompt", "finetune")
    }

    def run(line):
        for name, command in commands.items():
            line = line.replace(f"${name}", command)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=120)

    return run


def written(folder, names):
    return [(folder / name).read_text(encoding="utf-8").count("\n") for name in names]


@pytest.mark.parametrize("ending", ["2>err | head -c 1", "2>err >/dev/full", "2>err >&-", "2>&-", "2>/dev/full"])
def test_predictions_are_written_whatever_becomes_of_the_display(shell, tmp_path, ending):
    result = shell(f"$FINETUNE {ending}; echo ${{PIPESTATUS[0]}}")
    assert result.stdout.endswith("0\n") and written(tmp_path, outputs("finetune")) == [13, 13], result
    if "head" in ending or "full" in ending and "err" in ending:
        assert "warning: the standard output failed" in (tmp_path / "err").read_text()


@pytest.mark.parametrize("ending", ["2>&1 | head -c 1", ">/dev/full 2>&1", ">&- 2>&-"])
def test_the_two_generated_texts_are_whole_whatever_becomes_of_the_display(shell, tmp_path, ending):
    result = shell(f"$GENERATE {ending}; echo ${{PIPESTATUS[0]}}")
    texts = [f"generated-sentence-temp-{temperature}.txt" for temperature in (0, 1)]
    assert result.stdout.endswith("0\n") and min(written(tmp_path, texts)) >= 1, result


def test_where_the_text_on_stdout_is_all_a_reader_that_left_ends_it_and_a_full_disk_is_one_line(shell, tmp_path):
    result = shell("$GENERATE --temperature 0 --max_new_tokens 300 2>err | head -c 1; echo ${PIPESTATUS[0]}")
    assert result.stdout.endswith("141\n") and "Traceback" not in (tmp_path / "err").read_text()
    result = shell("$GENERATE --temperature 0 >/dev/full")
    assert result.returncode == 2
    assert result.stderr.endswith(
        "error: the standard output failed (No space left on device); send it to a file with room: > text.txt\n"
    )
    result = shell("$GENERATE --temperature 0 >&-")
    assert result.returncode == 2 and "the standard output, where the text goes, is closed" in result.stderr


def test_a_closed_stream_is_not_given_to_a_file_that_is_opened(shell, tmp_path):
    """What C code prints to descriptor 1 or 2 would land in it."""
    code = "import os; from display import safe_display\nwith safe_display(): print(open('file', 'w').fileno() > 2)"
    result = shell(f'cd "{tmp_path}" && PYTHONPATH="{ROOT}" "{sys.executable}" -c "{code}" 2>&-')
    assert result.stdout == "True\n"
