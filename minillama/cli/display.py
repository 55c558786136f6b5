"""stdout and stderr that may fail while a run goes on: the display is lost, and nothing else. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


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
def safe_display() -> Iterator[Display]:
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
        line = f"warning: the standard output failed ({out.why()}): not all was shown, but the files are whole"
        print(line, file=sys.stderr, flush=True)
