"""Commands and flags: declaring them, reading them from the command line or a file, and showing them in `--help`.

Imports no torch, so that `--help` stays instant.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minillama.cli.parser import SEED, OneLineParser

PROGRAM = "run_llama.py"


class Flag:
    """A flag of the command line.

    name: the flag and the name of its value, such as "--epochs N". kind: a function that parses the value, a tuple of
    allowed values, or bool for a flag without a value. default_text: the default in words, if the value is unclear.
    elsewhere: why other commands refuse the flag ({users}: the commands that use it); without it, their header lists
    the flag as ignored. settings: for argparse (nargs, const, choices).
    """

    def __init__(
        self,
        name: str,
        help: str,
        kind: Callable[[str], Any] | Collection[str] = str,
        default: Any = None,
        *,
        default_text: str = "",
        elsewhere: str = "",
        **settings: Any,
    ) -> None:
        self.name, _, self.metavar = name.partition(" ")
        self.key = self.name.lstrip("-").replace("-", "_")
        self.help, self.default, self.default_text, self.elsewhere = help, default, default_text, elsewhere
        self.settings: dict[str, Any] = settings | ({"metavar": self.metavar} if self.metavar else {})
        if kind is bool:
            self.default, self.settings = False, {"action": "store_true"}
        else:
            self.settings |= {"type": kind} if callable(kind) else {"choices": kind}

    @property
    def shown_default(self) -> str:
        """The default as help shows it; "" without one."""
        has_none = self.default is None or self.default is False or self.default == []
        return self.default_text or ("" if has_none else str(self.default))

    def add_to(self, parser: Any, shown_default: str) -> None:
        """Adds the flag to an argparse parser or group."""
        text = f"{self.help} (default: {shown_default})" if shown_default else self.help
        parser.add_argument(self.name, help=text.replace("%", "%%"), default=self.default, **self.settings)


OwnFlag = partial(Flag, elsewhere="belongs to --option {users}")


class Group(NamedTuple):
    """Flags under one heading of `--help`."""

    title: str
    flags: Sequence[Flag]
    note: str = ""


class Options:
    """Values of all flags, typed or default: each is an attribute.

    Options never change in place; `replace` makes a copy. Other attributes:
    command, commands: the command to run, and all commands
    typed: names of the typed flags, including those typed at the start of a resumed run
    substituted: names of the flags whose missing default file was replaced by a bundled one
    continued: whether --pretrained-model-path was typed (pretrain: continue from it)
    processes: the number of processes
    """

    def __init__(self, commands: Sequence[Command], values: Mapping[str, Any]) -> None:
        command = next((one for one in commands if one.name == values["option"]), None)
        if command is None:
            raise ValueError(f"there is no option {values['option']!r}; a newer version may have it")
        self.__dict__.update(values, command=command, commands=commands)

    def __getattr__(self, name: str) -> Any:  # tells type checkers that any flag may be read
        raise AttributeError(f"there is no option {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"options do not change in place; use replace({name}=...)")

    def values(self) -> dict[str, Any]:
        """All values that can be saved as JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("command", "commands")}

    def replace(self, **values: Any) -> Options:
        return Options(self.commands, self.values() | values)

    def changed(self, *names: str) -> list[str]:
        """The flags among `names` that are not at their defaults."""
        known = all_flags(self.commands)
        return [name for name in names if getattr(self, name) != known[name].default]

    def ignored(self) -> list[str]:
        """Flags, as typed, that are not at their defaults but have no effect on this command."""
        known = all_flags(self.commands)
        return [known[name].name for name in self.changed(*known) if name not in self.command.keys]


@dataclass(frozen=True)
class Command:
    """One value of --option. `inputs` and `outputs` list the files that `run` reads and writes, besides those of the
    common flags. `resolve` replaces missing default files by bundled ones. `check` raises ValueError for options that
    contradict each other.
    """

    name: str
    summary: str
    groups: Sequence[Group]
    run: Callable[[Options], None]
    examples: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    default_texts: Mapping[str, str] = field(default_factory=dict)
    resolve: Callable[[Options], Options] = lambda options: options
    check: Callable[[Options], None] = lambda options: None
    inputs: Callable[[Options], list[str | None]] = lambda options: [options.pretrained_model_path]
    outputs: Callable[[Options], list[str]] = lambda options: []
    only_prints: Callable[[Options], bool] = lambda options: False  # whether stdout has the only copy of the result
    trains: bool = False

    @property
    def keys(self) -> set[str]:
        """The names of the flags that the command uses."""
        return set(all_flags([self]))

    @property
    def all_defaults(self) -> dict[str, Any]:
        """The default of each flag that the command uses."""
        return {key: flag.default for key, flag in all_flags([self]).items()} | {"option": self.name, **self.defaults}

    def shown_default(self, flag: Flag) -> str:
        """The command's default of a flag as help shows it; "" without one."""
        value = self.defaults.get(flag.key)
        return self.default_texts.get(flag.key) or (flag.shown_default if value is None else str(value))


COMMON = Group(
    "all commands",
    (
        Flag("--option OPTION", "the command", str, "generate"),
        Flag("--seed N", "random seed", SEED, 1337),
        Flag(
            "--config FILE",
            'options from a JSON object, such as {"option": "lora", "lr": 3e-3, "eval_train": true}, as if typed; the '
            "command line overrides it; see examples/",
        ),
    ),
)


def all_flags(commands: Iterable[Command]) -> dict[str, Flag]:
    """All flags of the commands, by key."""
    groups = [COMMON, *(group for command in commands for group in command.groups)]
    return {flag.key: flag for group in groups for flag in group.flags}


# Reading


def build_parser(commands: Sequence[Command]) -> OneLineParser:
    """A parser for the flags of all commands."""
    parser = OneLineParser(prog=PROGRAM, add_help=False)
    parser.add_argument("-h", "--help", action="help", default=argparse.SUPPRESS)
    parser.add_argument("--option", choices=[command.name for command in commands], default="generate")
    for flag in all_flags(commands).values():
        if flag.key != "option":
            flag.add_to(parser, flag.shown_default)
    return parser


def parse_options(
    commands: Sequence[Command], argv: Sequence[str], saved: Mapping[str, Any] | None = None, processes: int = 1
) -> Options:
    """The options of a command line and of the --config file. saved: the options of a run to resume, which replace the
    defaults.
    """
    parser = build_parser(commands)
    values = vars(parser.parse_args([]))
    given = given_options(parser, argv)
    if given.get("config") is not None:
        given = read_config(parser, given["config"]) | given
    command = next(one for one in commands if one.name == given.get("option", values["option"]))
    saved = saved or {}
    derived: dict[str, Any] = {"continued": "pretrained_model_path" in given, "substituted": []}
    derived |= {**command.defaults, **saved, **given}
    derived["typed"] = sorted({*saved.get("typed", ()), *given} - {"config"})
    return Options(commands, values | derived | {"processes": processes})


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options in `argv`, without defaults."""
    absent = object()
    names = dict.fromkeys(vars(parser.parse_args([])), absent)
    given = vars(parser.parse_args(argv, argparse.Namespace(**names)))
    return {name: value for name, value in given.items() if value is not absent}


def read_config(parser: OneLineParser, path: str) -> dict[str, Any]:
    """The options in a configuration file, checked as if they were typed. Error messages name the file."""
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    parser.source = f"--config {path}: "
    try:
        # Numbers stay text, as on a command line. Objects become tuples of pairs, which show repeated keys.
        content = json.loads(
            Path(path).read_bytes(), object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=str
        )
    except OSError as error:
        parser.error(f"cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        parser.error(f"is not JSON ({error})")
    if not isinstance(content, tuple):
        parser.error('must hold a JSON object, such as {"option": "lora", "lr": 3e-3}')
    # The allowed type of a value, by the flag's number of values (nargs).
    kinds: dict[Any, tuple[Any, str]] = {0: (bool, "true or false"), None: (str, "a text or a number")}
    kinds["?"] = (str | bool, "true, false or a text")
    argv, seen, off = [], set(), {}
    for key, value in content:
        name, shown = key.replace("-", "_"), json.dumps(key)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            parser.error(f'there is no option {shown}; the nearest is "{near}"')
        if name in seen:
            parser.error(f"{shown} occurs twice; give it once")
        seen.add(name)
        option = known[name].option_strings[0]
        kind, allowed = kinds.get(known[name].nargs, (list, 'a list of texts, none with "-" at its start'))
        items = value if isinstance(value, list) else []
        if not isinstance(value, kind) or any(not isinstance(one, str) or one[:1] == "-" for one in items):
            parser.error(f"{shown} is {json.dumps(value)[:60]}; it must be {allowed}")
        if value is False:
            off[name] = False
        else:
            argv += [f"{option}={value}"] if isinstance(value, str) else [option, *items]
    given = given_options(parser, argv) | off
    parser.source = ""
    return given


# Help


def requested_help(commands: Sequence[Command], argv: Sequence[str], overview: str) -> str | None:
    """The help text to print: that of the command named in `argv`, else `overview`. None if `argv` does not ask for
    help.
    """
    if not {"-h", "--help"} & set(argv):
        return None
    parser = OneLineParser(prog=PROGRAM, add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--option", choices=[command.name for command in commands])
    asked, _ = parser.parse_known_args(argv)
    if not asked.help:
        return None
    return next((command_help(command) for command in commands if command.name == asked.option), overview)


def command_help(command: Command) -> str:
    """The help text of a command: its flags in groups, with its defaults, and examples."""
    examples = "\n".join(f"  {line}" for line in command.examples.strip().splitlines())
    parser = OneLineParser(
        prog=PROGRAM,
        usage=f"python {PROGRAM} --option {command.name} [flags]",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"examples:\n{examples}",
        add_help=False,
    )
    for group in (*command.groups, COMMON):
        section = parser.add_argument_group(group.title, group.note or None)
        for flag in group.flags:
            if flag.key != "option":
                flag.add_to(section, command.shown_default(flag))
    return parser.format_help()
