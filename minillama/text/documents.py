"""Documents for pretraining: reads text files, tokenizes them into memory-mapped files, and trains a tokenizer.

A text is a UTF-8 file, or a folder of `.txt` files. A document ends at `<|endoftext|>` or at the end of a file. Each
file is tokenized once into its own file of tokens, a sequence of `<s> document </s>`:

    bytes 0 to 4095     magic, and a JSON header: dtype, counts, checksums of the text and of the tokenizer
    tokens              uint16, or uint32 for vocabularies above 65,536
    documents           the start of each (uint64, one more for the end), and its length in bytes of text (uint64)

At most a few megabytes of a text are in memory at a time.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minillama.environment import file_sha256
from minillama.formats.files import atomic_file
from minillama.formats.names import without_ending
from tokenizer import Tokenizer

DOCUMENT_END = "<|endoftext|>"
LONGEST_PIECE = 1 << 20  # characters; a longer document is read in pieces, cut at the end of a line
LONGEST_LINE = 1 << 12  # characters; for training a tokenizer, longer lines are cut
AT_ONCE = 1 << 22  # characters that are tokenized together
MAGIC = b"mini-llama tokens 2\n"
HEADER_SIZE = 4096
TEXT_ENDING = ".txt"
TOKENS_ENDING = ".tokens"


def text_files(path: str | PathLike[str], tell: Callable[[str], None] = lambda line: None) -> list[Path]:
    """The file itself, or the sorted text files in a folder and its subfolders; if there are none, its token files.

    Empty files and names that begin with a dot are left out. Links are followed, and each file counts once. tell: a
    function that prints a line about files left out. Raises FileNotFoundError or ValueError if there is no text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such text; give a {TEXT_ENDING} file, or a folder of them")
    if not path.is_dir():
        return [path]
    files, left_out = _walk(path)
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    omitted = f"left out of {path}: {', '.join(left_out[:3])}{more}"
    for ending in (TEXT_ENDING, TOKENS_ENDING):
        known: dict[tuple[int, int], Path] = {}  # by device and inode: symbolic and hard links are one file
        for file in sorted(file for file in files if file.suffix.lower() == ending):
            status = file.stat()
            if status.st_size:
                known.setdefault((status.st_dev, status.st_ino), file)
        if known:
            if left_out:
                tell(f"notice: {omitted}")
            return list(known.values())
    reason = f" ({omitted})" if left_out else ""
    raise ValueError(f"{path} is a folder without a {TEXT_ENDING} file{reason}; give text files, or folders of them")


def _walk(path: Path) -> tuple[list[Path], list[str]]:
    """The text and token files below a folder, and the names left out, each with the reason."""
    files: list[Path] = []
    left_out: list[str] = []
    seen = set()  # real paths: two links may lead to one folder
    top = os.path.realpath(path)

    def unreadable(error: OSError) -> None:
        left_out.append(f"{os.path.relpath(error.filename, path)} ({error.strerror})")

    for name, folders, names in os.walk(path, followlinks=True, onerror=unreadable):
        real = os.path.realpath(name)
        above = real != top and os.path.join(top, "").startswith(os.path.join(real, ""))
        if above:
            left_out.append(f"{os.path.relpath(name, path)} (a link to a folder above)")
        if above or real in seen:
            folders.clear()
            continue
        seen.add(real)
        folder = Path(name)
        for one in sorted([*folders, *names]):
            file = folder / one
            is_text = file.suffix.lower() in (TEXT_ENDING, TOKENS_ENDING)
            if one.startswith(".") and (is_text or one in folders):
                left_out.append(f"{file.relative_to(path)} (its name begins with a dot)")
            elif is_text and file.is_file():
                files.append(file)
            elif is_text and one in names:
                left_out.append(f"{file.relative_to(path)} (not a file, or a broken link)")
        folders[:] = sorted(one for one in folders if not one.startswith("."))
    return files, left_out


def read_documents(path: str | PathLike[str]) -> Iterator[str]:
    """The documents of one file, except blank ones. Raises ValueError if the file is not UTF-8 or has tokens."""
    parts: list[str] = []
    for piece, ends in read_pieces(path):
        parts.append(piece)
        if ends:
            yield "".join(parts)
            parts = []


def read_pieces(path: str | PathLike[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of one file, (text, whether it ends a document); only a long document has several pieces."""
    if is_tokens(Path(path)):
        raise ValueError(f"{path} holds tokens, not text; give the text they were made from")
    parts: list[str] = []
    length = 0
    begun = False  # whether a piece of this document was yielded
    behind = ""  # the end of an unfinished line, which may be the start of DOCUMENT_END
    try:
        with open(path, encoding="utf-8-sig") as file:
            while line := file.readline(LONGEST_PIECE):
                *ended, rest = (behind + line).split(DOCUMENT_END)
                behind = ""
                for piece in ended:
                    yield from _piece([*parts, piece], begun, ends=True)
                    parts, length, begun = [], 0, False
                if len(line) == LONGEST_PIECE and not line.endswith("\n"):
                    rest, behind = rest[: 1 - len(DOCUMENT_END)], rest[1 - len(DOCUMENT_END) :]
                parts.append(rest)
                length += len(rest)
                if length >= LONGEST_PIECE:
                    text = "".join(parts)
                    kept = text.rstrip("\n")  # line ends go to the next piece: the document may end after them
                    for found in _piece([kept], begun, ends=False):
                        yield found
                        begun = True
                    parts, length = [text[len(kept) :]], 0
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8 text") from error
    yield from _piece([*parts, behind], begun, ends=True)


def _piece(parts: list[str], begun: bool, ends: bool) -> list[tuple[str, bool]]:
    """The piece made of `parts`, in a list, without empty lines at the document's ends; [] if blank and not needed."""
    text = "".join(parts)
    text = text if begun else text.lstrip("\n")
    text = text.rstrip("\n") if ends else text
    return [(text, ends)] if text.strip() or (begun and ends) else []


def train_tokenizer(
    paths: Sequence[str], vocab_size: int, model_path: str, seed: int, tell: Callable[[str], None] = lambda line: None
) -> None:
    """Trains a SentencePiece BPE like Llama 2's on at most a million lines, and writes it.

    Raises ValueError if the text does not suffice.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed % (1 << 32))
    lines = (
        line[start : start + LONGEST_LINE]
        for path in paths
        for file in text_files(path, tell)
        for piece, _ in read_pieces(file)
        for line in piece.split("\n")
        if line.strip()
        for start in range(0, len(line), LONGEST_LINE)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LONGEST_LINE,  # bytes
            input_sentence_size=1_000_000,
            shuffle_input_sentence=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).strip().rpartition("] ")[2].partition(". Increase")[0].rstrip(".")
        raise ValueError(
            f"cannot make a tokenizer of {vocab_size} pieces from {', '.join(paths)}: {reason}; give another "
            "--vocab_size (at least 260 and one for each letter), or more text"
        ) from error
    with atomic_file(model_path, "wb") as file:
        file.write(model.getvalue())


@dataclass(frozen=True)
class Tokens:
    """The tokens of one file, memory-mapped: document d is ids[starts[d] : starts[d + 1]], of text_bytes[d] bytes."""

    path: Path
    ids: np.ndarray
    starts: np.ndarray
    text_bytes: np.ndarray
    checksum: str  # of text and tokenizer


def tokenize_text(path: Path, tokenizer: Tokenizer, folder: Path, scratch: Path | None = None) -> Path:
    """Writes the tokens of a text into `folder`, unless they exist and are up to date; returns their file. scratch: a
    folder to write into instead.
    """
    if is_tokens(path):
        return path
    text_crc = _file_crc(path)
    tokenizer_sha256 = file_sha256(tokenizer.path)
    origin = f"{path.resolve()}\n{tokenizer_sha256}"  # two texts may have one name, and one text two tokenizers
    target = folder / f"{without_ending(path.name)}-{zlib.crc32(origin.encode()):08x}{TOKENS_ENDING}"
    if target.exists() and read_header(target)["text_crc32"] == text_crc:
        return target
    folder = scratch or folder
    target = folder / target.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--tokens_dir {folder} cannot be created: {error.strerror}; give another folder") from error
    dtype = np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")
    starts, text_bytes = array("Q", [0]), array("Q")
    settings: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}
    bar = tqdm(total=path.stat().st_size, desc=f"tokenizing {path.name}", **settings)
    with atomic_file(target, "wb") as file, bar:
        file.write(bytes(HEADER_SIZE))
        count = size = 0  # tokens so far; bytes of this document so far
        for pieces in _groups(read_pieces(path)):
            for (piece, ends), ids in zip(pieces, tokenizer.encode_many([piece for piece, _ in pieces]), strict=True):
                marked = [tokenizer.bos_id] * (count == starts[-1]) + ids + [tokenizer.eos_id] * ends
                file.write(np.array(marked, dtype).tobytes())
                count += len(marked)
                size += len(piece.encode())
                bar.update(len(piece.encode()))
                if ends:
                    starts.append(count)
                    text_bytes.append(size)
                    size = 0
        if not text_bytes:
            raise ValueError(f"{path} has no text; give another file")
        file.write(bytes(-dtype.itemsize * starts[-1] % 8))  # aligns the rest to 8 bytes
        file.write(np.array(starts, "<u8").tobytes() + np.array(text_bytes, "<u8").tobytes())
        header = {
            "dtype": dtype.str,
            "tokens": starts[-1],
            "documents": len(text_bytes),
            "vocab_size": tokenizer.n_words,
            "tokenizer_sha256": tokenizer_sha256,
            "text": path.name,
            "text_crc32": text_crc,
        }
        file.seek(0)
        file.write(MAGIC + json.dumps(header).encode())
    return target


def _groups(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """The pieces in lists of about `AT_ONCE` characters."""
    group: list[tuple[str, bool]] = []
    length = 0
    for piece in pieces:
        group.append(piece)
        length += len(piece[0])
        if length >= AT_ONCE:
            yield group
            group, length = [], 0
    if group:
        yield group


def _file_crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def is_tokens(path: Path) -> bool:
    """Whether a file holds tokens instead of text."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file of tokens. Raises ValueError if the file is damaged or cut short."""
    with path.open("rb") as file:
        head = file.read(HEADER_SIZE)
    try:
        header = json.loads(head.removeprefix(MAGIC).rstrip(b"\0"))
        size = np.dtype(header["dtype"]).itemsize * header["tokens"]
        whole = path.stat().st_size == HEADER_SIZE + size + -size % 8 + 8 * (2 * header["documents"] + 1)
        if not whole or not head.startswith(MAGIC):
            raise ValueError("another size or format")
        if missing := {"vocab_size", "tokenizer_sha256", "text_crc32"} - header.keys():
            raise KeyError(missing)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or cut short; remove it, and it is created again from its text") from error
    return header


def open_tokens(path: Path, tokenizer: Tokenizer) -> Tokens:
    """Memory-maps a file of tokens. Raises ValueError if it is damaged or made with another tokenizer."""
    header = read_header(path)
    if header["tokenizer_sha256"] != file_sha256(tokenizer.path):
        raise ValueError(
            f"{path} was made with another tokenizer ({header['vocab_size']} pieces) than {tokenizer.path} "
            f"({tokenizer.n_words}); give that --tokenizer, or another --tokens_dir"
        )
    dtype, tokens, documents = np.dtype(header["dtype"]), header["tokens"], header["documents"]
    ids = np.memmap(path, dtype, "r", HEADER_SIZE, (tokens,))
    behind = HEADER_SIZE + dtype.itemsize * tokens
    behind += -behind % 8
    starts = np.memmap(path, "<u8", "r", behind, (documents + 1,))
    text_bytes = np.memmap(path, "<u8", "r", behind + 8 * (documents + 1), (documents,))
    return Tokens(path, ids, starts, text_bytes, f"{header['text_crc32']:08x}-{header['tokenizer_sha256']}")
