"""Stopping a training run by a signal, after the present step."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any


class Stopped(KeyboardInterrupt):
    """Stop of a run by a signal; the message says how to resume."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Interrupts:
    """A context in which the first SIGINT or SIGTERM only sets `number`; a second one has its usual effect."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        self.__exit__()
        with suppress(OSError):  # stderr may be closed; print is not safe in a signal handler
            os.write(
                2, b"\nstopping after this step; a second Ctrl-C (or signal) stops at once and loses unsaved steps\n"
            )
