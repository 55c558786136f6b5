"""Standard input as a source of prompts, and typed lines with and without a home folder."""

from __future__ import annotations

import argparse
import io
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import ROOT, break_package
from minillama.cli import console


def prompts_from(monkeypatch, file, name="-"):
    """The prompts of a standard input that is an open binary file, in a locale of ASCII."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(file, encoding="ascii"))
        return console.read_prompts(argparse.Namespace(prompt="", prompt_file=name))


@pytest.mark.parametrize("name", console.STDIN)
@pytest.mark.parametrize("blocking", [True, False])
def test_prompts_may_come_through_a_socket_that_takes_its_time(monkeypatch, name, blocking):
    ours, theirs = socket.socketpair()
    theirs.setblocking(blocking)

    def send():
        ours.sendall("\ufeffcafé\n".encode())
        time.sleep(0.2)
        ours.sendall(b"\nhe was\n")
        ours.close()

    with theirs:
        sender = threading.Thread(target=send)
        sender.start()
        assert prompts_from(monkeypatch, open(theirs.detach(), "rb"), name) == ["café", "he was"]
        sender.join()


@pytest.mark.parametrize("name", console.STDIN)
def test_a_file_that_is_partly_read_goes_on_from_where_it_stands(tmp_path, monkeypatch, name):
    (tmp_path / "a.txt").write_bytes(b"first\nsecond\r\nthird\r")
    descriptor = os.open(tmp_path / "a.txt", os.O_RDONLY)
    os.read(descriptor, 6)
    assert prompts_from(monkeypatch, open(descriptor, "rb"), name) == ["second", "third"]


def test_prompts_may_be_piped_in(monkeypatch):
    read, write = os.pipe()
    os.write(write, "zwölf\r\n映画\n".encode())
    os.close(write)
    assert prompts_from(monkeypatch, open(read, "rb")) == ["zwölf", "映画"]


@pytest.mark.slow
def test_the_program_reads_prompts_from_a_socket_as_its_standard_input(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall("Once upon a time\nDas Café\n".encode())
        ours.shutdown(socket.SHUT_WR)
        options = ["--prompt_file", "-", "--max_new_tokens", "2", "--temperature", "0"]
        command = [sys.executable, str(ROOT / "run_llama.py"), *options]
        done = subprocess.run(
            command, stdin=theirs, capture_output=True, cwd=tmp_path, env=os.environ | {"LC_ALL": "C"}, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"Once upon a time") and b"Das Caf" in done.stdout


@pytest.mark.parametrize(
    "content, why", [(b"", "the standard input is empty"), (b"a\n\xff\n", "input, line 2: not UTF")]
)
def test_an_input_without_text_is_refused(content, why, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    with pytest.raises(ValueError, match=why):
        console.read_stdin("file of prompts")


def test_an_input_that_is_only_written_to_is_refused(tmp_path, monkeypatch):
    with (tmp_path / "a.txt").open("w") as file:
        monkeypatch.setattr(sys, "stdin", file)
        with pytest.raises(ValueError, match="the standard input cannot be read"):
            console.read_stdin("file of prompts")


def test_a_stream_without_bytes_is_read_and_a_closed_one_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    assert console.read_stdin("file of prompts") == "one\ntwo"
    monkeypatch.setattr(sys, "stdin", None)
    for name in console.STDIN:
        with pytest.raises(ValueError, match=f"--prompt_file {name} reads the standard input, which is closed"):
            console.check_stdin(argparse.Namespace(interactive=False, prompt_file=name))


# What is typed


def type_lines(monkeypatch, *lines):
    """Lines typed on a terminal, as typed_lines yields them."""
    typed = iter(lines)

    def ask(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: True))
    return list(console.typed_lines())


def test_without_a_home_what_is_typed_is_not_kept_and_one_line_says_so(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert type_lines(monkeypatch, "a", "b") == ["a", "b"]
    assert capsys.readouterr().err == (
        "notice: typed lines are not saved for the next session: Could not determine home directory.\n"
    )


def test_a_home_that_is_not_there_gets_one_line(monkeypatch, capsys, tmp_path):
    pytest.importorskip("readline")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "none")
    assert type_lines(monkeypatch, "a") == ["a"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the history cannot be saved")


def test_a_broken_readline_gets_one_line(monkeypatch, capsys):
    break_package(monkeypatch, "readline", ImportError("libreadline.so.8: cannot open"))
    assert type_lines(monkeypatch, "a") == ["a"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "readline is broken here (ImportError: libreadline.so.8" in line


def test_a_user_without_home_and_name_can_import_the_program():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pwd
def unknown(uid): raise KeyError(f"getpwuid(): uid not found: {{uid}}")
pwd.getpwuid = unknown
import run_llama
from minillama.commands import classify, convert, generate, pretrain, report, sft, wise_ft
from pathlib import Path
try: Path.home()
except RuntimeError: print("no home")
"""
    named = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")
    environment = {name: value for name, value in os.environ.items() if name not in named}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (0, "no home\n"), done.stderr
