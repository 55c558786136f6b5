"""--option generate: pieces of text as they are shown, and streams that cannot show them."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT
from minillama.decoding.decoders import overlap, text_pieces

RUN_LLAMA = ROOT / "run_llama.py"


@pytest.fixture
def command(generate_command):
    return generate_command


# Pieces of text


class Letters:
    """Each token a byte of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def pieces(text, stops=(), prompt="say: "):
    return list(text_pieces(Letters(), list(prompt.encode()), iter(text.encode()), stops))


@pytest.mark.parametrize("text", ["", "abc", "naïve — 日本 🙂 end", "🙂"])
def test_pieces_make_the_text_and_no_piece_is_half_a_character(text):
    found = pieces(text)
    assert "".join(found) == "say: " + text and not any("\ufffd" in piece for piece in found)


def test_pieces_come_as_soon_as_they_can():
    assert pieces("abc") == ["say: ", "a", "b", "c", ""]


def test_what_may_become_a_stop_is_held_back_and_what_did_not_is_shown():
    assert pieces("an END", ["END", "say"]) == ["say: ", "a", "n", " ", ""]
    assert "".join(pieces("an EN. ENE", ["END"])) == "say: an EN. ENE"
    assert "".join(pieces("EENDx", ["END"])) == "say: E"
    assert "".join(pieces("x\nyEND", ["\n", "END"])) == "say: x"
    assert "".join(pieces("abcd", ["cd", "bcd", "d"])) == "say: a"  # all come with the same token; the first one counts


@pytest.mark.parametrize("text, stop, wanted", [("abc", "cd", 1), ("abab", "abc", 2), ("abc", "x", 0), ("", "x", 0)])
def test_overlap_counts_the_beginning_of_a_stop_at_the_end_of_a_text(text, stop, wanted):
    assert overlap(text, stop) == wanted


# Streams and files


class Stdout(io.TextIOWrapper):
    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize(
    "encoding, shown", [("ascii", "caf\\xe9 \\u2014"), ("latin-1", "café \\u2014"), ("utf-8", "café —")]
)
def test_what_stdout_cannot_say_is_escaped_and_the_files_are_written(command, monkeypatch, encoding, shown):
    def printed(*more):
        monkeypatch.setattr("sys.stdout", Stdout(encoding))
        code, _, err = command("--prompt", "café —", "--max_new_tokens", "4", *more)
        assert code == 0, err
        return sys.stdout.text()

    assert printed("--explain").startswith(shown)
    assert printed().count(shown) == 2
    for name in ("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"):
        assert (command.folder / name).read_text(encoding="utf-8").startswith("café —")
    said = printed("--json")
    assert json.loads(said)["prompt"] == "café —" and ("café" in said) == (encoding == "utf-8")


def test_the_page_is_written_before_the_table_is_printed(command, monkeypatch):
    def table(explanation):
        assert (command.folder / "page.html").exists()
        raise OSError("stdout is full")

    monkeypatch.setattr("minillama.decoding.explanation.Explanation.table", table)
    code, _, err = command("--prompt", "one day", "--max_new_tokens", "4", "--explain", "--xray", "page.html")
    assert code == 2 and "stdout is full" in err


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
@pytest.mark.parametrize(
    "more, redirected, message",
    [
        (["--interactive"], " <&-", "--interactive reads the standard input, which is closed"),
        (["--prompt_file", "-"], " <&-", "--prompt_file - reads the standard input, which is closed"),
        (["--temperature", "0"], " >&-", "the standard output, which takes the text, is closed; write it to a file"),
    ],
)
def test_a_closed_stream_is_one_line(command, more, redirected, message):
    before = command.files()
    arguments = ["--pretrained-model-path", "model.pt", "--tokenizer", "tokenizer.model", *more]
    line = shlex.join([sys.executable, str(RUN_LLAMA), "--option", "generate", *arguments]) + redirected
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, command.files()) == (2, "", before)
    assert [message in line for line in done.stderr.splitlines()] == [True]


def test_what_is_typed_is_utf8_whatever_the_locale(command, monkeypatch):
    for encoding in ("ascii", "latin-1", "utf-8"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("café\n".encode()), encoding=encoding))
        code, out, err = command("--interactive", "--temperature", "0", "--max_new_tokens", "4")
        assert code == 0 and out.startswith("café") and "UTF-8" not in err


def test_a_missing_file_of_prompts_is_told_before_a_model_is_read(command):
    (command.folder / "model.pt").unlink()
    code, _, err = command("--prompt_file", "none.txt")
    assert code == 2 and "none.txt: no such file of prompts" in err


def test_no_prompt_is_too_long_before_one_is_typed(command, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = command("--interactive", "--max_new_tokens", "3000")
    assert code == 0 and "warning" not in err
