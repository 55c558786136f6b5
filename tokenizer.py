"""Text to token ids and back, through a SentencePiece model such as Llama 2's."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from sentencepiece import SentencePieceProcessor

HERE = Path(__file__).resolve().parent
DEFAULT_PATHS = (HERE / "tokenizer.model", HERE / "data" / "tokenizer.model")


def default_tokenizer_path() -> Path:
    """The first of `DEFAULT_PATHS` that exists. Raises FileNotFoundError if there is none."""
    for path in DEFAULT_PATHS:
        if path.is_file():
            return path
    raise FileNotFoundError("there is no data/tokenizer.model; `python fetch_data.py tokenizer` brings it")


class Tokenizer:
    """A SentencePiece model, with the ids that a Llama gives to beginning, end and padding.

    max_len: keep at most this many tokens of a text, cut before bos and eos are added. tokenizer_model: path of the
    model file, by default the course's.

    Raises FileNotFoundError or ValueError if the file is missing or no SentencePiece model.
    """

    def __init__(self, max_len: int | None = None, tokenizer_model: str | PathLike[str] | None = None) -> None:
        path = Path(tokenizer_model) if tokenizer_model is not None else default_tokenizer_path()
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such tokenizer; `python fetch_data.py tokenizer` brings the course's")
        if not path.is_file():
            raise ValueError(
                f"{path} is not a file; --tokenizer takes a SentencePiece model such as data/tokenizer.model"
            )
        if max_len is not None and max_len < 1:
            raise ValueError(f"max_len is {max_len}; it must be 1 or more, or None for no limit")
        self.path = path
        self.max_len = max_len
        try:
            self.sp_model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(
                f"{path} is no SentencePiece model; --tokenizer takes one such as tokenizer.model"
            ) from error
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        # No id is set aside for padding. This byte stands only in text that holds a NUL character; and what is
        # padding is told by a mask, never by the id.
        self.pad_id: int = self.sp_model.piece_to_id("<0x00>")

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, with the beginning and end marks that are asked for. Raises TypeError unless s is a
        string, ValueError if it holds half a character, as Python makes of bytes that are not UTF-8.
        """
        if not isinstance(s, str):
            raise TypeError(f"encode takes a string, not {type(s).__name__}")
        try:
            s.encode("utf-8")
        except UnicodeEncodeError as error:
            around = s[max(0, error.start - 20) : error.end + 20]
            raise ValueError(f"{around!r} is no UTF-8 text; save or type it as UTF-8") from error
        ids = self.sp_model.encode(s)[: self.max_len]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without marks, on all cores."""
        return self.sp_model.encode(texts, num_threads=-1)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; marks of beginning and end leave no trace."""
        return self.sp_model.decode(list(map(int, ids)))
