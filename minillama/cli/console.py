"""Texts from the keyboard, a pipe or a file, to be continued or classified."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from minillama.cli.header import report
from minillama.cli.options import Options
from minillama.environment import PackageError, optional_package

HISTORY = ".mini-llama-history"  # in the home folder: what was typed in the interactive loop
STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")  # its names; opening them fails where it is a socket


def check_stdin(options: Options) -> None:
    """Raises ValueError if what is to be read from the standard input cannot be, for it is closed."""
    if sys.stdin is None and (options.interactive or options.prompt_file in STDIN):
        source = "--interactive" if options.interactive else f"--prompt_file {options.prompt_file}"
        raise ValueError(f"{source} reads the standard input, which is closed; open it, or use --prompt")


def show(piece: str) -> None:
    """Prints a piece of text where the last one ended, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def speaks_utf8() -> bool:
    """Whether stdout can say everything."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"


def prompts_of(options: Options) -> list[str]:
    """The prompts asked for."""
    from minillama.text.labelled import LINE_END, read_text

    texts = [options.prompt]
    if options.prompt_file is not None:
        what = "file of prompts (one a line)"
        text = read_stdin(what) if options.prompt_file in STDIN else read_text(options.prompt_file, what)
        lines = LINE_END.split(text)
        texts = [line for line in lines if line.strip()]
        if skipped := len(lines) - len(texts) - (lines[-1] == ""):
            report(f"warning: {skipped} empty lines of {options.prompt_file} are skipped")
    return texts


def read_stdin(what: str) -> str:
    """The text of the standard input from where it stands, which may be a pipe, a socket or a file that is partly read;
    UTF-8 whatever the locale. Raises ValueError, naming `what` it should have been.
    """
    from minillama.text.labelled import decoded_text

    name = "the standard input"
    stream = getattr(sys.stdin, "buffer", None)
    with suppress(OSError, ValueError):  # a stream without a file
        os.set_blocking(sys.stdin.fileno(), True)  # else what has not yet come would be taken for the end
    try:
        content = sys.stdin.read().encode("utf-8", "surrogateescape") if stream is None else stream.read()
    except (OSError, ValueError) as error:  # open for writing only, or closed by now
        raise ValueError(f"{name} cannot be read ({error}); give a {what} by its name") from error
    return decoded_text(content, name, what)


def open_history() -> tuple[ModuleType | None, Path | None]:
    """The readline module with the lines of earlier times, and where they are kept; None for what is not to be had. A
    broken readline, or no place to keep the lines, is told of.
    """
    try:
        with optional_package("readline", "the history of what is typed is left out"):
            import readline

            readline.get_current_history_length()
    except PackageError as error:
        if not error.missing:
            report(f"notice: {error.short}")
        return None, None
    try:
        path = Path.home() / HISTORY
        if path.exists():
            readline.read_history_file(path)
    except Exception as error:  # no home, a file that cannot be read, a broken readline
        report(f"notice: what is typed is not kept for the next time: {error}")
        return readline, None
    return readline, path


def lines_typed() -> Iterable[str]:
    """The lines that are typed, until Ctrl-D; on a terminal with a history that the next time still has."""
    asks = "> " if sys.stdin.isatty() else ""
    readline, history = open_history() if asks else (None, None)
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
        if readline is not None and history is not None:
            try:
                readline.set_history_length(1000)
                readline.write_history_file(history)
            except Exception as error:  # a full disk, a home that is not there, a broken readline
                report(f"warning: the history could not be kept: {error}")
