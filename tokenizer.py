"""The tokenizer: text to token ids and back. Each kind of file is read in minillama/formats/tokenizers.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from config import shown
from minillama.formats.tokenizers import find_tokenizer_file, open_tokenizer

HERE = Path(__file__).resolve().parent

LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
LLAMA3_TURN = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def default_tokenizer_path() -> Path:
    """The tokenizer.model in the working directory, else the project's folder, else data/. Raises FileNotFoundError."""
    for folder in (Path(), HERE, HERE / "data"):
        if (folder / "tokenizer.model").is_file():
            return folder / "tokenizer.model"
    raise FileNotFoundError(
        f"no tokenizer.model in the working directory, {HERE} or {HERE / 'data'}; "
        "`python fetch_data.py tokenizer` brings it"
    )


class Tokenizer:
    """A tokenizer of any kind, with a Llama's ids for beginning, end and padding.

    max_len: keep at most this many tokens of a text, cut before bos and eos are added. tokenizer_model: its file, or
    the file's folder (default: `default_tokenizer_path`). The path may also come first: `Tokenizer("tokenizer.model")`.
    Raises FileNotFoundError or ValueError if the file is missing, damaged or not a tokenizer.

    Attributes: `path` of the file, `kind` (see minillama/formats/tokenizers.py), `n_words` (vocabulary size),
    `special_ids` (special tokens by name), `stop_ids` (ids that end a text, eos first), `adds_bos` (whether its
    files put bos before a text), `unused_ids` (model ids without a piece, never generated; see `fit_to_model`).
    """

    def __init__(
        self,
        max_len: int | str | PathLike[str] | None = None,
        tokenizer_model: str | PathLike[str] | int | None = None,
    ) -> None:
        if isinstance(max_len, str | PathLike):  # the course has max_len first, and most people name the file first
            max_len, tokenizer_model = tokenizer_model, max_len
        if max_len is not None and (not isinstance(max_len, int) or max_len < 1):
            raise ValueError(f"max_len is {max_len}; it must be 1 or more, or None for no limit")
        if isinstance(tokenizer_model, int):
            raise ValueError(f"tokenizer_model is {tokenizer_model}; it must be the path of a tokenizer's file")
        path = Path(tokenizer_model) if tokenizer_model is not None else default_tokenizer_path()
        self.max_len = max_len
        self.path = find_tokenizer_file(path)
        self.model = open_tokenizer(self.path)
        self.kind = self.model.kind
        self.n_words = self.model.n_words
        self.bos_id = self.model.bos_id
        self.eos_id = self.model.eos_id
        # No id is reserved for padding, so the NUL byte's is used. Only a mask marks padding, not the id.
        self.pad_id = self.model.pad_id
        self.special_ids = self.model.special_ids
        ends = (self.special_ids[name] for name in ("<|end_of_text|>", "<|eot_id|>") if name in self.special_ids)
        # bos ends a text too, because it begins another. eos is first: it fills rows that ended early.
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *ends, self.bos_id)))
        self.adds_bos = self.model.adds_bos
        self.unused_ids: tuple[int, ...] = ()

    @property
    def sp_model(self) -> Any:
        """The package's own tokenizer: a SentencePieceProcessor for SentencePiece."""
        return self.model.processor

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of a text; special tokens in it are plain text. Raises TypeError or ValueError if it is not UTF-8."""
        ids = self.model.encode(_utf8(s))[: self.max_len]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to continue; bos comes first if the tokenizer adds it, or if the text is empty."""
        ids = self.encode(text, bos=False, eos=False)
        return [self.bos_id] * (self.adds_bos or not ids) + ids

    def bytes_of_first(self, text: str) -> int:
        """The number of bytes that a text's first token covers."""
        return self.model.bytes_of_first(_utf8(text))

    def fit_to_model(self, vocab_size: int, stop_ids: Iterable[int] = ()) -> None:
        """Adapts to a model of `vocab_size` ids and adds `stop_ids`. Raises ValueError if text may have other ids."""
        more = [i for i in range(vocab_size, self.n_words) if i not in self.model.holes]
        if max(self.bos_id, self.eos_id) >= vocab_size or not self.model.keep_out_of_text(more):
            raise ValueError(f"{self.path} gives ids that a model with a vocabulary of {vocab_size} does not have")
        self.special_ids = {name: i for name, i in self.special_ids.items() if i < vocab_size}
        self.stop_ids = tuple(i for i in dict.fromkeys((*self.stop_ids, *stop_ids)) if i < vocab_size)
        without = {i for i in self.model.holes if i < vocab_size} | set(range(self.n_words, vocab_size))
        self.unused_ids = tuple(sorted(without - set(self.stop_ids)))

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, not cut, without bos and eos, computed on all cores. Raises as `encode` does."""
        return self.model.encode_many([_utf8(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens; invalid UTF-8 becomes U+FFFD. Raises ValueError for other ids."""
        ids = [int(i) for i in ids]
        ids = [i for i in ids if i < self.n_words or i not in self.stop_ids]  # a stop id may have no piece
        if outside := [i for i in ids if not 0 <= i < self.n_words]:
            raise ValueError(f"{self.path} has ids from 0 to {self.n_words - 1}, not {outside[0]}")
        return self.model.decode(ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation up to the assistant's next reply, with all special tokens, never cut.

        messages: {"role": "system", "user" or "assistant", "content": a text}. A system message may come first. Then
        user and assistant take turns, user first and last. A vocabulary with Llama 3's special tokens has its format,
        another SentencePiece model Llama 2's. Raises ValueError for other messages and other tokenizers.
        """
        llama3 = all(name in self.special_ids for name in LLAMA3_TURN)
        if not llama3 and self.kind != "sentencepiece":
            raise ValueError(f"{self.path} ({self.kind}) has no chat format; Llama 2's and Llama 3's tokenizers do")
        turns = _turns(messages)
        return self._llama3_chat(turns) if llama3 else self._llama2_chat(turns)

    def _llama2_chat(self, turns: list[tuple[str, str]]) -> list[int]:
        for role, content in turns:
            if tags := [tag for tag in LLAMA2_TAGS if tag in content]:
                raise ValueError(f"the {role} says {tags[0]}, which marks turns in Llama 2's format; remove it")
        if turns[0][0] == "system":
            (_, system), (_, first), *rest = turns
            turns = [("user", f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}"), *rest]
        *earlier, last = [content.strip() for _, content in turns]
        ids = []
        for question, answer in zip(earlier[::2], earlier[1::2], strict=True):
            text = self.model.encode(_utf8(f"[INST] {question} [/INST] {answer} "))
            ids += [self.bos_id, *text, self.eos_id]
        return [*ids, self.bos_id, *self.model.encode(_utf8(f"[INST] {last} [/INST]"))]

    def _llama3_chat(self, turns: list[tuple[str, str]]) -> list[int]:
        start, end, end_of_turn = (self.special_ids[name] for name in LLAMA3_TURN)
        ids = [self.bos_id]
        for role, content in turns:
            text = self.model.encode(_utf8(content.strip()))
            ids += [start, *self.model.encode(role), end, *self.model.encode("\n\n"), *text, end_of_turn]
        return [*ids, start, *self.model.encode("assistant"), end, *self.model.encode("\n\n")]


def _utf8(text: str) -> str:
    """The text, unchanged. Raises TypeError or ValueError if it is not UTF-8 text."""
    if not isinstance(text, str):
        raise TypeError(f"encode takes a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(f"{around!r} is not UTF-8 text; save or type it as UTF-8") from error
    return text


def _turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Role and content of each message. Raises ValueError unless the conversation ends with a user's message."""
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f"a message is {shown(message)}; it must be {{'role': 'user', 'content': 'a text'}}")
        turns.append((str(message.get("role")), message["content"]))
    roles = [role for role, _ in turns]
    count = len(roles) - (roles[:1] == ["system"])
    if count % 2 == 0 or roles[-count:] != [("user", "assistant")[n % 2] for n in range(count)]:
        wanted = "a system message may come first, then user and assistant take turns, user first and last"
        raise ValueError(f"the roles are {', '.join(roles) or 'none'}; {wanted}")
    for role, content in turns:
        if not content.strip():
            raise ValueError(f"a message of the {role} is empty; leave it out or say something")
    return turns
