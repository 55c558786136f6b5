"""Files of tokens: they hold the documents that were tokenized, and damaged files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT
from minillama.text.documents import (
    DOCUMENT_END,
    HEADER_SIZE,
    MAGIC,
    open_tokens,
    read_header,
    tokenize_text,
)
from models import some_stories, written
from tokenizer import Tokenizer


def tokenized(tmp_path, tokenizer, documents, name="a.txt"):
    text = written(tmp_path / name, f"\n{DOCUMENT_END}\n".join(documents))
    return open_tokens(tokenize_text(text, tokenizer, tmp_path / "tokens"), tokenizer)


@pytest.mark.parametrize("documents", [some_stories(7), ["x"], ["x", "zw\u00f6lf \U0001f600\n\n1.", " y "]])
def test_tokens_on_the_disk_are_the_documents(tmp_path, tokenizer, documents):
    tokens = tokenized(tmp_path, tokenizer, documents)
    assert len(tokens.starts) == len(documents) + 1 and tokens.starts[0] == 0 and tokens.starts[-1] == len(tokens.ids)
    for d, document in enumerate(documents):
        ids = tokens.ids[tokens.starts[d] : tokens.starts[d + 1]].tolist()
        assert ids == tokenizer.encode(document, bos=True, eos=True)
        assert tokenizer.decode(ids[1:-1]) == document
        assert tokens.text_bytes[d] == len(document.encode())
    assert isinstance(tokens.ids, np.memmap)


def test_tokens_are_the_same_however_the_text_is_grouped(tmp_path, tokenizer, monkeypatch):
    whole = tokenized(tmp_path, tokenizer, some_stories(9), "a.txt")
    monkeypatch.setattr("minillama.text.documents.AT_ONCE", 300)
    parted = tokenized(tmp_path, tokenizer, some_stories(9), "b.txt")
    assert whole.path != parted.path
    assert np.array_equal(whole.ids, parted.ids) and np.array_equal(whole.starts, parted.starts)


def test_the_header_describes_the_tokens_and_the_index_is_aligned(tmp_path, tokenizer):
    odd = set()
    for i in range(1, 9):
        tokens = tokenized(tmp_path, tokenizer, ["1" * i, "x"], f"{i}.txt")
        raw = tokens.path.read_bytes()
        header = json.loads(raw[len(MAGIC) : HEADER_SIZE].rstrip(b"\0"))
        assert raw.startswith(MAGIC) and header == read_header(tokens.path)
        assert (header["dtype"], header["tokens"], header["documents"]) == ("<u2", len(tokens.ids), 2)
        assert (header["vocab_size"], header["text"]) == (320, f"{i}.txt")
        behind = len(raw) - 8 * (2 + 3)
        assert behind % 8 == 0 and np.frombuffer(raw[behind:], "<u8").tolist() == [
            *tokens.starts.tolist(),
            *tokens.text_bytes.tolist(),
        ]
        odd.add(len(tokens.ids) % 4)
    assert odd == {0, 1, 2, 3}


@pytest.mark.parametrize("vocabulary, dtype", [(65536, "<u2"), (65537, "<u4")])
def test_a_large_vocabulary_takes_wider_numbers(tmp_path, tokenizer, monkeypatch, vocabulary, dtype):
    monkeypatch.setattr(tokenizer, "n_words", vocabulary)
    highest = vocabulary - 1
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts: [[highest, 5] for _ in texts])
    tokens = tokenized(tmp_path, tokenizer, ["x", "y"])
    assert tokens.ids.dtype == np.dtype(dtype) and tokens.ids.tolist() == [1, highest, 5, 2] * 2
    assert tokens.starts.tolist() == [0, 4, 8] and tokens.text_bytes.tolist() == [1, 1]


def test_a_text_is_tokenized_once_and_anew_when_it_has_changed(tmp_path, tokenizer, monkeypatch):
    first = tokenized(tmp_path, tokenizer, ["one fox", "two"])
    calls = []
    encode_many = tokenizer.encode_many
    monkeypatch.setattr(tokenizer, "encode_many", lambda texts: calls.append(1) or encode_many(texts))
    assert np.array_equal(tokenized(tmp_path, tokenizer, ["one fox", "two"]).ids, first.ids) and not calls
    again = tokenized(tmp_path, tokenizer, ["one owl", "two"])  # as many bytes as before
    assert calls and again.path == first.path and tokenizer.decode(again.ids.tolist()).startswith("one owl")


def test_tokens_of_another_tokenizer_are_refused(tmp_path, tokenizer, asset):
    other = Tokenizer(tokenizer_model=asset("stories260K/tok512.model"))
    tokens = tokenized(tmp_path, tokenizer, ["one fox"])
    message = r"made with another tokenizer \(320 pieces\) than .*tok512.model \(512\); give that --tokenizer, or"
    with pytest.raises(ValueError, match=message):
        open_tokens(tokens.path, other)
    copy = written(tmp_path / "copy.model", tokenizer.path.read_bytes())
    open_tokens(tokens.path, Tokenizer(tokenizer_model=copy))  # the same vocabulary under another name


def test_two_tokenizers_keep_their_tokens_of_a_text_side_by_side(tmp_path, tokenizer, asset):
    other = Tokenizer(tokenizer_model=asset("stories260K/tok512.model"))
    mine = tokenized(tmp_path, tokenizer, ["one fox"])
    theirs = tokenize_text(tmp_path / "a.txt", other, tmp_path / "tokens")
    assert theirs != mine.path and open_tokens(theirs, other).ids.tolist() == other.encode("one fox", True, True)
    assert tokenize_text(tmp_path / "a.txt", tokenizer, tmp_path / "tokens") == mine.path


def header_with(**changes):
    def change(raw):
        header = json.loads(raw[len(MAGIC) : HEADER_SIZE].rstrip(b"\0")) | changes
        header = {name: value for name, value in header.items() if value is not None}
        return (MAGIC + json.dumps(header).encode()).ljust(HEADER_SIZE, b"\0") + raw[HEADER_SIZE:]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[: HEADER_SIZE + 3],
        lambda raw: raw[:2000],
        lambda raw: raw[: len(MAGIC)],
        lambda raw: raw + bytes(8),
        lambda raw: raw[:30] + b"\xff" + raw[31:],
        lambda raw: b"x" + raw[1:],
        lambda raw: b"",
        header_with(tokens=10**15),
        header_with(tokens="5"),
        header_with(documents=None),
        header_with(dtype="<f99"),
        header_with(tokenizer_sha256=None),
        header_with(text_crc32=None),
        header_with(vocab_size=None),
    ],
)
def test_damaged_tokens_are_refused(tmp_path, tokenizer, damage):
    path = tokenized(tmp_path, tokenizer, ["one fox", "two"]).path
    path.write_bytes(damage(path.read_bytes()))
    for read in (read_header, lambda p: open_tokens(p, tokenizer)):
        with pytest.raises(ValueError, match=r"a-\w+\.tokens is damaged or cut short; remove it, and it is created"):
            read(path)
    with pytest.raises(ValueError, match="is damaged or cut short; remove it"):
        tokenize_text(tmp_path / "a.txt", tokenizer, tmp_path / "tokens")


def test_tokenizing_that_is_interrupted_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("minillama.text.documents.AT_ONCE", 100)
    groups, encode_many = [], tokenizer.encode_many

    def interrupted(texts):
        groups.append(len(list((tmp_path / "tokens").iterdir())))
        if len(groups) == 3:
            raise KeyboardInterrupt
        return encode_many(texts)

    monkeypatch.setattr(tokenizer, "encode_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenized(tmp_path, tokenizer, some_stories(9))
    assert groups == [1, 1, 1] and not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("content", ["", " \n\n", f"\n{DOCUMENT_END}\n"])
def test_an_empty_text_is_refused_and_leaves_nothing(tmp_path, tokenizer, content):
    text = written(tmp_path / "a.txt", content)
    with pytest.raises(ValueError, match=r"a\.txt has no text; give another file"):
        tokenize_text(text, tokenizer, tmp_path / "tokens")
    assert not list(tmp_path.rglob("*tokens*/*"))


def test_texts_named_alike_have_tokens_of_their_own(tmp_path, tokenizer):
    files = [tokenized(tmp_path, tokenizer, [word], f"{word}/a.txt") for word in ("one", "two")]
    again = [open_tokens(tokens.path, tokenizer) for tokens in files]
    assert [tokenizer.decode(tokens.ids.tolist()) for tokens in again] == ["one", "two"]


MEASURE = """
import resource, sys
from pathlib import Path
from minillama.text.documents import open_tokens, tokenize_text
from tokenizer import Tokenizer
text, tokenizer, folder = sys.argv[1:]
tokenizer = Tokenizer(tokenizer_model=tokenizer)
open_tokens(tokenize_text(Path(text), tokenizer, Path(folder)), tokenizer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures Linux's peak memory, in kilobytes")
@pytest.mark.parametrize("separator", [f"\n{DOCUMENT_END}\n", "\n", " "], ids=["documents", "lines", "one line"])
def test_ten_times_the_text_takes_no_more_memory(tmp_path, small_tokenizer, separator):
    part = separator.join(some_stories(4000, words=240)) + separator  # 6 MB or so
    peaks = []
    for times in (1, 10):
        text = tmp_path / f"{times}.txt"
        with text.open("w", encoding="utf-8") as file:
            for _ in range(times):
                file.write(part)
        command = [sys.executable, "-c", MEASURE, str(text), str(small_tokenizer), str(tmp_path / "tokens")]
        result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout))
    assert text.stat().st_size > 50e6 and peaks[1] < peaks[0] + 40_000  # kilobytes
