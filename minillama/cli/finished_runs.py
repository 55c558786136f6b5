"""Reading the folders of runs (training/run_directory.py) for the report. Damaged parts are noted and skipped."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from minillama.cli.charts import Point
from minillama.cli.options import Command, Options, all_flags, parse_options
from minillama.cli.session import active_options
from minillama.formats.names import RUNS

Matrix = tuple[list[str], list[list[int]]]  # class names; counts by true class, then predicted class
MOST_SAMPLES = 6  # per run
DAMAGE = (OSError, ValueError, LookupError, TypeError, RecursionError)  # errors from a file that should hold JSON


@dataclass
class Run:
    """The readable content of a run's folder; `problems` lists what could not be read."""

    path: Path
    name: str
    problems: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # empty if they could not be read
    defaults: dict[str, Any] = field(default_factory=dict)  # of the options that have an effect on the command
    command: str = ""  # what makes the run, as it would be typed
    losses: list[Point] = field(default_factory=list)  # (step, training loss)
    seconds: float = 0.0  # of training
    scores: list[dict[str, Any]] = field(default_factory=list)  # a line of the metrics for each epoch
    final: dict[str, Any] = field(default_factory=dict)  # the last line of the metrics; empty if the run did not finish

    def curve(self, name: str) -> list[Point]:
        """The points (step, score) of one score."""
        return [(line["step"], line[name]) for line in self.scores if is_number(line.get(name))]

    def best(self) -> dict[str, Any]:
        """The scores of the best epoch (the earliest of equal ones) and the accuracy on test; empty without scores."""
        for name, sign in (("dev_accuracy", 1), ("bits_per_byte", -1), ("dev_f1", 1), ("dev_loss", -1)):
            if scored := [line for line in self.scores if is_number(line.get(name))]:
                best = max(scored, key=lambda line: sign * line[name])
                return best | {"test_accuracy": self.final.get("test_accuracy")}
        return {}

    def matrices(self) -> dict[str, Matrix]:
        """The confusion matrices, by split."""
        found = {split: self.final.get(f"{split}_confusion") for split in ("dev", "test")}
        return {split: (self.final["classes"], matrix) for split, matrix in found.items() if matrix is not None}

    def missing_matrices(self) -> list[str]:
        """The missing confusion matrices of a classifier's run, each with the reason."""
        if self.options.get("option") not in ("finetune", "lora"):
            return []
        if "classes" not in self.final:
            return ["dev and test: the run has not finished, or an older version made it"]
        return [f"{split}: no gold labels" for split in self.judged() if split not in self.matrices()]

    def judged(self) -> list[str]:
        """The splits that the run predicted."""
        return [split for split in ("dev", "test") if self.options.get(split)]

    def samples(self) -> list[tuple[object, str]]:
        """(epoch, text) of at most MOST_SAMPLES evenly spaced samples."""
        import numpy

        samples = [(line.get("epoch"), line["sample"]) for line in self.scores if "sample" in line]
        kept = numpy.linspace(0, len(samples) - 1, min(len(samples), MOST_SAMPLES)).round().astype(int)
        return [samples[i] for i in kept]


def is_number(value: object) -> TypeGuard[float]:
    """Whether the value is a number below 1e100, so that sums and squares stay finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


def find_runs(folders: Sequence[str]) -> list[Path]:
    """The run folders among and below `folders`; an empty folder counts as a run. Raises FileNotFoundError if a path is
    no folder, and ValueError if there is no run.
    """
    found: dict[Path, None] = {}
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(f"--runs {name} {what}; give folders of runs (default: all under {RUNS}/)")
        below = {path.parent for file in ("options.json", "metrics.jsonl") for path in folder.rglob(file)}
        if folder in below or not any(folder.iterdir()):
            below = {folder}
        found |= dict.fromkeys(path.resolve() for path in sorted(below))
    if not found:
        raise ValueError(
            f"there is no run under {', '.join(folders)} (no options.json); train one, or give a folder with --runs"
        )
    return list(found)


def read_run(path: Path, name: str, commands: Sequence[Command]) -> Run:
    """Reads a run's folder. Damaged and missing files are noted in `problems` and raise nothing."""
    run = Run(path, name)
    try:
        saved = json.loads((path / "options.json").read_bytes())["options"]
        if not isinstance(saved["option"], str) or not isinstance(saved.get("corpus"), list | None):
            raise TypeError
        # Options that an older version lacked get their defaults.
        options = parse_options(commands, [], active_options(saved))
        run.options, run.defaults = options.values(), options.command.all_defaults
        run.command = command_line(options)
    except FileNotFoundError:
        run.problems.append("no options.json")
    except DAMAGE:
        run.problems.append("options.json is damaged")
    read_metrics(run)
    if run.options and not run.scores:
        run.problems.append("no epoch has ended")
    return run


def setting(value: object) -> str:
    """The value of an option as text, in the form in which users type it."""
    if isinstance(value, list):
        return " ".join(map(setting, value))
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def command_line(options: Options) -> str:
    """The command with these options: those that differ from the command's defaults, as they would be typed."""
    defaults = options.command.all_defaults
    words = ["python", "run_llama.py", "--option", options.option]
    for name, flag in all_flags([options.command]).items():
        value = getattr(options, name)
        if (
            name == "option"
            or value is None
            or value is False
            or value == []
            or value == defaults.get(name, flag.default)
        ):
            continue
        words.append(flag.name)
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def read_metrics(run: Run) -> None:
    """Adds the metrics of each step, of each epoch and of the end to `run`."""
    try:
        lines = (run.path / "metrics.jsonl").read_bytes().decode("utf-8", "replace").removesuffix("\n").split("\n")
    except FileNotFoundError:
        run.problems.append("no metrics.jsonl")
        return
    except OSError as error:
        run.problems.append(f"metrics.jsonl cannot be read ({error.strerror})")
        return
    bad = 0
    for line in lines:
        try:
            values = json.loads(line)
            if not is_number(values["step"]):
                raise ValueError("a line without a step")
            if is_number(values.get("loss")):
                run.losses.append((values["step"], values["loss"]))
                run.seconds += values["seconds"] if is_number(values.get("seconds")) else 0.0
            elif "train_loss" in values:
                run.scores.append(values)
            elif values.get("final") is True:
                check_matrices(values)
                run.final = values
            else:
                raise ValueError("a line of another kind")
        except DAMAGE:
            bad += 1
    if bad:
        run.problems.append(f"{bad} line{'s' * (bad != 1)} of metrics.jsonl skipped: damaged or without a number")


def check_matrices(final: dict[str, Any]) -> None:
    """Raises ValueError or TypeError unless each confusion matrix of `final` is a square table of integers."""
    import numpy

    for name, matrix in final.items():
        if name.endswith("_confusion") and matrix is not None:
            counts, classes = numpy.array(matrix), len(final["classes"])
            if counts.shape != (classes, classes) or counts.dtype.kind != "i":
                raise ValueError(f"{name} is not a table of counts")


def read_curves(path: str) -> tuple[list[str], list[list[float | None]]]:
    """The header and the rows of a table: alpha, then an accuracy for each data set, None if the field is empty.
    Raises ValueError, with the row number, for other content, and for an unreadable file.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head, *rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ValueError(
            f"--curves {path} cannot be read ({error.strerror}); give the CSV that --option wise_ft wrote"
        ) from error
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"--curves {path} is not a CSV table with a header") from error
    if head[0] != "alpha" or len(head) < 2 or not rows:
        raise ValueError(f"--curves {path}: it needs a header (alpha, then a column for each data set), and rows below")
    table = []
    for number, row in enumerate(rows, start=2):
        try:
            values = [float(text) if text.strip() else None for text in row]
        except ValueError:
            values = []
        if len(values) != len(head) or values[0] is None or not all(is_number(v) for v in values if v is not None):
            raise ValueError(f"--curves {path}, row {number}: {', '.join(row)[:60]!r}; it must be {len(head)} numbers")
        table.append(values)
    return head, sorted(table, key=lambda row: row[0] or 0.0)
