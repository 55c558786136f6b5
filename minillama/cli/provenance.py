"""Provenance of results: the project's commit, checksums, and a record of the inputs of each prediction file.

The record of FOLDER/NAME is FOLDER/runs/predictions/NAME.json. Lookup is by the SHA-256 of the file: a renamed or
copied file keeps its record, an edited file has none. Imports no torch: prepare_submit.py reads the records.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from minillama.cli.data_files import DATA_OPTIONS, source
from minillama.cli.header import warn
from minillama.cli.new_model import is_new
from minillama.cli.options import Options
from minillama.environment import HERE, file_sha256, project_commit, try_lock
from minillama.formats.names import path_and_fold

BUNDLED_MODEL = HERE / "data" / "mini-llama.safetensors"
BUNDLED_CLASSIFIER = HERE / "data" / "mini-llama-opinions.pt"
PROMPT = " Is this movie "  # in the course's prediction files, the prompt may follow the sentence
NOT_RECORDED = ("typed", "substituted")  # options that have separate fields in the record


def is_bundled(path: str | Path, sha256: str | None) -> bool:
    """Whether the checkpoint is the bundled model, under any name. sha256: that of the file."""
    try:
        same_size = os.path.getsize(path) == BUNDLED_MODEL.stat().st_size
    except OSError:
        return False
    return sha256 is not None and same_size and sha256 == file_sha256(BUNDLED_MODEL)


# Records


@dataclass(frozen=True)
class Origin:
    """The inputs of predictions, recorded before the work starts, because the files may change later.

    inputs: fields that all records of the run share; data: by split, the fields about its rows.
    """

    inputs: dict[str, Any]
    data: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, options: Options, data: Mapping[str, tuple[str, int]], *more_models: str) -> Origin:
        """The origin of predictions for `data`, the path and the number of rows of each split. more_models: models that
        are read besides --pretrained-model-path; the first one is recorded as the checkpoint.
        """
        models = [*more_models, "random weights" if is_new(options) else options.pretrained_model_path]
        sums = {path: file_sha256(path) for path in models}
        return cls(
            {
                "option": options.option,
                "checkpoint": models[0],
                "checkpoint_sha256": sums[models[0]],
                "bundled_model": any(is_bundled(path, sums[path]) for path in models),
                "model_substituted": "pretrained_model_path" in options.substituted,
                "data_substituted": any(name in options.substituted for name in DATA_OPTIONS),
                "label_names": options.label_names if data else None,
                "seed": options.seed,
                "typed": options.typed,
                "options": {name: value for name, value in options.values().items() if name not in NOT_RECORDED},
                "commit": project_commit(),
            },
            {
                split: {"data": path, "rows": rows, "data_sha256": file_sha256(path_and_fold(path)[0])}
                for split, (path, rows) in data.items()
            },
        )

    def write_record(self, path: str | Path, split: str | None = None, **results: Any) -> str | None:
        """Writes the record of the file just written at `path`, unless it is a device or a pipe. Returns the problem as
        a message, or None; it does not raise, because the file itself is complete.
        """
        from minillama.formats.files import write_json

        target = record_path(path)
        sha256 = file_sha256(path)
        if sha256 is None:
            return None
        no_data = {"data": None, "rows": None, "data_sha256": None}
        scores = {"accuracy": None, "macro_f1": None} | results
        record = {"file": Path(path).name, "sha256": sha256, **self.inputs, **(self.data[split] if split else no_data)}
        record |= {**scores, "time": datetime.now().astimezone().isoformat(timespec="seconds")}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            old = read_record(target)
            if old is not None and old["sha256"] != sha256:  # keep it: the old file may exist under another name
                os.replace(target, target.with_name(f"{Path(path).name}.{old['sha256'][:12]}.json"))
            write_json(target, record)
        except OSError as error:
            return f"{path} has no record of its inputs: {target} cannot be written ({error.strerror})"
        return None


def record_path(path: str | Path) -> Path:
    """The path of the record of a prediction file."""
    return Path(path).parent / "runs" / "predictions" / f"{Path(path).name}.json"


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file; None if there is none."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("sha256"), str) else None


def find_record(folder: Path, name: str, content: bytes) -> dict[str, Any] | None:
    """The record in `folder`/runs/predictions of a file with this content, or None. Of several records, that of a
    file called `name` comes first, then the latest.
    """
    import hashlib

    sha256 = hashlib.sha256(content).hexdigest()
    records = (read_record(path) for path in sorted((folder / "runs" / "predictions").glob("*.json")))
    found = [record for record in records if record is not None and record["sha256"] == sha256]
    return max(found, key=lambda record: (record.get("file") == name, str(record.get("time"))), default=None)


# Writing


@contextmanager
def lock_predictions(path: str | Path) -> Iterator[None]:
    """Locks the predictions in the folder of `path`, so that a file and its record come from the same run. Continues
    without the lock if the file system has none.
    """
    folder = record_path(path).parent
    descriptor = None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try_lock(descriptor, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def free_output_path(options: Options, split: str, sentences: Sequence[str]) -> tuple[str, str | None]:
    """The path for the predictions of a split, and a warning if it is not the path of the options. Another run may have
    written predictions for other data to the default path since this run started.
    """
    path = getattr(options, f"{split}_out")
    try:
        check_default_output(options, split, sentences)
        return path, None
    except ValueError:
        folder, name = os.path.split(path)
        free = (os.path.join(folder, f"{number}-{name}") for number in count(2))
        chosen = next(one for one in free if not os.path.exists(one))
        return chosen, f"another run has written predictions for other data to {path}; these go to {chosen}"


def write_with_record(
    options: Options, origin: Origin, split: str, texts: Sequence[str], write: Callable[[str], None], **results: Any
) -> None:
    """Writes the predictions of a split with `write`, and their record. texts: the texts of the rows."""
    path = getattr(options, f"{split}_out")
    with lock_predictions(path):
        path, moved = free_output_path(options, split, texts)
        write(path)
        warn(origin.write_record(path, split, **results))
    warn(moved)


# Default outputs


def check_default_output(options: Options, split: str, sentences: Sequence[str]) -> None:
    """Raises ValueError if the default output (--dev_out or --test_out was not typed) is an existing file that holds
    predictions for other sentences, or no predictions.
    """
    option = f"{split}_out"
    name = getattr(options, option)
    if name is None or option in options.typed or options.plan or not Path(name).is_file():
        return
    path = Path(name)
    advice = f"name another file with --{option}, or move this file"
    if path.stem.endswith("-output") and path.suffix in (".csv", ".jsonl"):  # named after the data
        check_made_from(path, source(options, split), advice)
        return
    try:
        content = path.read_bytes()
        held = sentences_in(path.suffix, content) if content.strip() else None
    except OSError as error:
        raise ValueError(f"{path} already exists and cannot be read ({error.strerror}); {advice}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} already exists and holds no predictions; {advice}") from error
    if held is not None and not same_sentences(held, sentences):
        record = find_record(path.parent, path.name, content)
        whose = f" of {record['data']}" if record is not None and record.get("data") else ""
        raise ValueError(
            f"{path} holds predictions for {len(held)} rows{whose}, not for the {len(sentences)} of "
            f"{getattr(options, split)}; {advice}"
        )


def check_made_from(path: Path, data: str, advice: str) -> None:
    """Raises ValueError if an existing file was not made from the rows of `data`, or was changed since."""
    record = find_record(path.parent, path.name, path.read_bytes())
    if record is None or not _same_path(record.get("data"), data):
        whose = f"predictions for {record['data']}" if record and record.get("data") else "no predictions as written"
        raise ValueError(f"{path} already exists and holds {whose}; {advice}")


def _same_path(one: str | None, other: str) -> bool:
    return one is not None and Path(path_and_fold(one)[0]).resolve() == Path(path_and_fold(other)[0]).resolve()


def sentences_in(suffix: str, content: bytes) -> list[str]:
    """The sentences of a prediction file, or the prompts of a .jsonl file of answers. Raises ValueError, LookupError or
    TypeError for other content.
    """
    lines = content.decode("utf-8").rstrip("\r\n").split("\n")
    if suffix == ".jsonl":
        return [json.loads(line)["prompt"] for line in lines]
    parts = [line.partition(" ||| ") for line in lines]
    if not all(separator for _, separator, _ in parts):
        raise ValueError("a line without a separator")
    return [sentence.strip() for _, _, sentence in parts]


def same_sentences(held: Sequence[str], sentences: Iterable[str]) -> bool:
    """Whether the sentences `held` in a file are `sentences`, in the same order."""
    wanted = list(sentences)
    return len(held) == len(wanted) and all(
        one == other or one.startswith(other + PROMPT) for one, other in zip(held, wanted, strict=True)
    )
