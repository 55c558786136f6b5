"""--option report: one self-contained HTML page about runs: scores, curves, confusion matrices and samples."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

from minillama.cli.charts import Chart, Line, Matrix, colour, downsample, with_equal_axes
from minillama.cli.finished_runs import Run, find_runs, is_number, read_curves, read_run, setting
from minillama.cli.flags import DEFAULT_PRESET
from minillama.cli.header import report
from minillama.cli.loading import check_alone
from minillama.cli.new_model import NEW_MODEL
from minillama.cli.options import Command, Flag, Group, Options, OwnFlag
from minillama.cli.pages import NONE, Table, decimals, render, write_page
from minillama.cli.plots import Plot, write_plots
from minillama.cli.session import RESUME_MAY_CHANGE
from minillama.formats.names import RUNS, path_and_fold, without_ending

Curve = tuple[str, list[str], list[list[float | None]]]  # path, header and rows, see `read_curves`
# Options that do not count as settings, or are part of a group's heading.
NOT_SETTINGS = {*RESUME_MAY_CHANGE, "option", "seed", "train", "dev", "test", "columns", "label_names", "corpus"}
NOT_SETTINGS |= {"pretrained_model_path", "continued", "processes", "tokenizer", "out_dtype"}


# Grouping


def group_key(run: Run) -> str:
    """A key that is equal for runs that differ only in the seed and in options without effect on results. Models whose
    name contains the seed (random-1 for seed 1) count as one model.
    """
    if not run.options:
        return str(run.path)
    settings = {name: value for name, value in run.options.items() if name not in (*RESUME_MAY_CHANGE, "seed")}
    settings["tokenizer"] = Path(str(settings["tokenizer"])).name  # its folder does not matter
    settings["pretrained_model_path"] = str(Path(str(settings["pretrained_model_path"])).parent / model_name(run))
    return json.dumps(settings, sort_keys=True, default=str)


def model_name(run: Run) -> str:
    """The name of the initial model of a run."""
    sized = any(run.options.get(flag.key) for flag in NEW_MODEL.flags)  # which only a new model can be
    if sized or (run.options["option"] == "pretrain" and not run.options["continued"]):
        return f"new, {run.options['preset'] or DEFAULT_PRESET}"
    name = Path(without_ending(str(run.options["pretrained_model_path"]))).name
    return re.sub(rf"(?<![^-_.]){re.escape(str(run.options['seed']))}(?![^-_.])", "{seed}", name)


def data_name(run: Run) -> str:
    if run.options["option"] == "pretrain":
        return " ".join(os.path.basename(str(text)) for text in run.options["corpus"] or [])
    return Path(without_ending(path_and_fold(str(run.options["train"]))[0])).name.removesuffix("-train")


def head_of(run: Run) -> str:
    """The heading of a run: its option, data and model, or its name if the options are unknown."""
    return f"{run.options['option']} {data_name(run)}, {model_name(run)}" if run.options else run.name


def settings(run: Run) -> dict[str, str]:
    """The training options of a run that differ from their defaults."""
    return {
        name: setting(value)
        for name, value in run.options.items()
        if name not in NOT_SETTINGS and name in run.defaults and value != run.defaults[name]
    }


def grouped(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Groups of runs that differ only in the seed, each with a unique name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(group_key(run), []).append(run)
    heads: dict[str, list[dict[str, str]]] = {}  # by heading: the settings of its groups
    for members in groups.values():
        members.sort(key=lambda run: (str(run.options.get("seed")).zfill(20), run.name))
        heads.setdefault(head_of(members[0]), []).append(settings(members[0]))
    named = []
    for members in groups.values():
        head = head_of(members[0])
        varying = [
            f"{name} {value}"
            for name, value in settings(members[0]).items()
            if not all(other.get(name) == value for other in heads[head])
        ]
        named.append((", ".join([head, *varying]), members))
    count = Counter(name for name, _ in named)
    return [(name if count[name] == 1 else f"{name} ({members[0].name})", members) for name, members in named]


# The page


def mean_and_deviation(members: Sequence[Run], score: str) -> str:
    """The mean of a score. Adds the standard deviation (n - 1) if several runs have the score, and their number if not
    all have it. A dash if none has it.
    """
    values = [value for run in members if is_number(value := run.best().get(score))]
    if not values:
        return NONE
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    some = f", {len(values)} of {len(members)} runs" if len(values) < len(members) else ""
    return f"{statistics.fmean(values):.3f}{deviation}{some}"


def score_tables(groups: Sequence[tuple[str, list[Run]]]) -> list[Table]:
    """A table for each kind of score, with a line for each group."""
    kinds = {
        "Accuracy": {"dev": "dev_accuracy", "test": "test_accuracy"},
        "Bits per byte": {"held out": "bits_per_byte"},
        "Answers": {"dev, exact match": "dev_exact_match", "dev, F1": "dev_f1"},
    }
    lines: dict[str, list[tuple[str, list[str], str, str]]] = {title: [] for title in kinds}
    for i, (name, members) in enumerate(groups):
        seeds = ", ".join(str(run.options["seed"]) for run in members if run.options)
        for title, judge in (("Accuracy", "dev_accuracy"), ("Bits per byte", "bits_per_byte"), ("Answers", "dev_f1")):
            if mean_and_deviation(members, judge) != NONE:
                scores = [mean_and_deviation(members, score) for score in kinds[title].values()]
                lines[title].append((name, [name, *scores], f"#g{i}", f"seed {seeds or 'unknown'}"))
                break
    tables = []
    for title, heads in kinds.items():
        if found := sorted(lines[title]):
            _, rows, links, notes = zip(*found, strict=True)
            tables.append(
                Table(title, ["runs that differ only in the seed", *heads], rows, links, notes).without_empty()
            )
    return tables


def run_table(members: Sequence[Run]) -> Table:
    """A table with a line for each run of a group."""
    if any(run.curve("bits_per_byte") for run in members):
        scores = {"bits/byte": "bits_per_byte"}
    elif any(run.curve("dev_loss") and not run.curve("dev_accuracy") for run in members):
        scores = {"exact match": "dev_exact_match", "F1": "dev_f1", "dev loss": "dev_loss"}
    else:
        scores = {"dev": "dev_accuracy", "macro-F1": "dev_macro_f1", "test": "test_accuracy"}
    rows = []
    for run in members:
        best = run.best()
        epochs = f"{best['epoch']} of {len(run.scores)}" if "epoch" in best else f"– of {len(run.scores)}"
        numbers = [decimals(best.get(name)) for name in scores.values()]
        rows.append([str(run.options.get("seed", "?")), epochs, *numbers, f"{run.seconds / 60:.1f}", run.name])
    head = ["seed", "best epoch", *scores, "minutes", "run"]
    return Table("", head, rows, words=[len(head) - 1]).without_empty()


def charts_of(members: Sequence[Run]) -> dict[str, Chart]:
    """Charts of a group's runs, by a short name: the loss of each step, and the scores of each epoch."""
    seeds = [str(run.options.get("seed")) for run in members]
    distinct = len(set(seeds)) == len(seeds) > 1
    names = [f"seed {seed}" if distinct else run.name for seed, run in zip(seeds, members, strict=True)]

    def curves(score: str, label: str = "", dashed: bool = False) -> list[Line]:
        """The curves of one score, one per run."""
        pairs = zip(names, members, strict=True)
        return [(name + label, run.curve(score), colour(i, dashed)) for i, (name, run) in enumerate(pairs)]

    thin = [downsample(run.losses) for run in members]
    size = max(size for _, size in thin)
    losses = [(name, points, colour(i)) for i, (name, (points, _)) in enumerate(zip(names, thin, strict=True))]
    dev, bits = curves("dev_accuracy", ", dev"), curves("bits_per_byte")
    if len(members) == 1:  # with one run, a curve for each text fits
        (run,) = members
        texts = list(dict.fromkeys(key for line in run.scores for key in line if key.startswith("bits_per_byte_")))
        bits = [(f"mean of {len(texts)} texts", run.curve("bits_per_byte"), colour(0))]
        bits += [(key.removeprefix("bits_per_byte_"), run.curve(key), colour(i)) for i, key in enumerate(texts, 1)]
    loss = Chart("Training loss" + (f", means of {size} steps" if size > 1 else ""), "step", losses, dots=False)
    charts = {"loss": loss}
    if any(points for _, points, _ in dev):
        seen = curves("running_train_accuracy", ", training", dashed=True)
        charts["accuracy"] = Chart("Accuracy after each epoch", "step", [*dev, *seen])
    answers = [*curves("dev_f1", ", F1"), *curves("dev_exact_match", ", exact match", dashed=True)]
    charts["bits per byte"] = Chart("Held-out bits per byte", "step", bits)
    charts["answers"] = Chart("Answers on dev after each epoch", "step", answers)
    charts["dev loss"] = Chart("Loss on dev after each epoch", "step", curves("dev_loss"))
    return charts


def matrices_of(members: Sequence[Run]) -> dict[str, Matrix]:
    """The confusion matrices of a group's runs, by a short name."""
    found = {}
    for run in members:
        for split, matrix in run.matrices().items():
            caption = f"{split}, seed {run.options.get('seed', '?')}: accuracy"
            caption += f" {decimals(run.final.get(f'{split}_accuracy'))}"
            found[f"confusion {split} {run.name}"] = Matrix(caption, *matrix)
    return found


class GroupSection(NamedTuple):
    """A group of runs on the page."""

    name: str
    settings: str
    table: Table
    charts: list[Chart]
    matrices: list[Matrix]
    missing: list[str]
    commands: list[str]
    samples: list[tuple[str, list[tuple[object, str]]]]  # by run: (epoch, text)


def group_sections(groups: Sequence[tuple[str, list[Run]]]) -> list[GroupSection]:
    """The section of each group. Charts of one kind have equal axes."""
    charts = [charts_of(members) for _, members in groups]
    for kind in {kind for some in charts for kind in some}:
        owners = [some for some in charts if kind in some and some[kind].drawn()]
        for some, chart in zip(owners, with_equal_axes([some[kind] for some in owners]), strict=True):
            some[kind] = chart
    sections = []
    for (name, members), some in zip(groups, charts, strict=True):
        missing = Counter(reason for run in members for reason in run.missing_matrices())
        sections.append(
            GroupSection(
                name=name,
                settings=", ".join(" ".join(item) for item in settings(members[0]).items()),
                table=run_table(members),
                charts=[chart for chart in some.values() if chart.drawn()],
                matrices=list(matrices_of(members).values()),
                missing=[f"{reason} ({count} of {len(members)} runs)" for reason, count in missing.items()],
                commands=[run.command for run in members if run.command],
                samples=[(run.name, texts) for run in members if (texts := run.samples())],
            )
        )
    return sections


def alpha_chart(head: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Chart:
    """Accuracy by alpha, the share of the second of two models."""
    lines = []
    for i, name in enumerate(head[1:], start=1):
        points = [(x, y) for x, y in ((row[0], row[i]) for row in rows) if x is not None and y is not None]
        lines.append((name, points, colour(i - 1)))
    return Chart("Accuracy by alpha", "alpha", lines)


class Mixture(NamedTuple):
    """A curve between two sets of weights on the page."""

    path: str
    chart: Chart
    table: Table
    chosen: str


def mixture(path: str, head: Sequence[str], rows: Sequence[Sequence[float | None]]) -> Mixture:
    """A chart and a table of accuracy by alpha, and the alpha that is best on the first set."""
    scored = [(row[1], row[0]) for row in rows if row[1] is not None and row[0] is not None]
    chosen = ""
    if scored:
        best, alpha = max(scored)  # of equal ones the largest alpha, as --option wise_ft chooses
        chosen = f"Best on {head[1]}: alpha {alpha:g}, with {best:.3f}."
    numbers = [[f"{row[0]:g}", *map(decimals, row[1:])] for row in rows]
    return Mixture(path, alpha_chart(head, rows), Table("", list(head), numbers, words=[]), chosen)


def all_plots(runs: Sequence[Run], curves: Sequence[Curve]) -> dict[tuple[str, str], Plot]:
    """All charts and confusion matrices of the page, by their titles and short names."""
    found: dict[tuple[str, str], Plot] = {}
    for name, members in groups_of(runs):
        found |= {(name, kind): one for kind, one in charts_of(members).items()}
        found |= {(name, kind): one for kind, one in matrices_of(members).items()}
    return found | {(without_ending(path), "alpha"): alpha_chart(head, rows) for path, head, rows in curves}


def groups_of(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The groups of the runs that could be read, by name."""
    return sorted(grouped([run for run in runs if run.options or run.losses or run.scores]))


def page(runs: Sequence[Run], curves: Sequence[Curve] = ()) -> str:
    """The whole page: problems, scores over seeds, curves between two models, and a section for each group."""
    groups = groups_of(runs)
    return render(
        "report.html",
        title=f"{len(runs)} run{'s' * (len(runs) != 1)}",
        today=date.today().isoformat(),
        problems=[f"{run.name}: {'; '.join(run.problems)}" for run in runs if run.problems],
        scores=score_tables(groups),
        mixtures=[mixture(*one) for one in curves],
        groups=group_sections(groups),
    )


def check(options: Options) -> None:
    if not options.report_out.endswith(".html"):
        raise ValueError(f"--report_out is {options.report_out}; its name must end in .html")
    if options.plots is not None and (not options.plots or Path(options.plots).is_file()):
        raise ValueError(f"--plots {options.plots or 'has no name'}: give a folder for the plots, new or existing")


def run(options: Options) -> None:
    """Reads the runs and writes the page."""
    from tqdm import tqdm

    check_alone(options)
    curves = [(path, *read_curves(path)) for path in options.curves]
    paths = find_runs(options.runs)
    root = os.path.commonpath([path.parent for path in paths])
    runs = [
        read_run(path, os.path.relpath(path, root), options.commands)
        for path in tqdm(paths, desc="reading", unit="run", leave=False, disable=None)
    ]
    write_page(options.report_out, page(runs, curves))
    damaged = sum(bool(run.problems) for run in runs)
    problems = f", {damaged} of them unfinished or damaged" if damaged else ""
    report(f"wrote {options.report_out}: {len(runs)} run{'s' * (len(runs) != 1)}{problems}")
    if options.plots is not None:
        report(write_plots(Path(options.plots), all_plots(runs, curves)))


COMMAND = Command(
    "report",
    "gather runs into one page with curves, tables and samples",
    (
        Group(
            "the page",
            (
                Flag(
                    "--runs DIR",
                    "folders of runs, or folders that contain runs",
                    str,
                    [RUNS],
                    default_text=RUNS,
                    nargs="+",
                ),
                Flag("--report_out FILE", "the page to write", str, "report.html"),
                OwnFlag(
                    "--plots DIR",
                    "also write each curve and confusion matrix as an SVG file into this folder, and as PNG if "
                    "matplotlib is installed",
                ),
                Flag(
                    "--curves FILE.csv",
                    "tables of accuracy between two sets of weights: a column alpha, then one per data set",
                    str,
                    [],
                    nargs="+",
                ),
            ),
        ),
    ),
    run,
    """
python run_llama.py --option report
python run_llama.py --option report --runs runs --curves wise-ft-curve.csv --plots plots
""",
    check=check,
    inputs=lambda options: [],
    outputs=lambda options: [options.report_out],
)
