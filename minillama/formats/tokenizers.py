"""The kinds of tokenizers (Llama 2's, Llama 3's, GPT-2's, Hugging Face's), detected from the content of their files.

  kind           content of the file                                      package
  sentencepiece  a SentencePiece proto: Llama 2's, llama2.c's, our own    sentencepiece
  llama3         lines `base64 rank`: tokenizer.model of Llama 3          tiktoken
  gpt2           JSON of token to id, or merges: GPT-2's pair of files    tiktoken
  huggingface    a tokenizer.json                                         tokenizers

Sources of the formats: github.com/meta-llama/llama and llama3 (llama/tokenizer.py, llama/generation.py: split pattern,
special tokens, chat), Llama 3.1's tokenizer_config.json (names of the special tokens), github.com/openai/gpt-2
(src/encoder.py: split pattern, letters for bytes).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from config import shown
from minillama.environment import optional_package
from minillama.formats.files import read_json

GPT2_PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt", "gpt2_encoder.json": "gpt2_vocab.bpe"}
IN_FOLDER = ("tokenizer.model", "tokenizer.json", *GPT2_PAIRS)  # the first of these is used
SMALLEST_TOKENIZER = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
LARGEST = 1 << 27  # bytes: four times the largest published tokenizer
LLAMA3_PATTERN = "|".join(
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*")
    + (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
)
LLAMA3_RANKS = 128_000  # followed by 256 special tokens
LLAMA3_SPECIAL = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
    *(f"reserved_special_token_{n}" for n in range(3, 248)),
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_END = "<|endoftext|>"
# GPT-2 writes a byte as a letter: a printable byte as itself, others as letters from U+0100 on. The order is by id.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = tuple(byte for byte in range(0x100) if byte not in PRINTABLE)
BYTE_LETTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(OTHERS)}
LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}
# bos and eos of a tokenizer.json, if no file beside it names them.
KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", GPT2_END)
KNOWN_EOS = ("</s>", "<|end_of_text|>", "<eos>", GPT2_END)

# tiktoken's regex overflows its stack in longer runs of spaces, or of other characters. Meta's program cuts them too.
LONGEST_RUN = 25_000


# Each class has kind, n_words, bos_id, eos_id, pad_id, special_ids, adds_bos, and holes (ids without a piece).


class SentencePieceModel:
    """A tokenizer from a SentencePiece proto."""

    kind = "sentencepiece"

    def __init__(self, path: Path, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if not content:
                raise RuntimeError("no content")
            self.processor = SentencePieceProcessor(model_proto=content)
            self.processor.id_to_piece(list(range(self.processor.vocab_size())))  # each is UTF-8
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a tokenizer; --tokenizer takes one such as data/tokenizer.model"
            ) from error
        self.n_words: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        self.pad_id: int = self.processor.piece_to_id("<0x00>")  # the unknown piece, if bytes have no pieces
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path} has no pieces for beginning and end (bos, eos); train it with both")
        self.holes: frozenset[int] = frozenset()
        self.adds_bos = _files_add_bos(path, self.bos_id)
        special = (self.processor.unk_id(), self.bos_id, self.eos_id)
        self.special_ids: dict[str, int] = {self.processor.id_to_piece(i): i for i in special}

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=-1)

    def keep_out_of_text(self, ids: Sequence[int]) -> bool:
        return all(self.processor.is_control(i) or self.processor.is_unused(i) for i in ids)

    def bytes_of_first(self, text: str) -> int:
        first = self.processor.encode(text)[:1]
        return 1 if self.processor.is_byte(first) == [True] else len(self.processor.decode(first).encode())

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)


class BytePairModel:
    """Byte pair encoding by rank with tiktoken: Llama 3's and GPT-2's. The first special token is bos.

    pattern: a regex for the pieces of text that are merged separately. ranks: token to id; lower ids are merged first.
    """

    def __init__(self, path: Path, kind: str, pattern: str, ranks: dict[bytes, int], special: Sequence[str], eos: str):
        self.kind = kind
        self.pattern = pattern
        self.ranks = ranks
        self.special_ids = {name: len(ranks) + n for n, name in enumerate(special)}
        with optional_package("tiktoken", f"{path} ({kind}) needs another package"):
            import tiktoken

            self.processor = tiktoken.Encoding(
                kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
            )
            self.processor.encode_ordinary("a")  # fails here if the package is broken
        self.n_words = len(ranks) + len(special)
        self.bos_id = len(ranks)
        self.eos_id = self.special_ids[eos]
        self.holes: frozenset[int] = frozenset()
        self.adds_bos = True
        self.pad_id = ranks[b"\0"]

    def encode(self, text: str) -> list[int]:
        cuts = [0, len(text)]
        if len(text) > LONGEST_RUN:
            runs = re.finditer(r"\s+|\S+", text)
            cuts[1:1] = [cut for run in runs for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)]
        pieces = (text[start:end] for start, end in zip(cuts, cuts[1:], strict=False))
        return [i for piece in pieces for i in self.processor.encode_ordinary(piece)]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self.encode, texts))

    def keep_out_of_text(self, ids: Sequence[int]) -> bool:
        return all(i >= len(self.ranks) for i in ids)

    def bytes_of_first(self, text: str) -> int:
        return sum(len(self.processor.decode_single_token_bytes(i)) for i in self.encode(text)[:1])

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if i < len(self.ranks)], errors="replace")


class HuggingFaceModel:
    """A tokenizer.json, read by tokenizers. The files beside it name bos and eos; else the usual names are tried."""

    kind = "huggingface"

    def __init__(self, path: Path, content: str) -> None:
        purpose = f"{path} needs another package"
        with optional_package("tokenizers", purpose):
            import tokenizers

            read = tokenizers.Tokenizer.from_str
            read(SMALLEST_TOKENIZER)  # fails here if the package is broken
        try:
            self.processor = read(content)
        except BaseException as error:  # plain Exceptions, and Rust panics, which are only BaseExceptions
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{path} is not a tokenizer.json that can be read: {str(error)[:200]!r}") from error
        with optional_package("tokenizers", purpose, passes=(ValueError,)):
            self._find_marks(path, content)

    def _find_marks(self, path: Path, content: str) -> None:
        """Sets bos, eos and sizes from the tokenizer. Raises ValueError if no eos is named."""
        self.processor.no_truncation()
        self.processor.no_padding()
        added = {token.content: i for i, token in self.processor.get_added_tokens_decoder().items()}
        named = _named_marks(path)
        bos = _first_id(self.processor, named.get("bos_token"), [name for name in KNOWN_BOS if name in added])
        eos = _first_id(self.processor, named.get("eos_token"), [name for name in KNOWN_EOS if name in added])
        if eos is None:
            raise ValueError(f"{path} names no eos; put a tokenizer_config.json with bos_token and eos_token beside it")
        self.eos_id = eos
        self.bos_id = eos if bos is None else bos
        # Only tokens marked as special are kept out of ordinary text, and out of decoded text.
        self.processor.add_special_tokens([self.processor.id_to_token(i) for i in (self.bos_id, self.eos_id)])
        self.processor.encode_special_tokens = True
        decoder = self.processor.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in decoder.items() if token.special}
        used = self.processor.get_vocab().values()
        self.n_words = 1 + max(used)
        self.holes = frozenset(range(self.n_words)) - frozenset(used)
        # As in transformers, the post-processor decides and not tokenizer_config.json.
        marks = self.processor.encode("").ids
        self.adds_bos = marks[:1] == [self.bos_id]
        if marks == [self.bos_id] == [self.eos_id]:  # bos and eos are equal: is it before a text or after it?
            self.adds_bos = _puts_first(json.loads(content).get("post_processor"), self.bos_id)
        pad = _first_id(self.processor, "<0x00>", [BYTE_LETTERS[0]])
        self.pad_id: int = self.eos_id if pad is None else pad

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        try:
            return [done.ids for done in self.processor.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:  # the library's plain Exception for an unknown word without an unknown token
            raise ValueError(f"the tokenizer has no ids for a text: {str(error)[:200]!r}") from error

    def keep_out_of_text(self, ids: Sequence[int]) -> bool:
        added = self.processor.get_added_tokens_decoder()
        if not all(i in added for i in ids):
            return False
        self.processor.add_special_tokens([added[i].content for i in ids])  # encode does not find them in text
        return True

    def bytes_of_first(self, text: str) -> int:
        found = self.processor.encode(text, add_special_tokens=False)
        if not found.ids:
            return 0
        (_, end), following = found.offsets[0], found.offsets[1:2]
        if not following or following[0][0] >= end:
            return len(text[:end].encode())
        # Part of a character (a byte piece or letters for bytes), or a space that the tokenizer adds at the start.
        piece, alone = found.tokens[0], self.decode(found.ids[:1])
        return len(alone.encode()) if "\ufffd" not in alone else 1 if piece.startswith("<0x") else len(piece)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)


def _first_id(processor: Any, named: str | None, known: Sequence[str]) -> int | None:
    """The id of the first name in the vocabulary: `named`, then `known`; None without one."""
    ids = (processor.token_to_id(name) for name in (named, *known) if name is not None)
    return next((i for i in ids if i is not None), None)


def _named_marks(path: Path) -> dict[str, str]:
    """bos_token and eos_token in the files beside a tokenizer.json."""
    marks: dict[str, str] = {}
    for beside in (path.with_name("tokenizer_config.json"), path.with_name("special_tokens_map.json")):
        content = read_json(beside) if beside.is_file() else {}
        for mark in ("bos_token", "eos_token"):
            token = content.get(mark)
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str):
                marks.setdefault(mark, name)
    return marks


def _files_add_bos(path: Path, bos_id: int) -> bool:
    """Whether Hugging Face's files beside a tokenizer.model add bos to a text; True without such files."""
    fast, slow = path.with_name("tokenizer.json"), path.with_name("tokenizer_config.json")
    if path.name != "tokenizer.model":
        return True
    if fast.is_file():  # takes precedence, as in transformers
        return _puts_first(read_json(fast).get("post_processor"), bos_id)
    return not slow.is_file() or read_json(slow).get("add_bos_token") is not False


def _puts_first(processor: Any, bos_id: int) -> bool:
    """Whether the post-processor of a tokenizer.json puts the token with this id before a text."""
    if not isinstance(processor, dict):
        return False
    parts = [part for part in processor.get("processors", []) if isinstance(part, dict)]
    names = [piece.get("SpecialToken", {}).get("id") for piece in processor.get("single", [])[:1]]
    tokens = processor.get("special_tokens") or {}
    first = [tokens[name].get("ids", []) for name in names if isinstance(tokens.get(name), dict)]
    if [bos_id] in first or bos_id in processor.get("cls", [])[1:]:
        return True
    return any(_puts_first(part, bos_id) for part in parts)


def find_tokenizer_file(path: Path) -> Path:
    """The tokenizer's file: `path`, or a file in that folder. Raises FileNotFoundError or ValueError without one."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such tokenizer; `python fetch_data.py tokenizer` brings the course's")
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} is a folder without a tokenizer: no {', '.join(IN_FOLDER)}")
        return found[0]
    if not path.is_file():
        raise ValueError(f"{path} is not a file; --tokenizer takes a tokenizer such as data/tokenizer.model")
    return path


def open_tokenizer(path: Path) -> SentencePieceModel | BytePairModel | HuggingFaceModel:
    """The tokenizer in a file, its kind detected from the content. Raises ValueError for anything else."""
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, more than any tokenizer ({LARGEST:,}); is it a checkpoint?")
    content = path.read_bytes()
    if content.startswith(b"#version"):
        return _gpt2_model(path, _merged_ranks(path))
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content):
        return _llama3_model(path, content)
    if not re.match(rb"\s*\{", content):
        return SentencePieceModel(path, content)
    if isinstance(read_json(path).get("model"), dict):
        return HuggingFaceModel(path, content.decode("utf-8"))
    return _gpt2_model(path, _encoder_ranks(path))


def _llama3_model(path: Path, content: bytes) -> BytePairModel:
    pairs = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            pairs.append((base64.b64decode(token, validate=True), int(rank)))
        except ValueError as error:
            what = f"line {number} is {shown(line)}, not `base64 rank`"
            raise ValueError(f"{path} is damaged: {what}; fetch or copy it again") from error
    if len(pairs) != LLAMA3_RANKS:
        raise ValueError(f"{path} has {len(pairs):,} ranks instead of {LLAMA3_RANKS:,}; fetch or copy it again")
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    return BytePairModel(path, "llama3", LLAMA3_PATTERN, _checked_ranks(path, pairs), special, eos=special[1])


def _gpt2_model(path: Path, ranks: dict[bytes, int]) -> BytePairModel:
    """The tokenizer of GPT-2's two files. One is enough; if both exist, they must agree."""
    for encoder, merges in GPT2_PAIRS.items():
        one, other = path.with_name(encoder), path.with_name(merges)
        both = path.name in (encoder, merges) and one.is_file() and other.is_file()
        if both and _encoder_ranks(one) != _merged_ranks(other):
            raise ValueError(f"{one} and {other} belong to two tokenizers, or one is cut short; fetch both again")
    return BytePairModel(path, "gpt2", GPT2_PATTERN, ranks, [GPT2_END], eos=GPT2_END)


def _encoder_ranks(path: Path) -> dict[bytes, int]:
    """The ranks in GPT-2's JSON of token to id. Raises ValueError for other JSON."""
    tokens = read_json(path)
    ordinary = {token: i for token, i in tokens.items() if token != GPT2_END}
    sound = {type(i) for i in ordinary.values()} == {int} and set("".join(ordinary)) <= LETTER_BYTES.keys()
    if not sound or tokens.get(GPT2_END) != len(ordinary):
        raise ValueError(f"{path} is JSON, but neither a tokenizer.json nor GPT-2's encoder.json")
    pairs = [(bytes(LETTER_BYTES[letter] for letter in token), i) for token, i in ordinary.items()]
    return _checked_ranks(path, pairs)


def _merged_ranks(path: Path) -> dict[bytes, int]:
    """The ranks in GPT-2's merges: first the bytes, then for each line the token formed from its two parts."""
    tokens = dict.fromkeys(LETTER_BYTES)  # keeps order
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n")[1:], start=2):
        if not line:
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(part in tokens for part in parts) or "".join(parts) in tokens:
            what = f"line {number} is {shown(line)}, which does not form a new token from two"
            raise ValueError(f"{path} is damaged: {what}; fetch it again")
        tokens["".join(parts)] = None
    return {bytes(LETTER_BYTES[letter] for letter in token): rank for rank, token in enumerate(tokens)}


def _checked_ranks(path: Path, pairs: list[tuple[bytes, int]]) -> dict[bytes, int]:
    """Ranks by token. Raises ValueError unless every byte has a rank, and ranks are 0, 1, ..., each once."""
    ranks = dict(pairs)
    lacks = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if len(ranks) != len(pairs) or sorted(ranks.values()) != list(range(len(ranks))) or lacks:
        raise ValueError(f"{path} is damaged: a token or rank occurs twice or is missing; fetch or copy it again")
    return ranks
