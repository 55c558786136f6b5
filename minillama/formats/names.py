"""Names of files, and defaults for what files leave out. Imports no torch, so that `--help` stays instant."""

from __future__ import annotations

from pathlib import Path

COURSE_TEMPLATE = "{sentence} Is this movie {labels}? This movie is "

RUNS = "runs"  # where a run's folder is made
RUN_FILES = ("options.json", "metrics.jsonl", "log.txt", "last.pt", "last.json", "best.pt", "lock")

# What the name of a file may end in, and what is no part of what it is called.
ENDINGS = tuple(
    f".{ending}"
    for ending in "safetensors pt pth bin ckpt gguf model tokens txt tsv csv json jsonl html htm data npy zip".split()
)


def without_ending(path: str | Path) -> str:
    """A path without the ending of its name, if that is one of `ENDINGS`: "run-0.pt" and "run-0.1" become "run-0" and
    "run-0.1". What else follows a dot is a part of the name.
    """
    text = str(Path(path))
    name = Path(text).name
    ending = next((end for end in ENDINGS if name.lower().endswith(end) and len(name) > len(end)), "")
    return text[: len(text) - len(ending)]


def tokenizer_beside(model: str) -> str:
    """Where the tokenizer of a checkpoint is looked for first: beside it, under its name."""
    return f"{without_ending(model)}.model"


def path_and_fold(text: str) -> tuple[str, str | None]:
    """The path of a data file, and the pattern behind its `#fold=`. Raises ValueError if one of them is missing."""
    path, sign, pattern = text.rpartition("#fold=")
    if not sign or Path(text).exists():
        return text, None
    if not path or not pattern:
        raise ValueError(f'{text!r} names no file and fold; give them as in "reviews.tsv#fold=cv9*"')
    return path, pattern
