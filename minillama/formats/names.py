"""Names of files and columns, and defaults for missing fields. Imports no torch."""

from __future__ import annotations

from pathlib import Path

COURSE_TEMPLATE = "{sentence} Is this movie {labels}? This movie is "

RUNS = "runs"  # the parent of all run folders
RUN_FILES = ("options.json", "metrics.jsonl", "log.txt", "last.pt", "last.json", "best.pt", "lock")

TABLES = (".csv", ".tsv", ".jsonl", ".json")  # endings of tables; other data files have lines of `label ||| sentence`
COLUMNS = ("text", "label", "fold")  # that --columns can name
COLUMNS_EXAMPLE = "--columns text=NAME,label=NAME"
PREDICTED, PROBABILITY = "predicted", "p_"  # columns that predictions add: the label, and each class's probability

# Suffixes that `without_ending` removes.
ENDINGS = "safetensors pt pth bin ckpt gguf model tokens txt tsv csv json jsonl html htm data npy zip".split()


def without_ending(path: str | Path) -> str:
    """A path without its suffix if this is one of `ENDINGS`: "run-0.pt" becomes "run-0", "run-0.1" stays."""
    path = Path(path)
    return str(path.with_suffix("") if path.suffix.lower().removeprefix(".") in ENDINGS else path)


def is_table(path: str) -> bool:
    """Whether a data file, with or without `#fold=PATTERN`, has the ending of a table."""
    return Path(path_and_fold(path)[0]).suffix.lower() in TABLES


def tokenizer_beside(model: str) -> str:
    """The path to look for a checkpoint's tokenizer first: beside it, with its name."""
    return f"{without_ending(model)}.model"


def path_and_fold(text: str) -> tuple[str, str | None]:
    """The path of a data file, and the pattern after `#fold=`. Raises ValueError if one of them is missing."""
    path, sign, pattern = text.rpartition("#fold=")
    if not sign or Path(text).exists():
        return text, None
    if not path or not pattern:
        raise ValueError(f'{text!r} lacks a file or a fold; give both, as in "reviews.tsv#fold=cv9*"')
    return path, pattern
