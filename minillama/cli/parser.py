"""The argument parser that all commands share, with errors in one line, and types of option values.

Imports no torch, so that `--help` stays instant.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest valid name; the exit code is 2. `-` and `_` are the
    same in flag names. The help keeps the line breaks of the text.
    """

    source = ""  # prefix of error messages for arguments of a file: its name

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        # Matches values that begin with "-", which argparse must not take for flags: -1, -1,0 and -1e-3.
        self._negative_number_matcher = re.compile(r"-\.?[0-9]")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self._spelled(sys.argv[1:] if args is None else args), namespace)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return found

    def _spelled(self, args: Iterable[str]) -> list[str]:
        """The arguments with flag names as declared: `-` and `_` may be typed for each other."""
        declared = {plain(name): name for name in self._option_string_actions}
        args = list(args)
        for i, argument in enumerate(args):
            if argument == "--":
                break
            name, sign, value = argument.partition("=")
            if name.startswith("--"):
                args[i] = declared.get(plain(name), name) + sign + value
        return args

    def _meant(self, argument: str) -> str:
        """A hint for an unknown argument: the nearest flag, or a flag with that word as a choice."""
        name = argument.partition("=")[0]
        if name.startswith("-"):
            return nearest(name, self._option_string_actions)
        meant = self._spelled([f"--{name}"])
        if meant[0] not in self._option_string_actions:
            flags = [action for action in self._actions if action.option_strings and action.choices]
            words = [(action.option_strings[0], closest(name, action.choices or ())) for action in flags]
            meant = [f"{flag} {word}" for flag, word in words if word]
        if meant:
            return f"; did you mean {meant[0]}?"
        return "; flags begin with --, and a text with spaces needs quotes"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            message = f"invalid choice: {value!r}{nearest(str(value), choices)} (choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, message)

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "it takes no value, but got")
        self.exit(2, f"{self.prog}: error: {self.source}{message}; see python {self.prog} --help\n")


def plain(name: str) -> str:
    """A name with `_` instead of `-`, except for the dashes at its start."""
    stem = name.lstrip("-")
    return name[: len(name) - len(stem)] + stem.replace("-", "_")


def closest(name: str, known: Iterable[Any]) -> str | None:
    """The known name nearest to a typed one: of those with this prefix, if any, the most similar one; None if none is
    similar. Dashes at the start do not count.
    """
    by_plain = {plain(str(one)).lower().lstrip("-"): str(one) for one in known}
    typed = plain(name).lower().lstrip("-")
    begun = [one for one in by_plain if one.startswith(typed)] if len(typed) > 1 else []
    near = difflib.get_close_matches(typed, begun or by_plain, n=1, cutoff=0.0 if begun else 0.54)
    return by_plain[near[0]] if near else None


def nearest(name: str, known: Iterable[Any]) -> str:
    """A hint with the nearest known name, or "" if none is similar."""
    near = closest(name, known)
    return f"; the nearest is {near}" if near else ""


def into_and_seed(parser: OneLineParser, arguments: list[str] | None, here: Path) -> argparse.Namespace:
    """The options of a script that makes data: --into, an existing folder (default: `here`), --seed."""
    parser.add_argument("--into", type=Path, default=here, metavar="DIR", help="where to write (default: this folder)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0 or more; 0 (default): the bundled data")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: it must be 0 or more")
    if not options.into.is_dir():
        parser.error(f"--into {options.into}: there is no such folder")
    return options


def number(kind: type, allowed: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: `kind(text)`. `accepts` checks the value; `allowed` describes valid ones in errors."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {allowed}")
        return value

    return parse


COUNT = number(int, "a whole number of 1 or more", lambda value: value >= 1)
COUNT_OR_ZERO = number(int, "a whole number of 0 or more", lambda value: value >= 0)
SEED = number(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 1 << 63)
POSITIVE = number(float, "a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = number(float, "a number of 0 or more", lambda value: 0 <= value < math.inf)
FRACTION = number(float, "in [0, 1)", lambda value: 0 <= value < 1)
SHARE = number(float, "above 0 and at most 1", lambda value: 0 < value <= 1)
