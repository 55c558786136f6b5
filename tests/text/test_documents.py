"""Documents in text files and folders: none is lost or cut in the wrong place. Tokenizers trained from them."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from minillama.text.corpus import Text
from minillama.text.documents import (
    DOCUMENT_END,
    open_tokens,
    read_documents,
    read_pieces,
    text_files,
    tokenize_text,
    train_tokenizer,
)
from models import some_stories, written
from tokenizer import Tokenizer

# Documents


@pytest.mark.parametrize(
    "content, wanted",
    [
        ("a\nb\n", ["a\nb"]),
        ("a\n<|endoftext|>\nb\n", ["a", "b"]),
        ("a<|endoftext|>b<|endoftext|>c", ["a", "b", "c"]),
        ("a\nb <|endoftext|> c\nd\n", ["a\nb ", " c\nd"]),
        ("a\n<|endoftext|>\n", ["a"]),
        ("a\n<|endoftext|>", ["a"]),
        ("<|endoftext|>\n\n<|endoftext|>a\n<|endoftext|> \t\n<|endoftext|>b", ["a", "b"]),
        ("\n\na\n\nb\n\n\n", ["a\n\nb"]),
        ("  a\n\tb  ", ["  a\n\tb  "]),
        ("a\r\nb\r\n<|endoftext|>\r\nc\r\n", ["a\nb", "c"]),
        (b"\xef\xbb\xbfa\n<|endoftext|>\nb", ["a", "b"]),
        ("a <|endoftext| > b", ["a <|endoftext| > b"]),
        ("z\u00f6\u2028w\x85l\x0cf <|endoftext|>\U0001f600", ["z\u00f6\u2028w\x85l\x0cf ", "\U0001f600"]),
        ("", []),
        (" \n\n", []),
    ],
)
def test_documents_end_at_the_mark_and_at_the_files_end(tmp_path, content, wanted):
    assert list(read_documents(written(tmp_path / "a.txt", content))) == wanted


@pytest.mark.parametrize("content", [b"good\n\xe4\n", b"cut short \xe2\x82", b"\xff\xfea\0"])
def test_a_text_that_is_not_utf8_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 \(.*\); save it as UTF-8"):
        list(read_documents(written(tmp_path / "a.txt", content)))


def test_a_very_long_document_is_read_in_pieces_cut_at_the_end_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("minillama.text.documents.LONGEST_PIECE", 100)
    lines = [f"line {i} of a long book" for i in range(50)]
    path = written(tmp_path / "a.txt", "\n\n" + "\n".join(lines) + f"\n\n{DOCUMENT_END}\nshort")
    pieces = list(read_pieces(path))
    assert len(pieces) > 5 and max(len(piece) for piece, _ in pieces) < 130
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 2) + [True, True]
    assert list(read_documents(path)) == ["\n".join(lines), "short"]


def test_a_long_document_is_one_document_of_tokens(tmp_path, tokenizer, monkeypatch):
    long, short = "\n".join(f"line {i} of a long book" for i in range(50)), "a short one"
    whole = tokenized(tmp_path, tokenizer, [long, short], "whole.txt")
    monkeypatch.setattr("minillama.text.documents.LONGEST_PIECE", 100)
    parted = tokenized(tmp_path, tokenizer, [long, short], "parted.txt")
    for tokens in (whole, parted):
        assert tokens.text_bytes.tolist() == [len(long), len(short)]
        for first, last in itertools.pairwise(tokens.starts.tolist()):
            ids = tokens.ids[first:last].tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert tokenizer.bos_id not in ids[1:] and tokenizer.eos_id not in ids[:-1]
    text = Text("t", [parted], 8, held_out=1)
    assert text.held_out_bytes == len(short) and text.held_out_tokens == int(np.diff(parted.starts)[-1])


@pytest.mark.parametrize("gap", range(60, 105))
def test_a_file_without_line_ends_is_cut_yet_parted_at_every_mark(tmp_path, monkeypatch, gap):
    """Wherever the mark stands, also across the place where the reading pauses."""
    monkeypatch.setattr("minillama.text.documents.LONGEST_PIECE", 100)
    for more in (250, 400 - gap - len(DOCUMENT_END)):  # the latter ends where a reading ends
        path = written(tmp_path / "a.txt", "a" * gap + DOCUMENT_END + "b" * more)
        assert max(len(piece) for piece, _ in read_pieces(path)) < 200
        assert list(read_documents(path)) == ["a" * gap, "b" * more]


def test_a_folder_is_its_text_files_in_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b.txt", "c.md"):
        written(tmp_path / "texts" / name, "x")
    written(tmp_path / "texts" / "empty.txt", "")
    (tmp_path / "texts" / "folder.txt").mkdir()
    found = [path.relative_to(tmp_path / "texts").as_posix() for path in text_files(tmp_path / "texts")]
    assert found == ["a/b.txt", "a/z.txt", "b.txt"]
    assert text_files(tmp_path / "texts" / "c.md") == [tmp_path / "texts" / "c.md"]
    written(tmp_path / "none" / "a.md", "x")
    with pytest.raises(ValueError, match=r"none is a folder without a \.txt file"):
        text_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="gone: no such text"):
        text_files(tmp_path / "gone")


def test_a_folder_gives_nothing_twice_that_is_there_as_text_and_as_tokens(tmp_path, tokenizer):
    folder = tmp_path / "texts"
    text = written(folder / "a.txt", "one story")
    done = tokenize_text(text, tokenizer, folder)
    assert text_files(folder) == [text]
    text.unlink()
    assert text_files(folder) == [done]


def test_tokens_are_not_read_as_text(tmp_path, tokenizer):
    done = tokenize_text(written(tmp_path / "a.txt", "one story"), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="holds tokens, not text"):
        list(read_documents(done))


# Tokenizers


def test_a_tokenizer_has_llamas_marks_and_gives_every_text_back(tokenizer):
    sp = tokenizer.sp_model
    assert [sp.id_to_piece(i) for i in (0, 1, 2, 3)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.n_words == 320
    for text in (
        "the \U0001f600 fox",
        "zw\u00f6lf\n\n\tlines ",
        "  two  spaces",
        "1234",
        "映画\r\x00",
        "\ufb01ve \u2460",
    ):
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
    assert len(tokenizer.encode("the gentle horse", bos=False, eos=False)) < 8


def test_the_same_seed_makes_the_same_tokenizer(tmp_path, small_tokenizer):
    text = small_tokenizer.parent / "text.txt"
    for name in ("a", "b"):
        train_tokenizer([str(text)], 320, str(tmp_path / name), seed=1337)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == small_tokenizer.read_bytes()


def test_a_tokenizer_learns_from_long_lines_too(tmp_path, tokenizer):
    text = written(tmp_path / "a.txt", " ".join(some_stories(300, words=12)))
    assert b"\n" not in text.read_bytes() and text.stat().st_size > 16384
    train_tokenizer([str(text)], 320, str(tmp_path / "a.model"), seed=0)
    made = Tokenizer(tokenizer_model=tmp_path / "a.model")
    assert len(made.encode("the gentle horse", bos=False, eos=False)) < 8


def test_no_piece_has_two_digits(tmp_path):
    text = written(tmp_path / "a.txt", "in 1984 and 2024 we counted 10000 foxes\n" * 50)
    train_tokenizer([str(text)], 300, str(tmp_path / "a.model"), seed=0)
    ids = Tokenizer(tokenizer_model=tmp_path / "a.model").encode("1984 10000", bos=False, eos=False)
    assert len(ids) >= 9


@pytest.mark.parametrize(
    "content, vocab_size, message",
    [
        ("a b c", 100_000, "cannot make a tokenizer of 100000 pieces .*another --vocab_size .*, or more text"),
        ("a b c", 10, "cannot make a tokenizer of 10 pieces .*a.txt"),
        (" \n", 300, "cannot make a tokenizer of 300 pieces .*a.txt.*more text"),
        (b"\xff", 300, r"a\.txt is not UTF-8"),
        (None, 300, "a.txt: no such text"),
    ],
)
def test_no_tokenizer_of_too_little_text(tmp_path, content, vocab_size, message):
    if content is not None:
        written(tmp_path / "a.txt", content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        train_tokenizer([str(tmp_path / "a.txt")], vocab_size, str(tmp_path / "a.model"), seed=0)
    assert "\n" not in str(raised.value) and not list(tmp_path.glob("*.model*"))


# Tokens in a file


def tokenized(tmp_path, tokenizer, documents, name="a.txt"):
    text = written(tmp_path / name, f"\n{DOCUMENT_END}\n".join(documents))
    return open_tokens(tokenize_text(text, tokenizer, tmp_path / "tokens"), tokenizer)


# Folders as people have them


def names_of(folder, tell=lambda line: None):
    return [str(file.relative_to(folder)) for file in text_files(folder, tell)]


def test_what_begins_with_a_dot_is_left_out_of_a_folder_in_one_line(tmp_path):
    folder = tmp_path / ".corpus"  # the one that is named may begin with one
    for name in (
        "b.txt",
        "._b.txt",
        ".ipynb_checkpoints/b-checkpoint.txt",
        "sub/.hidden/c.txt",
        "sub/.d.TXT",
        "sub/e.txt",
    ):
        written(folder / name, "text")
    written(folder / ".DS_Store", "x")
    told = []
    assert names_of(folder, told.append) == ["b.txt", "sub/e.txt"]
    assert len(told) == 1 and "._b.txt (its name begins with a dot)" in told[0] and told[0].endswith("and 1 more")
    assert text_files(folder / "._b.txt") == [folder / "._b.txt"]  # what is named is read
    for name in ("b.txt", "sub/e.txt"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"without a .txt file \(left out of .*its name begins with a dot"):
        text_files(folder)


def test_an_ending_may_be_in_capitals(tmp_path):
    for name in ("a.TXT", "b.Txt", "c.text", "TXT"):
        written(tmp_path / name, "text")
    told = []
    assert names_of(tmp_path, told.append) == ["a.TXT", "b.Txt"] and told == []


def test_links_are_followed_and_each_file_counts_once(tmp_path):
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    written(folder / "a.txt", "text")
    written(folder / "sub" / "b.txt", "text")
    written(elsewhere / "c.txt", "text")
    (elsewhere / "back").symlink_to(folder)  # a loop
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "self").symlink_to(folder)
    (folder / "z.txt").symlink_to(folder / "a.txt")
    (folder / "nothing.txt").symlink_to(folder / "none.txt")
    (folder / "sub" / "up").symlink_to(tmp_path)  # all that lies around the folder
    os.link(folder / "a.txt", folder / "y.txt")
    told = []
    files = text_files(folder, told.append)
    assert sorted(file.name for file in files) == ["a.txt", "b.txt", "c.txt"]
    above, nothing = (
        f"{os.path.join('sub', 'up')} (a link to a folder above)",
        "nothing.txt (not a file, or a broken link)",
    )
    assert told == [f"notice: left out of {folder}: {nothing}, {above}"]
