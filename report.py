"""report: runs gathered into one page of HTML that needs nothing else: scores over seeds, curves, confusion matrices,
samples. It reads what the runs left (run_directory.py); what is damaged or missing gets a line, and the rest is shown.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeGuard

from tqdm import tqdm

from environment import check_alone, report
from html_page import Point, chart, colour, document, shaded, table, text, thinned
from option_table import DEFAULT_PRESET, MAY_DIFFER, OPTION_DEFAULTS, OUTPUT_ENDINGS, RUNS, used_by
from options import parse_options

Matrix = tuple[list[str], list[list[int]]]  # class names; for each true class, how often each was predicted

MOST_SAMPLES = 6  # of what one run wrote
NONE = "–"  # in the place of a score that there is not
# What stands at the head of a group anyway, or is no setting.
NOT_SETTINGS = {*MAY_DIFFER, "option", "seed", "train", "dev", "test", "label_names", "corpus", "pretrained_model_path"}
NOT_SETTINGS |= {"continued", "processes", "tokenizer", "out_dtype"}


@dataclass
class Run:
    """What one run's folder holds, as far as it can be read; `problems` says what could not, `missing` which matrices
    there are not, and why.
    """

    path: Path
    name: str
    options: dict[str, Any]  # empty if they could not be read
    losses: list[Point]  # (step, training loss)
    scores: list[dict[str, Any]]  # a line of the metrics for each epoch
    seconds: float  # of training
    log: str
    problems: list[str]
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


def read_run(path: Path, name: str) -> Run:
    """What is in a run's folder; raises nothing for what is damaged or missing."""
    problems = []
    options: dict[str, Any] = {}
    try:
        saved = json.loads((path / "options.json").read_bytes())["options"]
        if not isinstance(saved["option"], str) or not isinstance(saved.get("corpus"), list | None):
            raise TypeError
        # An older run lacks the options that came later: it had their defaults.
        options = vars(parse_options([], saved)[0])
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
        else:
            bad += 1
    if bad:
        problems.append(f"{bad} line{'s' * (bad != 1)} of metrics.jsonl, damaged or without a number, left out")
    log = "\n".join(read_lines(path / "log.txt", problems)) if (path / "log.txt").exists() else ""
    if options and not scores:
        problems.append("no epoch has ended")
    run = Run(path, name, options, losses, scores, seconds, log, problems)
    if options and options["option"] in OUTPUT_ENDINGS:
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
    """The same from the predictions written for a split. Raises ValueError or OSError, which says why, if they or the
    data are gone, or are not the run's.
    """
    from dataset import has_gold_labels, read_label_names, read_rows

    folder = started_in(run)
    paths = {name: folder / str(run.options[name]) for name in (f"{split}_out", split, "label_names")}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there")
    names = read_label_names(paths["label_names"])
    predicted, gold = read_rows(paths[f"{split}_out"], names), read_rows(paths[split], names)
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
    """What the model wrote after a judgement, as its log has it: (epoch, text), at most MOST_SAMPLES evenly spread, the
    first and the last among them.
    """
    found = dict(re.findall(r"^epoch ([0-9]{1,9}): [^\n]*\n {4}([^\n]*)", run.log, flags=re.M))
    told = sorted(found.items(), key=lambda one: int(one[0]))
    kept = {round(i * (len(told) - 1) / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)} if told else set()
    return [told[i] for i in sorted(kept)]


# Grouping


def group_key(run: Run) -> str:
    """The same for runs that differ in nothing but the seed, and in what changes no number. A model made for each seed
    (random-1 for seed 1) counts as one.
    """
    if not run.options:
        return str(run.path)
    settings = {name: value for name, value in run.options.items() if name not in (*MAY_DIFFER, "seed")}
    settings["tokenizer"] = Path(str(settings["tokenizer"])).name  # a model has one, wherever it lies
    settings["pretrained_model_path"] = str(Path(str(settings["pretrained_model_path"])).parent / model_name(run))
    return json.dumps(settings, sort_keys=True, default=str)


def model_name(run: Run) -> str:
    """The name of the model that the run began from."""
    if run.options["option"] == "pretrain" and not run.options["continued"]:
        return f"new, {run.options['preset'] or DEFAULT_PRESET}"
    name = Path(str(run.options["pretrained_model_path"])).stem
    return re.sub(rf"(?<![^-_.]){re.escape(str(run.options['seed']))}(?![^-_.])", "{seed}", name)


def data_name(run: Run) -> str:
    if run.options["option"] == "pretrain":
        return " ".join(os.path.basename(str(text)) for text in run.options["corpus"] or [])
    return Path(str(run.options["train"])).stem.removesuffix("-train")


def head_of(run: Run) -> str:
    """What was done, with which data and model; the run's name where that is not known."""
    return f"{run.options['option']} {data_name(run)}, {model_name(run)}" if run.options else run.name


def setting(value: object) -> str:
    """A value of an option as it would be typed."""
    if isinstance(value, list):
        return " ".join(map(setting, value))
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def settings(run: Run) -> dict[str, str]:
    """The options that matter to what was learnt and differ from their defaults."""
    option, users = run.options.get("option", ""), used_by()
    defaults = vars(parse_options([])[0]) | OPTION_DEFAULTS.get(option, {})
    return {
        name: setting(value)
        for name, value in run.options.items()
        if name not in NOT_SETTINGS and value != defaults.get(name) and option in users.get(name, ())
    }


def grouped(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The runs that differ in seed only, together, under a name that tells each group from the others."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(group_key(run), []).append(run)
    heads: dict[str, list[dict[str, str]]] = {}  # what the groups under one head are set to
    for members in groups.values():
        members.sort(key=lambda run: (str(run.options.get("seed")).zfill(20), run.name))
        heads.setdefault(head_of(members[0]), []).append(settings(members[0]))
    named = []
    for members in groups.values():
        run = members[0]
        every = heads[head_of(run)]
        varying = [
            f"{name} {value}"
            for name, value in settings(run).items()
            if not all(one.get(name) == value for one in every)
        ]
        named.append((", ".join([head_of(run), *varying]), members))
    twice = Counter(name for name, _ in named)
    return [(name if twice[name] == 1 else f"{name} ({members[0].name})", members) for name, members in named]


# The page


def spread(found: Sequence[object], runs: int) -> str:
    """Mean and standard deviation (of a sample: n - 1) of the numbers among `found`, and of how many of the `runs` they
    are if not of all; the value alone if there is one, a dash if there is none.
    """
    values = [value for value in found if is_number(value)]
    if not values:
        return NONE
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    some = f", {len(values)} of {runs} runs" if len(values) < runs else ""
    return f"{statistics.fmean(values):.3f}{deviation}{some}"


def decimals(value: object) -> str:
    return f"{value:.3f}" if is_number(value) else NONE


def score_tables(groups: Sequence[tuple[str, list[Run]]]) -> str:
    """A line for each group: what its runs reach, over the seeds."""
    labels, texts, answers = [], [], []
    for i, (name, members) in enumerate(groups):
        best = [run.best() for run in members]
        seeds = ", ".join(str(run.options["seed"]) for run in members if run.options)
        link = f'<a href="#g{i}">{text(name)}</a> <div class="quiet">seed {text(seeds or "unknown")}</div>'
        dev, bits, exact, f1 = (
            spread([line.get(score) for line in best], len(members))
            for score in ("dev_accuracy", "bits_per_byte", "dev_exact_match", "dev_f1")
        )
        if dev != NONE:
            test = [accuracy(run.matrices["test"]) for run in members if "test" in run.matrices]
            labels.append((name, [link, dev, spread(test, len(members))]))
        elif bits != NONE:
            texts.append((name, [link, bits]))
        elif f1 != NONE:
            answers.append((name, [link, exact, f1]))
    note = (
        "<p>Mean over the seeds, in brackets the standard deviation (n − 1). Of each run, the epoch that it keeps.</p>"
    )
    parts = []
    for title, heads, rows in (
        ("Accuracy", ["dev", "test"], labels),
        ("Bits per byte", ["held out"], texts),
        ("Answers", ["dev, exact match", "dev, F1"], answers),
    ):
        if rows:
            lines = [row for _, row in sorted(rows)]
            parts.append(f"<h2>{title}</h2>{note}{table(['runs that differ in their seeds only', *heads], lines)}")
    return "".join(parts)


def run_table(members: Sequence[Run]) -> str:
    """A line for each run of a group."""
    labelled = False
    if any(run.curve("bits_per_byte") for run in members):
        scores = {"bits/byte": "bits_per_byte"}
    elif any(run.curve("dev_loss") for run in members):
        scores = {"exact match": "dev_exact_match", "F1": "dev_f1", "dev loss": "dev_loss"}
    else:
        labelled, scores = True, {"dev": "dev_accuracy", "macro-F1": "dev_macro_f1"}
    rows = []
    for run in members:
        best = run.best()
        epochs = f"{text(best['epoch'])} of {len(run.scores)}" if "epoch" in best else f"– of {len(run.scores)}"
        test = [decimals(accuracy(run.matrices["test"]) if "test" in run.matrices else None)] if labelled else []
        numbers = [*(decimals(best.get(name)) for name in scores.values()), *test, f"{run.seconds / 60:.1f}"]
        rows.append([text(run.options.get("seed", "?")), epochs, *numbers, text(run.name)])
    head = ["seed", "best epoch", *scores, *(["test"] if labelled else []), "minutes", "run"]
    return table(head, rows, words=[len(head) - 1])


def figures(members: Sequence[Run]) -> str:
    """The curves of a group's runs: loss by step, and what they are judged by."""
    seeds = [str(run.options.get("seed")) for run in members]
    pairs = zip(seeds, members, strict=True)
    names = [f"seed {seed}" if len(set(seeds)) == len(seeds) > 1 else run.name for seed, run in pairs]
    named = [(i, name, run) for i, (name, run) in enumerate(zip(names, members, strict=True))]
    thin = [thinned(run.losses) for run in members]
    size = max(size for _, size in thin)
    caption = "Training loss" + (f", means of {size} steps" if size > 1 else "")
    losses = [(name, thin[i][0], colour(i)) for i, name, _ in named]
    dev = [(f"{name}, dev", run.curve("dev_accuracy"), colour(i)) for i, name, run in named]
    seen = [(f"{name}, training", run.curve("running_train_accuracy"), colour(i, True)) for i, name, run in named]
    bits = [(name, run.curve("bits_per_byte"), colour(i)) for i, name, run in named]
    if len(members) == 1:  # room for each text
        texts = {key: None for line in members[0].scores for key in line if key.startswith("bits_per_byte_")}
        bits = [(f"mean of {len(texts)} texts", members[0].curve("bits_per_byte"), colour(0))] + [
            (key.removeprefix("bits_per_byte_"), members[0].curve(key), colour(i)) for i, key in enumerate(texts, 1)
        ]
    answers = [(f"{name}, F1", run.curve("dev_f1"), colour(i)) for i, name, run in named]
    answers += [(f"{name}, exact match", run.curve("dev_exact_match"), colour(i, True)) for i, name, run in named]
    drawn = [
        chart(caption, "step", losses, dots=False),
        chart("Accuracy after each epoch", "step", [*dev, *seen]) if any(points for _, points, _ in dev) else "",
        chart("Held-out bits per byte", "step", bits),
        chart("Answers to dev after each epoch", "step", answers),
        chart(
            "Loss on the answers of dev", "step", [(name, run.curve("dev_loss"), colour(i)) for i, name, run in named]
        ),
    ]
    return f'<div class="grid">{"".join(drawn)}</div>'


def group_section(number: int, name: str, members: Sequence[Run]) -> str:
    """Everything about runs that differ in seed only."""
    parts = [f'<section id="g{number}"><h2>{text(name)}</h2>']
    if chosen := settings(members[0]):
        parts.append(f'<p class="quiet">{text(", ".join(" ".join(item) for item in chosen.items()))}</p>')
    parts += [run_table(members), figures(members)]
    found = [(run, split, matrix) for run in members for split, matrix in run.matrices.items()]
    if found:
        drawn = (
            shaded(f"{split}, seed {run.options['seed']}: accuracy {accuracy(matrix):.3f}", *matrix)
            for run, split, matrix in found
        )
        parts.append("<h3>Confusion matrices</h3><p>A line for each true class, a column for each predicted one.</p>")
        parts.append(f'<div class="grid">{"".join(drawn)}</div>')
    missing = Counter(reason for run in members for reason in run.missing)
    if missing:
        lines = "".join(
            f"<li>{text(reason)} ({count} of {len(members)} runs)</li>" for reason, count in missing.items()
        )
        parts.append(f'<p class="quiet">No confusion matrix of</p><ul class="quiet">{lines}</ul>')
    for run in members:
        if told := samples(run):
            parts.append(f"<h3>What {text(run.name)} wrote</h3>")
            parts += [f"<blockquote><b>epoch {epoch}</b> {text(sample)}</blockquote>" for epoch, sample in told]
    return "".join(parts) + "</section>"


def between_section(path: str, head: Sequence[str], rows: Sequence[Sequence[float | None]]) -> str:
    """Accuracy between two sets of weights, by the share of the second."""
    lines = []
    for i, name in enumerate(head[1:], start=1):
        points = [(x, y) for x, y in ((row[0], row[i]) for row in rows) if x is not None and y is not None]
        lines.append((name, points, colour(i - 1)))
    numbers = table(head, [[f"{row[0]:g}", *map(decimals, row[1:])] for row in rows], words=[])
    return f'<h3>{text(path)}</h3><div class="grid">{chart("Accuracy by alpha", "alpha", lines)}{numbers}</div>'


def page(runs: Sequence[Run], curves: Sequence[tuple[str, list[str], list[list[float | None]]]] = ()) -> str:
    """The page: scores over seeds, curves between weights, then each group of runs."""
    groups = sorted(grouped([run for run in runs if run.options or run.losses or run.scores]))
    title = f"{len(runs)} run{'s' * (len(runs) != 1)}"
    parts = [f'<h1>Runs</h1><p class="quiet">{title}, {date.today().isoformat()}</p>']
    if problems := [f"<li>{text(run.name)}: {text('; '.join(run.problems))}</li>" for run in runs if run.problems]:
        parts.append(f"<h2>What could not be read</h2><ul>{''.join(problems)}</ul>")
    parts.append(score_tables(groups))
    if curves:
        parts.append("<h2>Between two sets of weights</h2>")
        parts.append("<p>Accuracy of (1 − alpha) times the first and alpha times the second.</p>")
        parts += [between_section(*one) for one in curves]
    parts += [group_section(i, name, members) for i, (name, members) in enumerate(groups)]
    return document(title, parts)


def write_report(args: argparse.Namespace) -> None:
    """report: writes the page."""
    from files import atomic_file

    check_alone(args)
    curves = [(path, *read_curves(path)) for path in args.curves]
    paths = find_runs(args.runs)
    root = os.path.commonpath([path.parent for path in paths])
    runs = [
        read_run(path, os.path.relpath(path, root))
        for path in tqdm(paths, desc="reading", unit="run", leave=False, disable=None)
    ]
    with atomic_file(args.report_out) as file:
        file.write(page(runs, curves))
    damaged = sum(bool(run.problems) for run in runs)
    said = f", {damaged} of them damaged or half written" if damaged else ""
    report(f"wrote {args.report_out}: {len(runs)} run{'s' * (len(runs) != 1)}{said}")
