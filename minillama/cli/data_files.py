"""Data files of the user: which files a command reads, and the names of the files that it writes. Imports no torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from minillama.cli.header import report
from minillama.cli.options import Options, all_flags
from minillama.formats.names import COLUMNS, COLUMNS_EXAMPLE, is_table, path_and_fold, without_ending

HELD_OUT = "0.1"  # the share of --train that becomes dev
DATA_OPTIONS = ("train", "dev", "test", "label_names")
SPLIT_NAMES = re.compile(r"(^|[-_. ])(train(ing)?|dev|test(ing)?|valid(ation)?|val)$", re.IGNORECASE)


def columns(text: str) -> dict[str, str]:
    """An argparse type: `text=NAME,label=NAME,fold=NAME`, each at most once."""
    parts = re.split(rf",(?=(?:{'|'.join(COLUMNS)})=)", text)  # a name may hold commas
    found = {key.strip(): name.strip() for key, _, name in (part.partition("=") for part in parts)}
    if len(found) < len(parts) or not all(found.values()) or set(found) - set(COLUMNS):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give the names of columns, as in {COLUMNS_EXAMPLE}")
    return found


def share_of(path: str | None) -> float | None:
    """The share of the training rows that --dev holds out; None if --dev is a file."""
    if path is None or not re.fullmatch(r"0?\.[0-9]+", path) or Path(path).exists():
        return None
    return float(path) or None


def check_share(options: Options) -> None:
    """Raises ValueError if --dev is a number, but no share of the training rows."""
    path = options.dev
    if path is not None and share_of(path) is None and re.fullmatch(r"[0-9.]+ ?%?", path) and not Path(path).exists():
        raise ValueError(f"--dev {path} is neither a file nor a share of --train between 0 and 1, as in 0.2")


def source(options: Options, split: str) -> str:
    """The file with the rows of a split: --train for a --dev that is held out."""
    path = getattr(options, split)
    return options.train if share_of(path) is not None else path


def is_courses(path: str) -> bool:
    """Whether the default files belong to this one."""
    return Path(path).name.startswith("cfimdb")


def complete(options: Options, reads: Sequence[str]) -> Options:
    """Replaces the defaults of the data flags if the user named own data: the first of `reads` that holds rows.

    Without --dev a share of --train is held out; without --test nothing is tested; without --label-names the labels
    are those of the file. Otherwise a warning names the defaults that remain.
    """
    typed, first = options.typed, reads[0]
    if "train" in typed and "train" not in reads and not {"dev", "test"} & set(typed):
        raise ValueError(f"--option {options.option} trains nothing; give the rows to classify as --dev or --test")
    named = first in typed or (first == "dev" and "test" in typed)
    own = named and not is_courses(getattr(options, first if first in typed else "test"))
    if own:
        absent = {"dev": HELD_OUT if first == "train" else None, "test": None, "label_names": None}
        return options.replace(**{name: value for name, value in absent.items() if name in reads and name not in typed})
    left = [name for name in reads if name not in typed]
    if 0 < len(left) < len(reads):
        known = all_flags(options.commands)
        defaults = ", ".join(f"{known[name].name} {getattr(options, name)}" for name in left)
        report(f"warning: {defaults} by default; check that they belong to the files you named")
    return options


def data_name(path: str) -> str:
    """The name of the data in a file, without the name of the split: "reviews-train.csv" and "reviews.csv" are reviews.

    "" if the file is named after its split alone.
    """
    return SPLIT_NAMES.sub("", Path(without_ending(path_and_fold(path)[0])).name).lstrip("-")  # which begins a flag


def prediction_file(options: Options, split: str, ending: str) -> str | None:
    """The default file for the predictions of a split; None without rows.

    Its name ends as the course's does; for a table it is a table. Lines of `label ||| sentence` get the course's whole
    name if their file has no name of its own, as in "dev.txt".
    """
    if getattr(options, split) is None:
        return None
    path = path_and_fold(source(options, split))[0]
    base = data_name(path)
    if not is_table(path):
        return f"{base or 'cfimdb'}-{split}-{ending}"
    kind = ".jsonl" if Path(path).suffix.lower().startswith(".json") else ".csv"
    return "-".join(part for part in (base, split, f"{without_ending(ending)}{kind}") if part)


def model_file(options: Options) -> str:
    """The file of the best model: the course's name, and before it that of the user's own data."""
    name = f"{options.option}-{options.epochs}-{options.lr}.pt"
    own = options.label_names is None or is_table(options.train)
    base = data_name(options.train) if own else ""
    return f"{base}-{name}" if base else name
