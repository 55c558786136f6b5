"""What the commands share: a parser that complains in one line, types of options that say what is allowed, a check that
an optional package works, the numbers that torchrun gives its processes, and locks.

Imports no torch, so that `--help` stays instant.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that complains in one line, names the nearest right word, and exits with status 2; `-` and `_`
    are the same in the name of a flag. Its help keeps the text as laid out.
    """

    source = ""  # where arguments come from that were not typed, for what is said of them

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        # What argparse takes for a value though it begins with "-": not -1 alone, but -1,0 and -1e-3, too.
        self._negative_number_matcher = re.compile(r"-\.?[0-9]")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self._spelled(sys.argv[1:] if args is None else args), namespace)

    def parse_args(self, args=None, namespace=None):
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return found

    def _spelled(self, args: Iterable[str]) -> list[str]:
        """The arguments with the names of flags as they were declared, whichever of `-` and `_` were typed in them."""
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
        """What was probably meant by an argument that is none: the nearest flag, or the flag that takes such a word."""
        name = argument.partition("=")[0]
        if name.startswith("-"):
            return nearest(name, self._option_string_actions)
        meant = self._spelled([f"--{name}"])
        if meant[0] not in self._option_string_actions:
            flags = [action for action in self._actions if action.option_strings and action.choices]
            words = [(action.option_strings[0], closest(name, action.choices or ())) for action in flags]
            meant = [f"{flag} {word}" for flag, word in words if word]
        return f"; did you mean {meant[0]}?" if meant else "; the name of a flag begins with --"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            message = f"invalid choice: {value!r}{nearest(str(value), choices)} (choose from {', '.join(choices)})"
            raise argparse.ArgumentError(action, message)

    def error(self, message: str) -> NoReturn:
        message = message.replace("ignored explicit argument", "it takes no value, and there is")
        self.exit(2, f"{self.prog}: error: {self.source}{message}; see python {self.prog} --help\n")


def plain(name: str) -> str:
    """A name with `_` for each `-` behind its beginning."""
    stem = name.lstrip("-")
    return name[: len(name) - len(stem)] + stem.replace("-", "_")


def closest(name: str, known: Iterable[Any]) -> str | None:
    """The known name that is most like the one typed: the only one that begins so, else the most similar; None if none
    is like it. The dashes before a flag do not count.
    """
    by_plain = {plain(str(one)).lower().lstrip("-"): str(one) for one in known}
    typed = plain(name).lower().lstrip("-")
    begun = [one for one in by_plain if one.startswith(typed)] if len(typed) > 1 else []
    near = begun if len(begun) == 1 else difflib.get_close_matches(typed, by_plain, n=1, cutoff=0.54)
    return by_plain[near[0]] if near else None


def nearest(name: str, known: Iterable[Any]) -> str:
    """`; the nearest is NAME`, or nothing."""
    near = closest(name, known)
    return f"; the nearest is {near}" if near else ""


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


class Process(NamedTuple):
    """This process's number among those that torchrun started, of how many, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def this_process() -> Process:
    """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK. One process, unless both of the first two are set; without
    LOCAL_RANK the rank stands for it. Raises ValueError for a value that is no number, or out of range.
    """
    rank, world = map(_from_environment, ("RANK", "WORLD_SIZE"))
    if rank is None or world is None or (rank, world) == (0, 1):
        return Process()
    local_rank = _from_environment("LOCAL_RANK")
    if world < 1 or not 0 <= rank < world or (local_rank is not None and local_rank < 0):
        raise ValueError(
            f"the environment has RANK={rank}, WORLD_SIZE={world}, LOCAL_RANK={local_rank}; a rank must be from 0 to "
            "WORLD_SIZE - 1: start several processes with torchrun, or type `unset RANK WORLD_SIZE` for one"
        )
    return Process(rank, world, rank if local_rank is None else local_rank)


def _from_environment(name: str) -> int | None:
    """The number in an environment variable; None if it is missing or empty."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        raise ValueError(
            f"the environment variable {name} is {text[:40]!r}; it must be a whole number, as torchrun sets it: type "
            f"`unset {name}` to run one process"
        ) from None


def try_lock(file: IO[Any] | int, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed or the process dies; False if another has locked it and this one
    is not to wait. Where the system or the file system knows no locks, nothing is locked, and that is True.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # an old network file system, for one
        pass
    return True


def is_still_at(path: Path, file: IO[Any]) -> bool:
    """Whether the open `file` is what lies at `path`, and was not removed or replaced since it was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
