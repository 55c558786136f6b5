"""report: runs gathered into one page of HTML that needs nothing else: scores over seeds, curves, confusion matrices,
samples.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from tqdm import tqdm

from minillama.cli.charts import chart, colour, document, shaded, table, text, thinned
from minillama.cli.finished_runs import Run, find_runs, is_number, read_curves, read_run
from minillama.cli.flags import DEFAULT_PRESET, OPTION_DEFAULTS, RESUME_MAY_CHANGE, used_by
from minillama.cli.loading import check_alone, report
from minillama.cli.options import defaults
from minillama.formats.names import path_and_fold, without_ending

NONE = "–"  # in the place of a score that there is not
# What stands at the head of a group anyway, or is no setting.
NOT_SETTINGS = {
    *RESUME_MAY_CHANGE,
    "option",
    "seed",
    "train",
    "dev",
    "test",
    "label_names",
    "corpus",
    "pretrained_model_path",
}
NOT_SETTINGS |= {"continued", "processes", "tokenizer", "out_dtype"}


# Grouping


def group_key(run: Run) -> str:
    """A key that is equal for runs that differ in nothing but the seed, and in what changes no number. A model made for
    each seed (random-1 for seed 1) counts as one.
    """
    if not run.options:
        return str(run.path)
    settings = {name: value for name, value in run.options.items() if name not in (*RESUME_MAY_CHANGE, "seed")}
    settings["tokenizer"] = Path(str(settings["tokenizer"])).name  # a model has one, wherever it lies
    settings["pretrained_model_path"] = str(Path(str(settings["pretrained_model_path"])).parent / model_name(run))
    return json.dumps(settings, sort_keys=True, default=str)


def model_name(run: Run) -> str:
    """The name of the model that the run began from."""
    if run.options["option"] == "pretrain" and not run.options["continued"]:
        return f"new, {run.options['preset'] or DEFAULT_PRESET}"
    name = Path(without_ending(str(run.options["pretrained_model_path"]))).name
    return re.sub(rf"(?<![^-_.]){re.escape(str(run.options['seed']))}(?![^-_.])", "{seed}", name)


def data_name(run: Run) -> str:
    if run.options["option"] == "pretrain":
        return " ".join(os.path.basename(str(text)) for text in run.options["corpus"] or [])
    return Path(without_ending(path_and_fold(str(run.options["train"]))[0])).name.removesuffix("-train")


def head_of(run: Run) -> str:
    """The option, the data and the model of a run; the run's name where that is not known."""
    return f"{run.options['option']} {data_name(run)}, {model_name(run)}" if run.options else run.name


def setting(value: object) -> str:
    """A value of an option as it would be typed."""
    if isinstance(value, list):
        return " ".join(map(setting, value))
    return "on" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def settings(run: Run) -> dict[str, str]:
    """The options that matter to what was learnt and differ from their defaults."""
    option, users = run.options.get("option", ""), used_by()
    by_default = defaults() | OPTION_DEFAULTS.get(option, {})
    return {
        name: setting(value)
        for name, value in run.options.items()
        if name not in NOT_SETTINGS and value != by_default.get(name) and option in users.get(name, ())
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
            test = [run.final.get("test_accuracy") for run in members]
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
    elif any(run.curve("dev_loss") and not run.curve("dev_accuracy") for run in members):
        scores = {"exact match": "dev_exact_match", "F1": "dev_f1", "dev loss": "dev_loss"}
    else:
        labelled, scores = True, {"dev": "dev_accuracy", "macro-F1": "dev_macro_f1"}
    rows = []
    for run in members:
        best = run.best()
        epochs = f"{text(best['epoch'])} of {len(run.scores)}" if "epoch" in best else f"– of {len(run.scores)}"
        test = [decimals(run.final.get("test_accuracy"))] if labelled else []
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
            "Loss on dev after each epoch", "step", [(name, run.curve("dev_loss"), colour(i)) for i, name, run in named]
        ),
    ]
    return f'<div class="grid">{"".join(drawn)}</div>'


def group_section(number: int, name: str, members: Sequence[Run]) -> str:
    """Everything about runs that differ in seed only."""
    parts = [f'<section id="g{number}"><h2>{text(name)}</h2>']
    if chosen := settings(members[0]):
        parts.append(f'<p class="quiet">{text(", ".join(" ".join(item) for item in chosen.items()))}</p>')
    parts += [run_table(members), figures(members)]
    drawn = [
        shaded(
            f"{split}, seed {run.options.get('seed', '?')}: accuracy {decimals(run.final.get(f'{split}_accuracy'))}",
            *matrix,
        )
        for run in members
        for split, matrix in run.matrices().items()
    ]
    if drawn:
        parts.append("<h3>Confusion matrices</h3><p>A line for each true class, a column for each predicted one.</p>")
        parts.append(f'<div class="grid">{"".join(drawn)}</div>')
    missing = Counter(reason for run in members for reason in run.missing_matrices())
    if missing:
        lines = "".join(
            f"<li>{text(reason)} ({count} of {len(members)} runs)</li>" for reason, count in missing.items()
        )
        parts.append(f'<p class="quiet">No confusion matrix of</p><ul class="quiet">{lines}</ul>')
    for run in members:
        if told := run.samples():
            parts.append(f"<h3>What {text(run.name)} wrote</h3>")
            parts += [f"<blockquote><b>epoch {text(epoch)}</b> {text(sample)}</blockquote>" for epoch, sample in told]
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
        parts.append(f"<h2>What is missing, unfinished or damaged</h2><ul>{''.join(problems)}</ul>")
    parts.append(score_tables(groups))
    if curves:
        parts.append("<h2>Between two sets of weights</h2>")
        parts.append("<p>Accuracy of (1 − alpha) times the first and alpha times the second.</p>")
        parts += [between_section(*one) for one in curves]
    parts += [group_section(i, name, members) for i, (name, members) in enumerate(groups)]
    return document(title, parts)


def write_report(args: argparse.Namespace) -> None:
    """report: writes the page."""
    from minillama.formats.files import atomic_file

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
    said = f", {damaged} of them unfinished or damaged" if damaged else ""
    report(f"wrote {args.report_out}: {len(runs)} run{'s' * (len(runs) != 1)}{said}")
