"""stdout and stderr that may fail without stopping a run: only the display is lost. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Display:
    """A standard stream that may fail without stopping the program: a closed pipe, a full disk, a closed stream.
    Characters outside its encoding are shown as escapes.

    failure: the first error, or None. required: raise the error, as OSError, because the stream holds the only copy of
    the result. All other attributes are those of the stream.
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
        """Makes every failure raise from now on. Raises ValueError if the caller closed the stream."""
        if self.closed_by_caller:
            raise ValueError("the standard output, which takes the text, is closed; write it to a file: > text.txt")
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
        """Sends buffered and later text to the null device. Otherwise each flush would fail again, even the one at
        Python's exit.
        """
        self.failure = self.failure or error
        try:
            descriptor = self.stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        except (OSError, ValueError, AttributeError):  # no file descriptor, or closed in this process
            self.stream = open(os.devnull, "w")  # noqa: SIM115
        self._raise_if_required()

    def _raise_if_required(self) -> None:
        if self.required and self.failure is not None:
            if isinstance(self.failure, BrokenPipeError):
                raise self.failure
            raise OSError(f"the standard output failed ({self.why()}); write to a file on another disk: > text.txt")

    def why(self) -> str:
        """The reason of the failure, for messages."""
        return getattr(self.failure, "strerror", None) or str(self.failure)


def _open_null(descriptor: int) -> Any:
    """A stream to the null device. It takes `descriptor` if free, so that no later file gets output of C code."""
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
    """Wraps stdout and stderr in a Display each, and yields that of stdout. Flushes both at the end."""
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
    """Prints a warning on stderr if stdout failed, for a command whose results are files."""
    if out.failure is not None:
        line = f"warning: the standard output failed ({out.why()}): some output was lost, but the files are complete"
        print(line, file=sys.stderr, flush=True)


def displayed(command: Callable[[list[str] | None], int], arguments: list[str] | None) -> int:
    """The exit code of a command whose results are files: a standard output that fails does not stop it."""
    with safe_display() as out:
        code = command(arguments)
        out.flush()
        report_loss(out)
        return code
