"""The terminal: texts from the keyboard, a pipe or a file, and streams that may fail while a run goes on.

Imports no torch at the top, for run_llama.py needs it before the options are read.
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from environment import report

HISTORY = Path.home() / ".mini-llama-history"  # what was typed in the interactive loop


class Display:
    """A standard stream whose failure costs what it shows and nothing else: the reader may leave, the disk be full, the
    stream be closed. A character that its encoding cannot express is shown as an escape.

    failure: the first error, None while all is well. required: raise it instead, as OSError, where nothing else holds
    the result. Everything that is not defined here is the stream's own.
    """

    def __init__(self, stream: Any, descriptor: int) -> None:
        self.failure: Exception | None = None
        self.required = False
        self.closed_by_caller = stream is None
        self.stream = _open_null(descriptor) if stream is None else stream
        if hasattr(self.stream, "reconfigure"):
            with suppress(OSError, ValueError):
                self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def require(self) -> None:
        """Has every failure raised from here on. Raises ValueError if the stream was closed by the caller."""
        if self.closed_by_caller:
            raise ValueError("the standard output, where the text goes, is closed; send it to a file: > text.txt")
        self.required = True

    def write(self, text: str) -> int:
        if self.closed_by_caller and text:
            self.failure = self.failure or OSError("it is closed")
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)
        self._raise_if_required()

    def _lose(self, error: Exception) -> None:
        """Sends what follows, and what is still buffered, to nowhere: else each flush would fail again, also Python's
        own at exit.
        """
        self.failure = self.failure or error
        try:
            descriptor = self.stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        except (OSError, ValueError, AttributeError):  # no file, or closed in this process
            self.stream = open(os.devnull, "w")  # noqa: SIM115
        self._raise_if_required()

    def _raise_if_required(self) -> None:
        if self.required and self.failure is not None:
            if isinstance(self.failure, BrokenPipeError):
                raise self.failure
            raise OSError(f"the standard output failed ({self.why()}); send it to a file with room: > text.txt")

    def why(self) -> str:
        """The failure in words."""
        return getattr(self.failure, "strerror", None) or str(self.failure)


def _open_null(descriptor: int) -> Any:
    """A stream to nowhere. It takes a free `descriptor`: a file opened later must not get what C code prints there."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(null, descriptor)
        os.close(null)
        null = descriptor
    return open(null, "w", encoding="utf-8", closefd=null != descriptor)  # noqa: SIM115


@contextmanager
def display() -> Iterator[Display]:
    """Puts a Display before stdout and one before stderr, and yields the first; both are flushed at the end."""
    before = sys.stdout, sys.stderr
    out, err = Display(sys.stdout, 1), Display(sys.stderr, 2)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out
    finally:
        out.required = False
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def report_loss(out: Display) -> None:
    """Tells on stderr that stdout failed, for a command whose results are files."""
    if out.failure is not None:
        report(f"warning: the standard output failed ({out.why()}): not all was shown, but the files are whole")


def check_streams(args: argparse.Namespace) -> None:
    """Raises ValueError if the standard input is needed and was closed."""
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
    from dataset import LINE_END, read_text

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
