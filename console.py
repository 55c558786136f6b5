"""Texts from the keyboard, a pipe or a file, to be continued or classified."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Iterable
from pathlib import Path

from dataset import LINE_END, read_text
from environment import report

HISTORY = Path.home() / ".mini-llama-history"  # what was typed in the interactive loop


def check_stdin(args: argparse.Namespace) -> None:
    """Raises ValueError if what is to be read from the standard input cannot be, for it is closed."""
    if sys.stdin is None and (args.interactive or args.prompt_file == "-"):
        source = "--interactive" if args.interactive else "--prompt_file -"
        raise ValueError(f"{source} reads the standard input, which is closed; open it, or use --prompt")


def show(piece: str) -> None:
    """Prints a piece of text where the last one ended, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def speaks_utf8() -> bool:
    """Whether stdout can say everything."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts asked for."""
    texts = [args.prompt]
    if args.prompt_file is not None:
        path = "/dev/stdin" if args.prompt_file == "-" else args.prompt_file
        lines = LINE_END.split(read_text(path, "file of prompts (one a line)"))
        texts = [line for line in lines if line.strip()]
        if skipped := len(lines) - len(texts) - (lines[-1] == ""):
            report(f"warning: {skipped} empty lines of {args.prompt_file} are skipped")
    return texts


def lines_typed() -> Iterable[str]:
    """What is typed, line by line, until Ctrl-D; on a terminal with a history that the next time still has."""
    asks = "> " if sys.stdin.isatty() else ""
    if asks:
        try:
            import readline

            if HISTORY.exists():
                readline.read_history_file(HISTORY)
        except (ImportError, OSError):
            readline = None  # type: ignore[assignment]
    if hasattr(sys.stdin, "reconfigure"):
        # UTF-8 whatever the locale, as prompts are everywhere; a line that is none is refused by itself.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        while True:
            try:
                yield input(asks)
            except EOFError:
                show("\n" if asks else "")
                return
            except KeyboardInterrupt:
                show("\n")
                report("Ctrl-C stops an answer; Ctrl-D ends")
    finally:
        if asks and readline is not None:
            try:
                readline.set_history_length(1000)
                readline.write_history_file(HISTORY)
            except OSError as error:
                report(f"warning: the history could not be kept: {error}")
