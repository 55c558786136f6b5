"""What the commands share: a parser that complains in one line, types of options that say what is allowed, and a check
that an optional package works.

Imports no torch, so that `--help` stays instant.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that complains in one line and exits with status 2; its help keeps the text as laid out."""

    source = ""  # where arguments come from that were not typed, for what is said of them

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        # What argparse takes for a value though it begins with "-": not -1 alone, but -1,0 and -1e-3, too.
        self._negative_number_matcher = re.compile(r"-\.?[0-9]")

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            hint = f"; the nearest is {near[0]}" if near and name.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {self.source}{message}; see python {self.prog} --help\n")


class PackageError(ValueError):
    """An optional package is missing, or does not work here; `missing` says which of the two."""

    def __init__(self, package: str, purpose: str, error: BaseException) -> None:
        module = getattr(error, "name", None) or ""
        self.missing = isinstance(error, ModuleNotFoundError) and module.partition(".")[0] == package
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.short = f"{purpose}, for {package} is broken here ({reason})"
        if self.missing:
            super().__init__(f"{purpose}: pip install {package}")
        else:
            super().__init__(
                f"{purpose}, and {package} is broken here ({reason}): pip install --force-reinstall {package}"
            )


@contextmanager
def optional_package(package: str, purpose: str, passes: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Imports and uses an optional package: whatever goes wrong inside becomes a PackageError, a line with the reason
    and the command to type. purpose: what needs the package, as the line begins. Ctrl-C and `passes` go through.
    """
    try:
        yield
    except BaseException as error:  # a broken package may raise anything, also SystemExit, or a panic of Rust's
        if isinstance(error, (KeyboardInterrupt, *passes)):
            raise
        raise PackageError(package, purpose, error) from error


def into_and_seed(parser: OneLineParser, arguments: list[str] | None, here: Path) -> argparse.Namespace:
    """The options of a script that makes data: --into, a folder that is there (default: `here`), and --seed."""
    parser.add_argument("--into", type=Path, default=here, metavar="DIR", help="where to write (default: this folder)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="0 or more; 0, the default, gives what ships")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed {options.seed}: it must be 0 or more")
    if not options.into.is_dir():
        parser.error(f"--into {options.into}: there is no such folder")
    return options


def number(kind: type, allowed: str, accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: `kind(text)`, refused unless `accepts` it; `allowed` says in words what is."""

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
NOT_NEGATIVE = number(float, "0 or a number above", lambda value: 0 <= value < math.inf)
FRACTION = number(float, "in [0, 1)", lambda value: 0 <= value < 1)
