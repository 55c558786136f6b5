"""The folders of runs (training/run_directory.py), read for the report: what is damaged or missing gets a line, and
the rest is kept.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from minillama.cli.charts import Point
from minillama.cli.options import Command, parse_options
from minillama.cli.session import active_options
from minillama.formats.names import RUNS

Matrix = tuple[list[str], list[list[int]]]  # class names; for each true class, how often each was predicted
MOST_SAMPLES = 6  # of what one run wrote


@dataclass
class Run:
    """The content of one run's folder, as far as it can be read; `problems` says what could not, `missing` which
    matrices there are not, and why.
    """

    path: Path
    name: str
    options: dict[str, Any]  # empty if they could not be read
    losses: list[Point]  # (step, training loss)
    scores: list[dict[str, Any]]  # a line of the metrics for each epoch
    seconds: float  # of training
    log: str
    problems: list[str]
    defaults: dict[str, Any] = field(default_factory=dict)  # of its command's options
    relevant: set[str] = field(default_factory=set)  # options that have an effect on its command
    matrices: dict[str, Matrix] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def curve(self, name: str) -> list[Point]:
        """A score by the step at which it was taken."""
        return [(line["step"], line[name]) for line in self.scores if is_number(line.get(name))]

    def best(self) -> dict[str, Any]:
        """The scores of the epoch that the run keeps: the first of the best; empty if there are none."""
        for name, sign in (("dev_accuracy", 1), ("bits_per_byte", -1), ("dev_f1", 1), ("dev_loss", -1)):
            if scored := [line for line in self.scores if is_number(line.get(name))]:
                return max(scored, key=lambda line: sign * line[name])
        return {}


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that leaves room to reckon with: finite, as are sums and squares of a few of its size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100


# Reading


def find_runs(folders: Sequence[str]) -> list[Path]:
    """The folders of runs: each of `folders` that is one, or is empty, and those below each that is not. Raises
    ValueError or FileNotFoundError if one is no folder, or there is no run at all.
    """
    found: dict[Path, None] = {}
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "is not there"
            raise FileNotFoundError(f"--runs {name} {what}; give folders of runs (default: all under {RUNS}/)")
        below = {path.parent for file in ("options.json", "metrics.jsonl") for path in folder.rglob(file)}
        if folder in below or not any(folder.iterdir()):
            below = {folder}
        found |= dict.fromkeys(path.resolve() for path in sorted(below))
    if not found:
        raise ValueError(
            f"there is no run under {', '.join(folders)} (no options.json); train one, or give its folder with --runs"
        )
    return list(found)


def read_run(path: Path, name: str, commands: Sequence[Command]) -> Run:
    """Reads a run's folder; raises nothing for what is damaged or missing."""
    problems = []
    options: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    relevant: set[str] = set()
    try:
        saved = json.loads((path / "options.json").read_bytes())["options"]
        if not isinstance(saved["option"], str) or not isinstance(saved.get("corpus"), list | None):
            raise TypeError
        # An older run lacks the options that came later: it had their defaults.
        resolved = parse_options(commands, [], active_options(saved))
        options, relevant = resolved.values(), resolved.command.keys
        defaults = parse_options(commands, ["--option", resolved.option]).values()
    except FileNotFoundError:
        problems.append("no options.json")
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        problems.append("options.json is damaged")
    losses, scores, seconds, bad = [], [], 0.0, 0
    for line in read_lines(path / "metrics.jsonl", problems):
        try:
            values = json.loads(line)
            step = values["step"]
        except (ValueError, LookupError, TypeError, RecursionError):
            values, step = {}, None
        if is_number(step) and is_number(values.get("loss")):
            losses.append((step, values["loss"]))
            seconds += values["seconds"] if is_number(values.get("seconds")) else 0.0
        elif is_number(step) and "train_loss" in values:
            scores.append(values)
        elif is_number(step) and values.get("final") is True:
            pass  # the scores of the best epoch's model once more, and those of test
        else:
            bad += 1
    if bad:
        problems.append(f"{bad} line{'s' * (bad != 1)} of metrics.jsonl, damaged or without a number, left out")
    log = "\n".join(read_lines(path / "log.txt", problems)) if (path / "log.txt").exists() else ""
    if options and not scores:
        problems.append("no epoch has ended")
    run = Run(path, name, options, losses, scores, seconds, log, problems, defaults, relevant)
    if options and options["option"] in ("finetune", "lora"):
        add_matrices(run)
    return run


def read_lines(path: Path, problems: list[str]) -> list[str]:
    """The lines of a file; where it cannot be read, none, and a problem more."""
    try:
        return path.read_bytes().decode("utf-8", "replace").removesuffix("\n").split("\n")
    except FileNotFoundError:
        problems.append(f"no {path.name}")
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
        return []


def read_curves(path: str) -> tuple[list[str], list[list[float | None]]]:
    """The head and the rows of a table: alpha, then an accuracy for each data set, None where the field is empty.
    Raises ValueError for anything else, naming the row, and for a file that cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head, *rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ValueError(
            f"--curves {path} cannot be read ({error.strerror}); give the CSV that --option wise_ft wrote"
        ) from error
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"--curves {path} is no table of comma-separated values with a head") from error
    if head[0] != "alpha" or len(head) < 2 or not rows:
        raise ValueError(
            f"--curves {path}: the head must be alpha and a column for each data set, and rows must follow"
        )
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


def started_in(run: Run) -> Path:
    """The folder that the run was started in, to which the paths among its options are relative."""
    folder = Path(str(run.options.get("run_dir")))
    parts = len(folder.parts)
    if not folder.is_absolute() and run.path.parts[-parts:] == folder.parts:
        return run.path.parents[parts - 1]
    return Path.cwd()


def add_matrices(run: Run) -> None:
    """The confusion matrices of dev and test: as the run's log has them, else made from the predictions, if these and
    the data are still there and are this run's.
    """
    run.matrices = logged_matrices(run.log)
    for split in ("dev", "test"):
        try:
            if re.search(rf"^{split} took ", run.log, flags=re.M):
                if split not in run.matrices:
                    raise ValueError("no gold labels")
            elif split == "test" and run.missing:
                raise ValueError("nor are those of test certain to be this run's")
            else:
                run.matrices[split] = predicted_matrix(run, split)
        except (ValueError, OSError) as error:
            run.missing.append(f"{split}: {error}")


def logged_matrices(log: str) -> dict[str, Matrix]:
    """The confusion matrices that evaluation.describe_classes wrote into a log, the last of each split."""
    found = {}
    for split, body in re.findall(r"^(dev|test) took [^\n]*\n(.*?)(?=^(?:dev|test) took |\Z)", log, flags=re.M | re.S):
        lines = body.partition("\nconfusion matrix (")[2].partition("\n\n")[0].split("\n")[1:]
        lines = [line for line in lines if line.strip()]
        fields = [line.split(None, len(lines)) for line in lines]
        counts = [n for row in fields for n in row[:-1]]
        whole = all(len(row) == len(fields) + 1 for row in fields)
        # int refuses thousands of digits; and none but zeros have no accuracy.
        if whole and all(re.fullmatch("[0-9]{1,18}", n) for n in counts) and any(n.strip("0") for n in counts):
            found[split] = [row[-1] for row in fields], [[int(n) for n in row[:-1]] for row in fields]
    return found


def predicted_matrix(run: Run, split: str) -> Matrix:
    """The confusion matrix from the predictions written for a split. Raises ValueError or OSError, which says why, if
    they or the data are gone, or are not the run's.
    """
    from minillama.text.labelled import class_names, has_gold_labels, read_labels, read_rows

    folder = started_in(run)
    paths = {name: folder / str(run.options[name]) for name in (f"{split}_out", split, "label_names")}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there")
    labels = read_labels(paths["label_names"])
    names = class_names(labels)
    predicted, gold = read_rows(paths[f"{split}_out"], labels), read_rows(paths[split], labels)
    if [row.sentence for row in predicted] != [row.sentence for row in gold]:
        raise ValueError(f"{paths[f'{split}_out']} has not the sentences of {paths[split]}")
    if not has_gold_labels(gold):
        raise ValueError("no gold labels")
    counts = Counter((true.label, guess.label) for true, guess in zip(gold, predicted, strict=True))
    classes = range(len(names))
    matrix = names, [[counts[true, guess] for guess in classes] for true in classes]
    if split == "dev" and not math.isclose(accuracy(matrix), run.best().get("dev_accuracy", -1.0), abs_tol=1e-6):
        raise ValueError(f"{paths['dev_out']} is of another run: its accuracy is {accuracy(matrix):.3f}")
    return matrix


def accuracy(matrix: Matrix) -> float:
    _, rows = matrix
    return sum(row[i] for i, row in enumerate(rows)) / sum(map(sum, rows))


def samples(run: Run) -> list[tuple[str, str]]:
    """The samples in a run's log, written after each judgement: (epoch, text), at most MOST_SAMPLES evenly spread, the
    first and the last among them.
    """
    found = dict(re.findall(r"^epoch ([0-9]{1,9}): [^\n]*\n {4}([^\n]*)", run.log, flags=re.M))
    told = sorted(found.items(), key=lambda one: int(one[0]))
    kept = {round(i * (len(told) - 1) / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)} if told else set()
    return [told[i] for i in sorted(kept)]
