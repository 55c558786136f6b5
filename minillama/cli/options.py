"""The options: those typed, those of a file, and what follows from them alone. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from minillama.cli.flags import FILTERS, LORA_TARGETS, OPTION_DEFAULTS, PARTS, build_parser, used_by
from minillama.cli.parser import POSITIVE, OneLineParser
from minillama.formats.names import without_ending


def parse_options(
    argv: list[str] | None, saved: dict[str, Any] | None = None
) -> tuple[argparse.Namespace, frozenset[str]]:
    """The options, and the names of those that were typed, be it into the file of --config. `saved`: the defaults of a
    run that goes on.

    Two lists of names stand among the options: `typed`, also when the run that goes on was started, and `substituted`,
    empty here, for what environment.use_bundled_defaults replaces.
    """
    parser = build_parser()
    names = vars(parser.parse_args([]))
    given = given_options(parser, argv)
    if given.get("config") is not None:
        given = read_config(parser, given["config"]) | given
    defaults = OPTION_DEFAULTS.get(given.get("option", ""), {})
    # What pretraining starts from: a checkpoint that was named, or random weights.
    derived: dict[str, Any] = {"continued": "pretrained_model_path" in given, "substituted": []}
    if any(name in given for name in FILTERS):
        derived["epsilon"] = 0.0
    saved = saved or {}
    typed = {"typed": sorted({*saved.get("typed", ()), *given} - {"config"})}
    return argparse.Namespace(**(names | derived | defaults | saved | given | typed)), frozenset(given)


def active_options(saved: dict[str, Any]) -> dict[str, Any]:
    """A run's options without the parts of what it had off: these may have had other defaults then, and change
    nothing.
    """
    return {name: value for name, value in saved.items() if name not in PARTS or saved.get(PARTS[name])}


def given_options(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    """The options that `argv` has, without those left to their defaults."""
    absent = object()
    names = dict.fromkeys(vars(parser.parse_args([])), absent)
    given = vars(parser.parse_args(argv, argparse.Namespace(**names)))
    return {name: value for name, value in given.items() if value is not absent}


def read_config(parser: OneLineParser, path: str) -> dict[str, Any]:
    """The options in a configuration file, checked by the parser as if they were typed; what it complains of, in one
    line, names the file.
    """
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    parser.source = f"--config {path}: "
    try:
        # Numbers stay as they are written, as on a command line; a tuple is an object, which may name a thing twice.
        content = json.loads(
            Path(path).read_bytes(), object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=str
        )
    except OSError as error:
        parser.error(f"cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        parser.error(f"is no JSON ({error})")
    if not isinstance(content, tuple):
        parser.error('must hold a JSON object, such as {"option": "lora", "lr": 3e-3}')
    # By how many values an option takes.
    kinds: dict[Any, tuple[Any, str]] = {0: (bool, "true or false"), None: (str, "a text or a number")}
    kinds["?"] = (str | bool, "true, false or a text")
    argv, seen, off = [], set(), {}
    for key, value in content:
        name, shown = key.replace("-", "_"), json.dumps(key)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            parser.error(f'there is no option {shown}; the nearest is "{near}"')
        if name in seen:
            parser.error(f"{shown} is there twice; give it once")
        seen.add(name)
        option = known[name].option_strings[0]
        kind, allowed = kinds.get(known[name].nargs, (list, 'a list of texts that begin with no "-"'))
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


@lru_cache(maxsize=1)
def actions() -> dict[str, argparse.Action]:
    """Every option of the parser, by its name in the program."""
    return {action.dest: action for action in build_parser()._actions}


@lru_cache(maxsize=1)
def defaults() -> dict[str, Any]:
    """The value of every option if nothing is typed."""
    return vars(build_parser().parse_args([]))


def unused(args: argparse.Namespace) -> list[str]:
    """Options that are not at their defaults and change nothing for this --option, as they are typed."""
    users = used_by()
    return [flag(name) for name in changed(args, *users) if args.option not in users[name]]


def flag(name: str) -> str:
    """How an option is typed, from its name in the program."""
    return actions()[name].option_strings[0] if name in actions() else name


def changed(args: argparse.Namespace, *names: str) -> list[str]:
    """The options among `names` that are not at their defaults."""
    return [name for name in names if getattr(args, name) != defaults()[name]]


def writes_two_files(args: argparse.Namespace) -> bool:
    """Whether generate does what the course asks for: a text at temperature 0 and one at 1, each in its file."""
    other = (args.prompt_file, args.interactive, args.json, args.num_samples > 1, args.explain is not None)
    return args.temperature is None and args.decoder == "sample" and not any(other)


def only_prints(args: argparse.Namespace) -> bool:
    """Whether the standard output holds all that comes of the run: no file does."""
    if args.option == "generate":
        return not writes_two_files(args) and not args.explain
    return args.option in ("classify", "perplexity")


def lora_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `lora.apply_lora` that the options ask for."""
    targets = [name for target in args.lora_targets for name in LORA_TARGETS.get(target, (target,))]
    return {
        "rank": args.lora_rank,
        "alpha": args.lora_alpha,
        "targets": targets,
        "rslora": args.rslora,
        "dora": args.dora,
    }


def curve_picture(args: argparse.Namespace) -> str:
    """Where the picture of wise_ft's curve goes."""
    return f"{without_ending(args.curve_out)}.html"


def text_and_weight(text: str) -> tuple[str, float]:
    """The path and the weight of a `--corpus`. Raises ValueError if there is no path, or what follows the last `=` is
    no number above 0.
    """
    path, sign, weight = text.rpartition("=")
    if not text or (sign and not path):
        raise ValueError(f"--corpus {text!r} names no text; give a text file, or a folder of them")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return path, POSITIVE(weight)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--corpus {text}: the weight {error}") from error


def best_model_path(args: argparse.Namespace) -> str:
    """Where finetune and lora keep the best model."""
    return f"{args.option}-{args.epochs}-{args.lr}.pt"
