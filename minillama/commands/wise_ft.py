"""--option wise_ft: a fine-tuned classifier and the model it came from, mixed in all proportions, judged on dev and on
data from elsewhere; with --alphas 1 alone, the fine-tuned classifier as it is.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from classifier import MergedClasses
from llama import llama_from_checkpoint
from minillama.cli.charts import chart, colour, document
from minillama.cli.loading import (
    adopt,
    check_alone,
    choose_device,
    choose_dtype,
    load_classifier,
    report,
    report_next,
    tokenize_data,
    warn,
)
from minillama.cli.options import curve_picture
from minillama.cli.provenance import Origin, writing_turn
from minillama.formats.checkpoint import FineTuned, read_checkpoint, read_fine_tuned, write_checkpoint
from minillama.formats.files import atomic_file
from minillama.formats.names import path_and_fold, without_ending
from minillama.text.labelled import Row, class_names, has_gold_labels, read_labels, read_rows, write_predictions
from minillama.training.evaluation import Evaluation, describe, evaluate
from minillama.training.weight_mixing import interpolate


@dataclass
class DataSet:
    """Rows to judge by, and how the model's classes count in them: None where they are the same."""

    name: str
    rows: list[Row]
    names: list[str]
    counts_as: list[int] | None = None


def wise_ft(args: argparse.Namespace) -> None:
    """wise_ft: the scores at every alpha, in print, as CSV and as a picture; test at the alpha that is best on dev."""
    check_alone(args)
    found = read_fine_tuned(args.finetuned)
    adopt(args, found)
    labels = labels_of(args, found)
    sets = [DataSet("dev", read_rows(args.dev, labels), found.label_names), *out_of_domain(args, found, labels)]
    test = DataSet("test", read_rows(args.test, labels), found.label_names)
    for one, path in zip(sets, [args.dev, *args.ood], strict=True):
        if not has_gold_labels(one.rows) and (len(args.alphas) > 1 or one.name != "dev"):
            raise ValueError(f"{path} has one value in its whole label column, so there is nothing to judge by")
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    mixes = set(args.alphas) != {1.0}
    model, tokenizer, prompt = load_classifier(args, found, device, dtype, "its base" if mixes else "not read")
    data = {"dev": (args.dev, len(sets[0].rows)), "test": (args.test, len(test.rows))}
    origin = Origin.of(args, data, args.finetuned)
    theta_1 = copy.deepcopy(model.llama.state_dict())  # what is tied stays tied
    theta_0 = base_of(args, found) if mixes else theta_1
    report(f"data        dev {args.dev}, test {args.test}{''.join(f', {path}' for path in args.ood)}")
    for one in sets[1:]:
        report(f"classes     {one.name}: {counting(one, found.label_names)}")
    raw = {str(i): one.rows for i, one in enumerate([*sets, test])}
    done = tokenize_data(args, raw, tokenizer, found.config.max_seq_len, *prompt)
    for one, rows in zip([*sets, test], done.values(), strict=True):
        one.rows = rows
    model = model.to(device)

    def judged(one: DataSet, alpha: float) -> Evaluation:
        judge: nn.Module = model if one.counts_as is None else MergedClasses(model, one.counts_as)
        name = f"{one.name}, alpha {alpha:g}"
        return evaluate(
            judge,
            one.rows,
            args.batch_size,
            pad_id=tokenizer.pad_id,
            dtype=dtype,
            bucketed=args.pooling == "last_token",
            name=name,
        )

    curve: list[list[Evaluation]] = []
    with tqdm(args.alphas, desc="mixing", unit="alpha", leave=False, disable=None) as bar:
        for alpha in bar:
            model.llama.load_state_dict(interpolate(theta_0, theta_1, alpha))
            curve.append([judged(one, alpha) for one in sets])
            scores = "  ".join(f"{one.name} {shown_score(e)}" for one, e in zip(sets, curve[-1], strict=True))
            bar.write(f"alpha {alpha:<5g} {scores}")
    best = max(range(len(curve)), key=lambda i: (curve[i][0].accuracy or 0.0, args.alphas[i]))
    alpha, dev = args.alphas[best], curve[best][0]
    model.llama.load_state_dict(interpolate(theta_0, theta_1, alpha))
    tested = judged(test, alpha)
    try:
        write_curve(args, sets, [[one.accuracy for one in scores] for scores in curve])
        for one, judgement in ((sets[0], dev), (test, tested)):
            if (path := getattr(args, f"{one.name}_out")) is not None:
                quality = {"accuracy": judgement.accuracy, "macro_f1": judgement.macro_f1}
                with writing_turn(path):
                    write_predictions(path, judgement.predictions, one.rows, labels)
                    warn(origin.write_record(path, one.name, alpha=alpha, **quality))
        write_mixed(args, found, model, alpha, dev)
    finally:  # even if a file cannot be written
        print(f"alpha {alpha:g}{', the best on dev' if len(curve) > 1 else ''}")
        print(f"dev {describe(dev)} ({len(sets[0].rows)} rows)")
        print(f"test {describe(tested)} ({len(test.rows)} rows)", flush=True)
    if args.model_out:
        report(f"wrote {args.model_out}, the model at alpha {alpha:g}")
        report_next("--option", "classify", "--finetuned", args.model_out, "--prompt", "your sentence")


def write_mixed(args: argparse.Namespace, found: FineTuned, model: nn.Module, alpha: float, dev: Evaluation) -> None:
    """Writes the model at the best alpha, if --model_out asks for it; `dev`: its scores."""
    if args.model_out:
        mixed = {"alpha": alpha, "finetuned": args.finetuned, "base": args.pretrained_model_path}
        described = {name: getattr(found, name) for name in ("head", "label_names", "labels", "options")}
        write_checkpoint(
            args.model_out,
            model.state_dict(),
            found.config,
            kind="classifier",
            dev_accuracy=dev.accuracy,
            wise_ft=mixed,
            **described,
        )


def labels_of(args: argparse.Namespace, found: FineTuned) -> dict[str, str | None]:
    """The class of each label in dev and test. Raises ValueError if the model was trained for other classes."""
    labels = found.labels if args.label_names is None else read_labels(args.label_names)
    if (names := class_names(labels)) != found.label_names:
        raise ValueError(
            f"{args.label_names} names {', '.join(names)}, but {found.path} was trained for "
            f"{', '.join(found.label_names)}; leave out --label-names"
        )
    return labels


def base_of(args: argparse.Namespace, found: FineTuned) -> dict[str, Tensor]:
    """The weights that fine-tuning began with. Raises ValueError if the model is another kind of Llama."""
    path = args.pretrained_model_path
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: the model that {found.path} came from is not there; name it with "
            "--pretrained-model-path, or give --alphas 1 to judge the fine-tuned model alone"
        )
    checkpoint, causal = read_checkpoint(path), found.config.causal
    try:
        base = llama_from_checkpoint(checkpoint, norm=found.config.norm, causal=causal)
    except ValueError:  # of another norm, which is told below, or damaged
        base = llama_from_checkpoint(checkpoint, causal=causal)
    for field in fields(found.config):
        ours, theirs = getattr(found.config, field.name), getattr(base.config, field.name)
        if ours != theirs and field.name not in ("dropout", "use_cache", "attention_kernel"):
            raise ValueError(
                f"{path} has {field.name} {theirs}, {found.path} has {ours}; give with --pretrained-model-path the "
                "model that it was fine-tuned from"
            )
    return base.state_dict()


def out_of_domain(args: argparse.Namespace, found: FineTuned, labels: Mapping[str, str | None]) -> list[DataSet]:
    """The sets of --ood; `labels`: of those that have no label file of their own. Raises ValueError if the mappings are
    not as many, or one does not fit the model's classes.
    """
    sets = []
    stems = [Path(without_ending(path_and_fold(path)[0])).name for path in args.ood]
    mappings, files = (for_each(args, name) for name in ("ood_classes", "ood_label_names"))
    for path, stem, counts_as, file in zip(args.ood, stems, mappings, files, strict=True):
        names, own = found.label_names, labels
        if counts_as is not None:
            if len(counts_as) != len(names):
                raise ValueError(
                    f"--ood_classes {','.join(map(str, counts_as))} has {len(counts_as)} numbers, but the model has "
                    f"{len(names)} classes ({', '.join(names)}); give a number for each"
                )
            members = [[n for n, k in zip(names, counts_as, strict=True) if k == i] for i in range(max(counts_as) + 1)]
            names = ["/".join(some) for some in members]
            own = {str(n): name for n, name in enumerate(names)}
        if file is not None:
            own = read_labels(file)
            if len(class_names(own)) != len(names):
                raise ValueError(
                    f"{file} has {len(class_names(own))} names, but the model's classes count as {len(names)} in "
                    f"{path}; say with --ood_classes which count as which"
                )
            if counts_as is None and sorted(class_names(own)) == sorted(names):  # by name, whatever their order
                counts_as = [class_names(own).index(name) for name in names]
            names = class_names(own)
        name = stem if stems.count(stem) == 1 and stem not in ("dev", "test") else path
        sets.append(DataSet(name, read_rows(path, own), names, counts_as))
    return sets


def for_each(args: argparse.Namespace, name: str) -> list:
    """The option's values, one for each --ood file: one may serve for all, none is None for all."""
    given = getattr(args, name) or [None]
    return given * len(args.ood) if len(given) == 1 else given


def counting(one: DataSet, classes: Sequence[str]) -> str:
    """Which of the model's classes count as which of the set's names: `bad, poor -> no; good -> yes; fair left out`."""
    counts_as = range(len(classes)) if one.counts_as is None else one.counts_as
    members = [[n for n, k in zip(classes, counts_as, strict=True) if k == i] for i in range(-1, len(one.names))]
    told = [f"{', '.join(some)} -> {name}" for some, name in zip(members[1:], one.names, strict=True)]
    return "; ".join([*told, *([f"{', '.join(members[0])} left out"] if members[0] else [])])


def shown_score(evaluation: Evaluation) -> str:
    return "-" if evaluation.accuracy is None else f"{evaluation.accuracy:.3f}"


def write_curve(args: argparse.Namespace, sets: list[DataSet], accuracies: list[list[float | None]]) -> None:
    """The accuracies, a line for each alpha, as CSV; and their picture, with the accuracy of a guess."""
    with atomic_file(args.curve_out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["alpha", *(one.name for one in sets)])
        for alpha, scores in zip(args.alphas, accuracies, strict=True):
            writer.writerow([f"{alpha:g}", *("" if score is None else f"{score:.6f}" for score in scores)])
    lines = []
    for i, one in enumerate(sets):
        points = [(a, score) for a, row in zip(args.alphas, accuracies, strict=True) if (score := row[i]) is not None]
        lines.append((one.name, points, colour(i)))
    for i, n in enumerate(sorted({len(one.names) for one in sets}), start=1):
        lines.append((f"chance, {n} classes ({1 / n:.3g})", [(0.0, 1 / n), (1.0, 1 / n)], colour(-i, dashed=True)))
    picture = chart("WiSE-FT: accuracy of the mixed weights", "alpha (0: the base model, 1: the fine-tuned one)", lines)
    with atomic_file(curve_picture(args)) as file:
        file.write(document("WiSE-FT", [picture]))
