"""Text to token ids and back: the tokenizers of Llama 2, Llama 3, GPT-2 and Hugging Face, told apart by what they hold.

  kind           the file holds                                           read through
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

# What is looked for in a folder, first to last, and GPT-2's two files under the names they go by.
GPT2_PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt", "gpt2_encoder.json": "gpt2_vocab.bpe"}
IN_FOLDER = ("tokenizer.model", "tokenizer.json", *GPT2_PAIRS)
SMALLEST_TOKENIZER = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'
LARGEST = 1 << 27  # bytes; the largest published tokenizers have a quarter of that
LLAMA3_PATTERN = "|".join(
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*")
    + (r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
)
LLAMA3_RANKS = 128_000  # and behind them 256 special tokens
LLAMA3_SPECIAL = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
    *(f"reserved_special_token_{n}" for n in range(3, 248)),
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_END = "<|endoftext|>"
# GPT-2 writes a byte as a letter: as itself where that can be seen, else as one from U+0100 on. In order of their ids.
SEEN_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
UNSEEN_BYTES = tuple(byte for byte in range(0x100) if byte not in SEEN_BYTES)
BYTE_LETTERS = {byte: chr(byte) for byte in SEEN_BYTES} | {byte: chr(0x100 + n) for n, byte in enumerate(UNSEEN_BYTES)}
LETTER_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}
# The marks that a tokenizer.json is taken to have where nothing beside it names them.
KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", GPT2_END)
KNOWN_EOS = ("</s>", "<|end_of_text|>", "<eos>", GPT2_END)

# tiktoken's regex overflows its stack within a longer run of white, or of other, characters. Meta cuts there, too.
LONGEST_RUN = 25_000


# The kinds: each has kind, n_words, special_ids, the ids of the marks and those without a piece (holes), encodes UTF-8
# text, decodes ids that it has, and keeps ids out of text where it can.


class SentencePieceModel:
    """A SentencePiece proto, through SentencePiece."""

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
                f"{path} is no SentencePiece model, nor another tokenizer that is known here; "
                "--tokenizer takes one such as tokenizer.model"
            ) from error
        self.n_words: int = self.processor.vocab_size()
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()
        self.pad_id: int = self.processor.piece_to_id("<0x00>")  # where no bytes are among the pieces: the unknown one
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
    """Byte pairs by rank, special tokens behind them, through tiktoken: Llama 3's and GPT-2's.

    pattern: splits a text into what pairs are looked for in. ranks: the id of each token, the lower the sooner it is
    made of two others.
    """

    def __init__(
        self, path: Path, kind: str, pattern: str, ranks: dict[bytes, int], special: Sequence[str], eos: str
    ) -> None:
        self.kind = kind
        self.pattern = pattern
        self.ranks = ranks
        self.special_ids = {name: len(ranks) + n for n, name in enumerate(special)}
        with optional_package("tiktoken", f"{path} ({kind}) is read through another package"):
            import tiktoken

            self.processor = tiktoken.Encoding(
                kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special_ids
            )
            self.processor.encode_ordinary("a")  # shows whether it works
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
    """A tokenizer.json, through tokenizers; bos and eos as the files beside it name them, else by their usual names."""

    kind = "huggingface"

    def __init__(self, path: Path, content: str) -> None:
        purpose = f"{path} is read through another package"
        with optional_package("tokenizers", purpose):
            import tokenizers

            read = tokenizers.Tokenizer.from_str
        try:
            self.processor = read(content)
        except BaseException as error:  # the library raises bare Exceptions, or panics, which is not even one
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            with optional_package("tokenizers", purpose):
                read(SMALLEST_TOKENIZER)  # the fault may be the package's
            raise ValueError(f"{path} is no tokenizer.json that can be read: {str(error)[:200]!r}") from error
        with optional_package("tokenizers", purpose, passes=(ValueError,)):
            self._find_marks(path, content)

    def _find_marks(self, path: Path, content: str) -> None:
        """Takes the marks and sizes from the tokenizer. Raises ValueError if no end of a text is named."""
        self.processor.no_truncation()
        self.processor.no_padding()
        added = {token.content: i for i, token in self.processor.get_added_tokens_decoder().items()}
        named = _named_marks(path)
        bos = _first_id(self.processor, named.get("bos_token"), [name for name in KNOWN_BOS if name in added])
        eos = _first_id(self.processor, named.get("eos_token"), [name for name in KNOWN_EOS if name in added])
        if eos is None:
            raise ValueError(
                f"{path} names no end of a text; put a tokenizer_config.json with bos_token and eos_token beside it"
            )
        self.eos_id = eos
        self.bos_id = eos if bos is None else bos
        # Only what is marked as special is kept out of ordinary text, and out of what is decoded.
        self.processor.add_special_tokens([self.processor.id_to_token(i) for i in (self.bos_id, self.eos_id)])
        self.processor.encode_special_tokens = True
        decoder = self.processor.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in decoder.items() if token.special}
        used = self.processor.get_vocab().values()
        self.n_words = 1 + max(used)
        self.holes = frozenset(range(self.n_words)) - frozenset(used)
        # As transformers has it: the post-processor counts, whatever tokenizer_config.json says.
        marks = self.processor.encode("").ids
        both = self.bos_id == self.eos_id and len(marks) == 1  # one mark, which may stand before a text or behind it
        self.adds_bos = marks[:1] == [self.bos_id]
        if self.adds_bos and both:
            post_processor = json.loads(content).get("post_processor")
            self.adds_bos = _puts_first(post_processor, self.bos_id)
        pad = _first_id(self.processor, "<0x00>", [BYTE_LETTERS[0]])
        self.pad_id: int = self.eos_id if pad is None else pad

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        try:
            return [done.ids for done in self.processor.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:  # bare, such as for a word that is unknown where no token stands for these
            raise ValueError(f"the tokenizer has no ids for a text: {str(error)[:200]!r}") from error

    def keep_out_of_text(self, ids: Sequence[int]) -> bool:
        added = self.processor.get_added_tokens_decoder()
        if not all(i in added for i in ids):
            return False
        self.processor.add_special_tokens([added[i].content for i in ids])  # these are not looked for in text
        return True

    def bytes_of_first(self, text: str) -> int:
        found = self.processor.encode(text, add_special_tokens=False)
        if not found.ids:
            return 0
        (_, end), following = found.offsets[0], found.offsets[1:2]
        if not following or following[0][0] >= end:
            return len(text[:end].encode())
        # A part of a character, a byte or a letter for each; or a space that the tokenizer itself puts first.
        piece, alone = found.tokens[0], self.decode(found.ids[:1])
        return len(alone.encode()) if "\ufffd" not in alone else 1 if piece.startswith("<0x") else len(piece)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids, skip_special_tokens=True)


def _first_id(processor: Any, named: str | None, known: Sequence[str]) -> int | None:
    """The id of the first of the names that the vocabulary has."""
    ids = (processor.token_to_id(name) for name in (named, *known) if name is not None)
    return next((i for i in ids if i is not None), None)


def _named_marks(path: Path) -> dict[str, str]:
    """bos_token and eos_token as the files beside a tokenizer.json name them."""
    marks: dict[str, str] = {}
    for beside in (path.with_name("tokenizer_config.json"), path.with_name("special_tokens_map.json")):
        content = _json_object(beside, _read(beside)) if beside.is_file() else {}
        for mark in ("bos_token", "eos_token"):
            token = content.get(mark)
            name = token.get("content") if isinstance(token, dict) else token
            if isinstance(name, str):
                marks.setdefault(mark, name)
    return marks


def _files_add_bos(path: Path, bos_id: int) -> bool:
    """Whether the files of Hugging Face beside a SentencePiece model have bos put before a text; True without any."""
    fast, slow = path.with_name("tokenizer.json"), path.with_name("tokenizer_config.json")
    if path.name != "tokenizer.model":
        return True
    if fast.is_file():  # then the other is not asked, as in transformers
        return _puts_first(_json_object(fast, _read(fast)).get("post_processor"), bos_id)
    return not slow.is_file() or _json_object(slow, _read(slow)).get("add_bos_token") is not False


def _puts_first(processor: Any, bos_id: int) -> bool:
    """Whether the post-processor of a tokenizer.json puts bos before a text; by its id, whatever it is called there."""
    if not isinstance(processor, dict):
        return False
    parts = [part for part in processor.get("processors", []) if isinstance(part, dict)]
    names = [piece.get("SpecialToken", {}).get("id") for piece in processor.get("single", [])[:1]]
    tokens = processor.get("special_tokens") or {}
    first = [tokens[name].get("ids", []) for name in names if isinstance(tokens.get(name), dict)]
    if [bos_id] in first or bos_id in processor.get("cls", [])[1:]:
        return True
    return any(_puts_first(part, bos_id) for part in parts)


# Files


def _tokenizer_file(path: Path) -> Path:
    """The file meant by a path. Raises FileNotFoundError or ValueError if there is none."""
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


def _open_model(path: Path) -> SentencePieceModel | BytePairModel | HuggingFaceModel:
    """The tokenizer in a file, of the kind that its content tells. Raises ValueError if it is damaged or none."""
    content = _read(path)
    if content.startswith(b"#version"):
        return _gpt2_model(path, _merged_ranks(path, content))
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", content):
        return _llama3_model(path, content)
    if not re.match(rb"\s*\{", content):
        return SentencePieceModel(path, content)
    tokens = _json_object(path, content)
    if isinstance(tokens.get("model"), dict):
        return HuggingFaceModel(path, content.decode("utf-8"))
    return _gpt2_model(path, _encoder_ranks(path, tokens))


def _read(path: Path) -> bytes:
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes, no tokenizer more than {LARGEST:,}; is it a checkpoint?")
    return path.read_bytes()


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it holds no whole JSON; fetch or copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {shown(found)}; it must be a JSON object")
    return found


def _llama3_model(path: Path, content: bytes) -> BytePairModel:
    pairs = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            pairs.append((base64.b64decode(token, validate=True), int(rank)))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: line {number} is {shown(line)}, not `base64 rank`; fetch or copy it again"
            ) from error
    if len(pairs) != LLAMA3_RANKS:
        raise ValueError(f"{path} has {len(pairs):,} ranks, but Llama 3's {LLAMA3_RANKS:,}; fetch or copy it again")
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    return BytePairModel(path, "llama3", LLAMA3_PATTERN, _whole(path, pairs), special, eos=special[1])


def _gpt2_model(path: Path, ranks: dict[bytes, int]) -> BytePairModel:
    """GPT-2's files say the same twice: one is enough, and two have to agree."""
    for encoder, merges in GPT2_PAIRS.items():
        one, other = path.with_name(encoder), path.with_name(merges)
        if path.name == merges and one.is_file():
            agree = _encoder_ranks(one, _json_object(one, _read(one))) == ranks
        elif path.name == encoder and other.is_file():
            agree = _merged_ranks(other, _read(other)) == ranks
        else:
            continue
        if not agree:
            raise ValueError(f"{one} and {other} are not of one tokenizer, or one is cut short; fetch both again")
    return BytePairModel(path, "gpt2", GPT2_PATTERN, ranks, [GPT2_END], eos=GPT2_END)


def _encoder_ranks(path: Path, tokens: dict[str, Any]) -> dict[bytes, int]:
    """The ranks that JSON of token to id gives. Raises ValueError unless it is laid out as GPT-2's."""
    ordinary = {token: i for token, i in tokens.items() if token != GPT2_END}
    sound = {type(i) for i in ordinary.values()} == {int} and set("".join(ordinary)) <= LETTER_BYTES.keys()
    if not sound or tokens.get(GPT2_END) != len(ordinary):
        raise ValueError(
            f"{path} is JSON, but no tokenizer.json and no encoder.json of GPT-2, which ends in {GPT2_END}"
        )
    return _whole(path, [(bytes(LETTER_BYTES[letter] for letter in token), i) for token, i in ordinary.items()])


def _merged_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """The ranks that GPT-2's merges give: first the bytes, then line by line what two tokens make."""
    tokens = dict.fromkeys(LETTER_BYTES)  # keeps order
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n")[1:], start=2):
        parts = line.rstrip("\r").split(" ")
        if parts == [""]:
            continue
        if len(parts) != 2 or not all(part in tokens for part in parts) or "".join(parts) in tokens:
            raise ValueError(
                f"{path} is damaged: line {number} is {shown(line)}, which makes no new token of two; fetch it again"
            )
        tokens["".join(parts)] = None
    return {bytes(LETTER_BYTES[letter] for letter in token): rank for rank, token in enumerate(tokens)}


def _whole(path: Path, pairs: list[tuple[bytes, int]]) -> dict[bytes, int]:
    """Token to rank. Raises ValueError unless every byte has a rank, and every rank from 0 on just one token."""
    ranks = dict(pairs)
    lacks = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if len(ranks) != len(pairs) or sorted(ranks.values()) != list(range(len(ranks))) or lacks:
        raise ValueError(f"{path} is damaged: a token or a rank is there twice, or missing; fetch or copy it again")
    return ranks
