"""--option wise_ft: a fine-tuned classifier mixed with the model it came from, judged on dev and on other data at each
proportion; with --alphas 1 alone, the fine-tuned classifier as it is.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.cli import classifiers, flags
from minillama.cli.charts import chart, colour, document
from minillama.cli.checks import check_differ
from minillama.cli.header import report, report_next
from minillama.cli.loading import check_alone, choose_device, choose_dtype
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.provenance import Origin, write_with_record
from minillama.formats.names import path_and_fold, without_ending

if TYPE_CHECKING:
    from torch import Tensor, nn

    from minillama.formats.checkpoint import FineTuned
    from minillama.text.labelled import Row
    from minillama.training.evaluation import Evaluation

ADOPTED = (*classifiers.OPTIONS_FROM_FINE_TUNED, "dev", "test")
ALPHAS = flags.numbers(
    float,
    "numbers from 0 to 1, rising, with commas between",
    lambda values: values == sorted(set(values)) and 0 <= values[0] and values[-1] <= 1,
)
COUNTS_AS = flags.numbers(
    int,
    "a class number or -1 for each class of the model, with commas between; 0, 1 and so on, none left out",
    lambda values: max(values) >= 1 and set(values) - {-1} == set(range(max(values) + 1)),
)
MIXING = Group(
    "mixing",
    (
        flags.FINETUNED,
        Flag(
            "--alphas A,A,...",
            "the weights of the fine-tuned model; 1 alone judges it as it is",
            ALPHAS,
            [i / 10 for i in range(11)],
            default_text="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
        ),
        Flag("--ood FILE", "labelled data from elsewhere, as for --dev; each scored by itself", str, [], nargs="+"),
        Flag(
            "--ood_classes K,K,...",
            "the class of the --ood file that each class of the model counts as, -1 for none, as in 0,0,-1,1,1: their "
            "probabilities are added. One for all files, or one for each. If -1 comes first, write "
            "--ood_classes=-1,...",
            COUNTS_AS,
            [],
            default_text="the classes are the same",
            nargs="+",
        ),
        Flag(
            "--ood_label_names FILE",
            "label files of the --ood files, one for all or one for each; their classes are the model's by name, or "
            "where names differ, by number",
            str,
            [],
            default_text="the labels that the model was trained with",
            nargs="+",
        ),
        Flag(
            "--curve_out FILE.csv",
            "table of the accuracies; beside it their picture, a page of HTML",
            str,
            "wise-ft-curve.csv",
        ),
        flags.MODEL_OUT,
    ),
    "Mixes the weights, (1 - alpha) * base + alpha * fine-tuned (WiSE-FT), judges each mixture on dev and --ood, and "
    "the one that is best on dev on test. --model_out takes that model, a fine-tuned model like any other.",
)


@dataclass
class DataSet:
    """Rows to judge by. counts_as: the class of `names` that each class of the model counts as; None: the same."""

    name: str
    rows: list[Row]
    names: list[str]
    counts_as: list[int] | None = None


# The options


def curve_picture(options: Options) -> str:
    """The path of the picture of the curve."""
    return f"{without_ending(options.curve_out)}.html"


def check(options: Options) -> None:
    classifiers.check_fine_tuned(options)
    if not options.curve_out.endswith(".csv"):
        raise ValueError(f"--curve_out is {options.curve_out}; the name of the table must end in .csv")
    for name in ("ood_classes", "ood_label_names"):
        values = getattr(options, name)
        if len(values) not in (0, 1, len(options.ood)) or (values and not options.ood):
            raise ValueError(
                f"--{name} has {len(values)} values for {len(options.ood)} files of --ood; give one for all, or one "
                "for each"
            )
    check_differ(outputs(options))


def inputs(options: Options) -> list[str | None]:
    rows = [path_and_fold(path)[0] for path in (options.dev, options.test, *options.ood) if path]
    return [options.finetuned, options.pretrained_model_path, *rows, options.label_names, *options.ood_label_names]


def outputs(options: Options) -> list[str]:
    named = [options.curve_out, curve_picture(options), options.model_out, options.dev_out, options.test_out]
    return [path for path in named if path]


# The command


def run(options: Options) -> None:
    """The scores at every alpha, in print, as CSV and as a picture; test at the alpha that is best on dev."""
    import copy

    from tqdm import tqdm

    from classifier import MergedClasses
    from minillama.formats.checkpoint import read_fine_tuned
    from minillama.text.labelled import has_gold_labels, read_rows, write_predictions
    from minillama.training.evaluation import describe, evaluate
    from minillama.training.weight_mixing import interpolate

    check_alone(options)
    found = read_fine_tuned(options.finetuned)
    options = classifiers.adopt(options, found, ADOPTED)
    labels = labels_of(options, found)
    sets = [DataSet("dev", read_rows(options.dev, labels), found.label_names), *out_of_domain(options, found, labels)]
    test = DataSet("test", read_rows(options.test, labels), found.label_names)
    for one, path in zip(sets, [options.dev, *options.ood], strict=True):
        if not has_gold_labels(one.rows) and (len(options.alphas) > 1 or one.name != "dev"):
            raise ValueError(f"{path} has one value in its whole label column, so there is nothing to judge by")
    device = choose_device(options)
    dtype = choose_dtype(options, device)
    mixes = set(options.alphas) != {1.0}
    model, tokenizer, prompt = classifiers.load_classifier(
        options, found, device, dtype, "its base" if mixes else "not read"
    )
    data = {"dev": (options.dev, len(sets[0].rows)), "test": (options.test, len(test.rows))}
    origin = Origin.of(options, data, options.finetuned)
    theta_1 = copy.deepcopy(model.llama.state_dict())  # what is tied stays tied
    theta_0 = base_of(options, found) if mixes else theta_1
    report(f"data        dev {options.dev}, test {options.test}{''.join(f', {path}' for path in options.ood)}")
    for one in sets[1:]:
        report(f"classes     {one.name}: {counting(one, found.label_names)}")
    raw = {str(i): one.rows for i, one in enumerate([*sets, test])}
    done = classifiers.tokenize_data(options, raw, tokenizer, found.config.max_seq_len, *prompt)
    for one, rows in zip([*sets, test], done.values(), strict=True):
        one.rows = rows
    model = model.to(device)

    def judged(one: DataSet, alpha: float) -> Evaluation:
        judge: nn.Module = model if one.counts_as is None else MergedClasses(model, one.counts_as)
        return evaluate(
            judge, one.rows, **classifiers.reading(options, tokenizer, dtype), name=f"{one.name}, alpha {alpha:g}"
        )

    curve: list[list[Evaluation]] = []
    with tqdm(options.alphas, desc="mixing", unit="alpha", leave=False, disable=None) as bar:
        for alpha in bar:
            model.llama.load_state_dict(interpolate(theta_0, theta_1, alpha))
            curve.append([judged(one, alpha) for one in sets])
            line = "  ".join(f"{one.name} {shown_score(e)}" for one, e in zip(sets, curve[-1], strict=True))
            bar.write(f"alpha {alpha:<5g} {line}")
    best = max(range(len(curve)), key=lambda i: (curve[i][0].accuracy or 0.0, options.alphas[i]))
    alpha, dev = options.alphas[best], curve[best][0]
    model.llama.load_state_dict(interpolate(theta_0, theta_1, alpha))
    tested = judged(test, alpha)
    try:
        write_curve(options, sets, [[one.accuracy for one in scores] for scores in curve])
        for one, result in ((sets[0], dev), (test, tested)):
            if getattr(options, f"{one.name}_out") is None:
                continue
            sentences = [row.sentence for row in one.rows]
            write = partial(write_predictions, predictions=result.predictions, rows=one.rows, labels=labels)
            scores = {"alpha": alpha, "accuracy": result.accuracy, "macro_f1": result.macro_f1}
            write_with_record(options, origin, one.name, sentences, write, **scores)
        write_mixed(options, found, model, alpha, dev)
    finally:  # even if a file cannot be written
        print(f"alpha {alpha:g}{', the best on dev' if len(curve) > 1 else ''}")
        print(f"dev {describe(dev)} ({len(sets[0].rows)} rows)")
        print(f"test {describe(tested)} ({len(test.rows)} rows)", flush=True)
    if options.model_out:
        report(f"wrote {options.model_out}, the model at alpha {alpha:g}")
        report_next("--option", "classify", "--finetuned", options.model_out, "--prompt", "your sentence")


def write_mixed(options: Options, found: FineTuned, model: nn.Module, alpha: float, dev: Evaluation) -> None:
    """Writes the model at the best alpha, if --model_out asks for it; `dev`: its scores."""
    from minillama.formats.checkpoint import write_checkpoint

    if options.model_out:
        mixed = {"alpha": alpha, "finetuned": options.finetuned, "base": options.pretrained_model_path}
        described = {name: getattr(found, name) for name in ("head", "label_names", "labels", "options")}
        write_checkpoint(
            options.model_out,
            model.state_dict(),
            found.config,
            kind="classifier",
            dev_accuracy=dev.accuracy,
            wise_ft=mixed,
            **described,
        )


def labels_of(options: Options, found: FineTuned) -> dict[str, str | None]:
    """The class of each label in dev and test. Raises ValueError if the model was trained for other classes."""
    from minillama.text.labelled import class_names, read_labels

    labels = found.labels if options.label_names is None else read_labels(options.label_names)
    if (names := class_names(labels)) != found.label_names:
        raise ValueError(
            f"{options.label_names} names {', '.join(names)}, but {found.path} was trained for "
            f"{', '.join(found.label_names)}; leave out --label-names"
        )
    return labels


def base_of(options: Options, found: FineTuned) -> dict[str, Tensor]:
    """The weights that fine-tuning began with. Raises ValueError if the model is another kind of Llama."""
    from llama import llama_from_checkpoint
    from minillama.formats.checkpoint import read_checkpoint

    path = options.pretrained_model_path
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


def out_of_domain(options: Options, found: FineTuned, labels: Mapping[str, str | None]) -> list[DataSet]:
    """The sets of --ood; `labels`: of those that have no label file of their own. Raises ValueError if the mappings are
    not as many, or one does not fit the model's classes.
    """
    from minillama.text.labelled import class_names, read_labels, read_rows

    sets = []
    stems = [Path(without_ending(path_and_fold(path)[0])).name for path in options.ood]
    mappings, files = (for_each(options, name) for name in ("ood_classes", "ood_label_names"))
    for path, stem, counts_as, file in zip(options.ood, stems, mappings, files, strict=True):
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


def for_each(options: Options, name: str) -> list:
    """The option's values, one for each --ood file: one may serve for all, none is None for all."""
    given = getattr(options, name) or [None]
    return given * len(options.ood) if len(given) == 1 else given


def counting(one: DataSet, classes: Sequence[str]) -> str:
    """Which of the model's classes count as which of the set's names: `bad, poor -> no; good -> yes; fair left out`."""
    counts_as = range(len(classes)) if one.counts_as is None else one.counts_as
    members = [[n for n, k in zip(classes, counts_as, strict=True) if k == i] for i in range(-1, len(one.names))]
    told = [f"{', '.join(some)} -> {name}" for some, name in zip(members[1:], one.names, strict=True)]
    return "; ".join([*told, *([f"{', '.join(members[0])} left out"] if members[0] else [])])


def shown_score(evaluation: Evaluation) -> str:
    return "-" if evaluation.accuracy is None else f"{evaluation.accuracy:.3f}"


def write_curve(options: Options, sets: list[DataSet], accuracies: list[list[float | None]]) -> None:
    """The accuracies, a line for each alpha, as CSV; and their picture, with the accuracy of a guess."""
    from minillama.formats.files import atomic_file

    with atomic_file(options.curve_out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["alpha", *(one.name for one in sets)])
        for alpha, scores in zip(options.alphas, accuracies, strict=True):
            writer.writerow([f"{alpha:g}", *("" if score is None else f"{score:.6f}" for score in scores)])
    lines = []
    for i, one in enumerate(sets):
        points = [
            (a, score) for a, row in zip(options.alphas, accuracies, strict=True) if (score := row[i]) is not None
        ]
        lines.append((one.name, points, colour(i)))
    for i, n in enumerate(sorted({len(one.names) for one in sets}), start=1):
        lines.append((f"chance, {n} classes ({1 / n:.3g})", [(0.0, 1 / n), (1.0, 1 / n)], colour(-i, dashed=True)))
    picture = chart("WiSE-FT: accuracy of the mixed weights", "alpha (0: the base model, 1: the fine-tuned one)", lines)
    with atomic_file(curve_picture(options)) as file:
        file.write(document("WiSE-FT", [picture]))


COMMAND = Command(
    "wise_ft",
    "mix a fine-tuned classifier with the model it came from",
    (
        MIXING,
        Group("data", (flags.DEV, flags.TEST, flags.LABEL_NAMES, flags.DEV_OUT, flags.TEST_OUT), flags.ROW_FORMATS),
        flags.ROWS,
        Group("model", (flags.MODEL_PATH, flags.TOKENIZER)),
        flags.DEVICE,
    ),
    run,
    """
python run_llama.py --option finetune --lr 3e-4 --epochs 10 --batch_size 16 --schedule cosine
python run_llama.py --option wise_ft --finetuned finetune-10-0.0003.pt
python run_llama.py --option wise_ft --finetuned finetune-10-0.0003.pt --ood other.txt --ood_classes 0,0,-1,1,1
""",
    defaults=dict.fromkeys((*ADOPTED, "label_names", "dev_out", "test_out")),
    default_texts=dict.fromkeys((*ADOPTED, "label_names"), "that of the run that made --finetuned")
    | dict.fromkeys(("dev_out", "test_out"), "none is written"),
    check=check,
    inputs=inputs,
    outputs=outputs,
)
