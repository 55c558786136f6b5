"""Texts of single tokens, for people: on one line, with visible spaces and no unprintable characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizer import Tokenizer

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def printable(text: str) -> str:
    """A text with unprintable characters and lone surrogates as numbers, such as <0x1B>. Newlines and tabs stay."""
    return "".join(one if one.isprintable() or one in "\n\t" else f"<0x{ord(one):02X}>" for one in text)


def visible(text: str) -> str:
    """A text on one line, with visible spaces."""
    return printable(text.translate(VISIBLE))


def token_text(tokenizer: Tokenizer, token: int, before: Sequence[int] = (), *, plain: bool = False) -> str:
    """The text that a token adds to the tokens `before`, or its number in angle brackets: <end>, <start>, <123>.

    A number stands for a part of a character, and for an id without a piece. plain: with spaces and newlines as they
    are.
    """
    if token in tokenizer.stop_ids:
        return "<start>" if token == tokenizer.bos_id else "<end>"
    try:
        text = tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
        if not text:  # a space at the start of a text, which decoding drops
            letter = tokenizer.encode("a", bos=False, eos=False)
            text = tokenizer.decode([*letter, token])[len(tokenizer.decode(letter)) :]
    except ValueError:  # an id without a piece
        text = ""
    if not text or "\ufffd" in text:
        return f"<{token}>"
    return text if plain else visible(text)
