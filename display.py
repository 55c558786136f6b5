"""stdout and stderr that cannot end a run: where they fail, the display is lost and nothing else. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Display:
    """A text stream whose failures cost the display only: a reader that left, a full disk, a closed terminal.

    From the first failure on, `lost` says why, and all that is written goes to the null device. `needed`: failures are
    raised instead, for a command whose only result is what it prints.
    """

    def __init__(self, stream: Any) -> None:
        self.closed_before = stream is None  # by the caller; what is written has to go somewhere
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.needed = False
        self.lost: Exception | None = None

    def __getattr__(self, name: str) -> Any:  # all else, such as encoding and isatty, is the stream's
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        # What is buffered goes there, too; else it fails again at each write and when Python exits.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.lost = self.lost or error
        if self.needed:
            if isinstance(error, BrokenPipeError):
                raise error
            raise OSError(f"the standard output failed: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def safe_display() -> Iterator[Display]:
    """Within it, sys.stdout and sys.stderr are `Display`s, on which what the encoding cannot say is escaped. Yields
    the first.
    """
    for descriptor in (0, 1, 2):  # one that is closed would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    displays = Display(before[0]), Display(before[1])
    sys.stdout, sys.stderr = displays  # type: ignore[assignment]
    try:
        yield displays[0]
    finally:
        sys.stdout, sys.stderr = before
        for display in displays:
            display.needed = False
            display.flush()  # else Python does it as it exits, and complains
