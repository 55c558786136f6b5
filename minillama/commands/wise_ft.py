"""--option wise_ft: mixes the weights of a fine-tuned classifier and its base model, and scores each mixture on dev and
other data. --alphas 1 scores only the fine-tuned classifier.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.cli import classifiers, flags
from minillama.cli.charts import Chart, colour
from minillama.cli.checks import check_differ, check_paths
from minillama.cli.data_files import share_of
from minillama.cli.header import report, report_next
from minillama.cli.loading import check_alone, choose_device, choose_dtype
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.pages import Table, decimals, render, write_page
from minillama.cli.provenance import Origin
from minillama.environment import file_sha256
from minillama.formats.names import path_and_fold, without_ending

if TYPE_CHECKING:
    from torch import Tensor, nn

    from minillama.formats.checkpoint import FineTuned
    from minillama.text.labelled import Row
    from minillama.training.evaluation import Evaluation

INHERITED_OPTIONS = (*classifiers.OPTIONS_FROM_FINE_TUNED, "dev", "test", "columns")
ALPHAS = flags.numbers(
    float,
    "increasing numbers from 0 to 1, separated by commas",
    lambda values: values == sorted(set(values)) and 0 <= values[0] and values[-1] <= 1,
)
COUNTS_AS = flags.numbers(
    int,
    "a class number or -1 for each class of the model, separated by commas; class numbers start at 0 without gaps",
    lambda values: max(values) >= 1 and set(values) - {-1} == set(range(max(values) + 1)),
)
MIXING = Group(
    "mixing",
    (
        flags.FINETUNED,
        Flag(
            "--alphas A,A,...",
            "shares of the fine-tuned model in the mixtures; 1 alone scores only that model",
            ALPHAS,
            [i / 10 for i in range(11)],
            default_text="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
        ),
        Flag("--ood FILE", "labelled data from another source; each file is scored separately", str, [], nargs="+"),
        Flag(
            "--ood_classes K,K,...",
            "for each class of the model, its class in the --ood file or -1 (none), as in 0,0,-1,1,1; probabilities of "
            "one class are added. Give one list for all files or one for each. If -1 comes first, write "
            "--ood_classes=-1,...",
            COUNTS_AS,
            [],
            default_text="the classes are the same",
            nargs="+",
        ),
        Flag(
            "--ood_label_names FILE",
            "label files of the --ood files, one for all or one for each; their classes match the model's by name, or "
            "by number if names differ",
            str,
            [],
            default_text="the labels that the model was trained with",
            nargs="+",
        ),
        Flag(
            "--score",
            "the score of the mixtures, which also chooses alpha on dev; balanced_accuracy, the mean of the accuracies "
            "within the classes, is for classes of unequal size",
            ("accuracy", "balanced_accuracy"),
            "accuracy",
        ),
        Flag(
            "--curve_out FILE.csv",
            "table of the scores; a chart as an HTML page goes beside it",
            str,
            "wise-ft-curve.csv",
        ),
        flags.MODEL_OUT,
    ),
    "Mixes the weights, (1 - alpha) * base + alpha * fine-tuned (WiSE-FT). Scores each mixture on dev and --ood,\n"
    "and the best one on dev also on test. --model_out saves that one as a normal fine-tuned model.",
)


@dataclass
class DataSet:
    """Rows to score on. counts_as: for each class of the model, its index in `names` or -1; None: the same classes."""

    name: str
    rows: list[Row]
    names: list[str]
    counts_as: list[int] | None = None


# The options


def curve_picture(options: Options) -> str:
    """The path of the chart."""
    return f"{without_ending(options.curve_out)}.html"


def check(options: Options) -> None:
    classifiers.check_fine_tuned(options)
    if not options.curve_out.endswith(".csv"):
        raise ValueError(f"--curve_out is {options.curve_out}; its name must end in .csv")
    for name in ("ood_classes", "ood_label_names"):
        values = getattr(options, name)
        if len(values) not in (0, 1, len(options.ood)) or (values and not options.ood):
            raise ValueError(
                f"--{name} has {len(values)} values for {len(options.ood)} files of --ood; give one for all or one "
                "for each"
            )
    check_differ(outputs(options))


def inputs(options: Options) -> list[str | None]:
    files = (options.dev, options.test, *options.ood)
    rows = [path_and_fold(path)[0] for path in files if path and share_of(path) is None]
    return [options.finetuned, options.pretrained_model_path, *rows, options.label_names, *options.ood_label_names]


def outputs(options: Options) -> list[str]:
    named = [options.curve_out, curve_picture(options), options.model_out, options.dev_out, options.test_out]
    return [path for path in named if path]


# The command


def run(options: Options) -> None:
    """Prints the scores at each alpha, writes them as CSV and as a chart, and scores test at the best alpha on dev."""
    import copy

    from tqdm import tqdm

    from classifier import MergedClasses
    from minillama.formats.checkpoint import read_fine_tuned
    from minillama.text.labelled import has_gold_labels
    from minillama.training.evaluation import describe, evaluate
    from minillama.training.weight_mixing import interpolate

    check_alone(options)
    found = read_fine_tuned(options.finetuned, options.pretrained_model_path)
    options = classifiers.inherit_options(options, found, INHERITED_OPTIONS)
    labels = classifiers.labels_of(options, found)
    check_paths(options)  # again, with the files of the run
    raw = read_rows_of_run(options, found, labels)
    sets = [DataSet("dev", raw.rows["dev"], found.label_names), *out_of_domain(options, found, labels)]
    tests = [DataSet("test", raw.rows["test"], found.label_names)] if "test" in raw.rows else []
    for one, path in zip(sets, [options.dev, *options.ood], strict=True):
        if not has_gold_labels(one.rows) and (len(options.alphas) > 1 or one.name != "dev"):
            raise ValueError(f"{path} has only one value in its label column, so it has no gold labels to score by")
    device = choose_device(options)
    dtype = choose_dtype(options, device)
    mixes = set(options.alphas) != {1.0}
    model, tokenizer, prompt = classifiers.load_classifier(options, found, device, dtype, "its base" if mixes else None)
    paths = {"dev": found.options["train"] if share_of(options.dev) is not None else options.dev, "test": options.test}
    data = {one.name: (paths[one.name], len(one.rows)) for one in (sets[0], *tests)}
    origin = Origin.of(options, data, options.finetuned)
    theta_1 = copy.deepcopy(model.llama.state_dict())  # deepcopy keeps tied weights tied
    theta_0 = base_of(options, found) if mixes else theta_1
    files = [f"{split} {getattr(options, split)}" for split in data] + options.ood
    report(f"data        {', '.join(files)}")
    for one in sets[1:]:
        report(f"classes     {one.name}: {counting(one, found.label_names)}")
    by_number = {str(i): one.rows for i, one in enumerate([*sets, *tests])}
    done = classifiers.tokenize_data(options, by_number, tokenizer, found.config.max_seq_len, *prompt)
    for one, rows in zip([*sets, *tests], done.values(), strict=True):
        one.rows = rows
    model = model.to(device)

    def judged(one: DataSet, alpha: float) -> Evaluation:
        judge: nn.Module = model if one.counts_as is None else MergedClasses(model, one.counts_as)
        how = classifiers.reading_arguments(options, tokenizer, dtype)
        return evaluate(judge, one.rows, **how, name=f"{one.name}, alpha {alpha:g}")

    of: Callable[[Evaluation], float | None] = attrgetter(options.score)
    curve: list[list[Evaluation]] = []
    with tqdm(options.alphas, desc="mixing", unit="alpha", leave=False, disable=None) as bar:
        for alpha in bar:
            model.llama.load_state_dict(interpolate(theta_0, theta_1, alpha))
            curve.append([judged(one, alpha) for one in sets])
            shown = ("-" if (score := of(one)) is None else f"{score:.3f}" for one in curve[-1])
            line = "  ".join(f"{one.name} {score}" for one, score in zip(sets, shown, strict=True))
            bar.write(f"alpha {alpha:<5g} {line}")
    best = max(range(len(curve)), key=lambda i: (of(curve[i][0]) or 0.0, options.alphas[i]))
    alpha, dev = options.alphas[best], curve[best][0]
    model.llama.load_state_dict(interpolate(theta_0, theta_1, alpha))
    tested = [(one, judged(one, alpha)) for one in tests]
    try:
        write_curve(options, sets, [[of(one) for one in scores] for scores in curve], alpha)
        for one, result in ((sets[0], dev), *tested):
            if getattr(options, f"{one.name}_out") is None:
                continue
            classifiers.write_split(options, origin, one.name, one.rows, result, labels, alpha=alpha)
        write_mixed(options, found, model, alpha, dev)
    finally:  # print the scores even if a file cannot be written
        print(f"alpha {alpha:g}{', the best on dev' if len(curve) > 1 else ''}")
        for one, result in ((sets[0], dev), *tested):
            print(f"{one.name} {describe(result)} ({len(one.rows)} rows)", flush=True)
    if options.model_out:
        report(f"wrote {options.model_out}, the model at alpha {alpha:g}")
        report_next("--option", "classify", "--finetuned", options.model_out, "--prompt", "your sentence")


def read_rows_of_run(options: Options, found: FineTuned, labels: dict[str, str | None]) -> classifiers.Data:
    """The rows of dev and test. A share as --dev means the rows that the run held out. Raises ValueError for another
    share: the model was trained on some of those rows.
    """
    if share_of(options.dev) is None:
        return classifiers.read_data(options, ("dev", "test"), labels)
    if options.dev != found.options.get("dev"):
        raise ValueError(f"--dev {options.dev} would hold out rows that {found.path} was trained on; give a file")
    run = {name: found.options.get(name) for name in ("train", "seed", "columns")}
    path = path_and_fold(run["train"])[0] if run["train"] else ""
    if not path or file_sha256(path) != found.options.get("train_sha256"):
        raise ValueError(
            f"{path or 'the training file'} is missing or has changed since {found.path} was trained, so nobody knows "
            "which rows were held out; give --dev FILE"
        )
    check_paths(options.replace(dev=run["train"]))
    return classifiers.read_data(options.replace(**run), ("train", "dev", "test"), labels)


def write_mixed(options: Options, found: FineTuned, model: nn.Module, alpha: float, dev: Evaluation) -> None:
    """Writes the model at the best alpha to --model_out, if given. dev: its scores."""
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


def base_of(options: Options, found: FineTuned) -> dict[str, Tensor]:
    """The weights of the base model. Raises ValueError if its config differs from that of the fine-tuned model."""
    from llama import llama_from_checkpoint
    from minillama.formats.checkpoint import read_checkpoint

    path = options.pretrained_model_path
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}, the base model of {found.path}, is missing; name it with "
            "--pretrained-model-path, or give --alphas 1 to score only the fine-tuned model"
        )
    checkpoint, causal = read_checkpoint(path), found.config.causal
    try:
        base = llama_from_checkpoint(checkpoint, norm=found.config.norm, causal=causal)
    except ValueError:  # another norm (reported below), or a damaged file
        base = llama_from_checkpoint(checkpoint, causal=causal)
    for field in fields(found.config):
        ours, theirs = getattr(found.config, field.name), getattr(base.config, field.name)
        if ours != theirs and field.name not in ("dropout", "use_cache", "attention_kernel"):
            raise ValueError(
                f"{path} has {field.name} {theirs}, {found.path} has {ours}; name its base model with "
                "--pretrained-model-path"
            )
    return base.state_dict()


def out_of_domain(options: Options, found: FineTuned, labels: Mapping[str, str | None]) -> list[DataSet]:
    """The data sets of --ood. labels: for sets without a label file. Raises ValueError if a class mapping or a label
    file does not fit the model's classes.
    """
    from minillama.text.labelled import class_names, read_labels, read_rows

    sets = []
    stems = [Path(without_ending(path_and_fold(path)[0])).name for path in options.ood]
    # One value serves all files.
    values = (options.ood_classes or [None], options.ood_label_names or [None])
    mappings, files = (given * len(stems) if len(given) == 1 else given for given in values)
    for path, stem, counts_as, file in zip(options.ood, stems, mappings, files, strict=True):
        names, own = found.label_names, labels
        if counts_as is not None:
            if len(counts_as) != len(names):
                raise ValueError(
                    f"--ood_classes {','.join(map(str, counts_as))} has {len(counts_as)} numbers, but the model has "
                    f"{len(names)} classes ({', '.join(names)}); give one number per class"
                )
            members = [[n for n, k in zip(names, counts_as, strict=True) if k == i] for i in range(max(counts_as) + 1)]
            names = ["/".join(some) for some in members]
            own = {str(n): name for n, name in enumerate(names)}
        if file is not None:
            own = read_labels(file)
            if len(class_names(own)) != len(names):
                raise ValueError(
                    f"{file} has {len(class_names(own))} names, but the model uses {len(names)} classes in "
                    f"{path}; match them with --ood_classes"
                )
            if counts_as is None and sorted(class_names(own)) == sorted(names):  # match by name, in any order
                counts_as = [class_names(own).index(name) for name in names]
            names = class_names(own)
        name = stem if stems.count(stem) == 1 and stem not in ("dev", "test") else path
        sets.append(DataSet(name, read_rows(path, own), names, counts_as))
    return sets


def counting(one: DataSet, classes: Sequence[str]) -> str:
    """The class mapping in words: `bad, poor -> no; good -> yes; fair left out`."""
    counts_as = range(len(classes)) if one.counts_as is None else one.counts_as
    members = [[n for n, k in zip(classes, counts_as, strict=True) if k == i] for i in range(-1, len(one.names))]
    mapped = [f"{', '.join(some)} -> {name}" for some, name in zip(members[1:], one.names, strict=True)]
    return "; ".join([*mapped, *([f"{', '.join(members[0])} left out"] if members[0] else [])])


def write_curve(options: Options, sets: list[DataSet], curve: list[list[float | None]], chosen: float) -> None:
    """Writes the scores by alpha as CSV, and as a page: a chart with the accuracy of random guessing, a table, and the
    chosen alpha.
    """
    from minillama.formats.files import atomic_file

    with atomic_file(options.curve_out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["alpha", *(one.name for one in sets)])
        for alpha, scores in zip(options.alphas, curve, strict=True):
            writer.writerow([f"{alpha:g}", *("" if score is None else f"{score:.6f}" for score in scores)])
    lines = []
    for i, one in enumerate(sets):
        points = [(a, score) for a, row in zip(options.alphas, curve, strict=True) if (score := row[i]) is not None]
        lines.append((one.name, points, colour(i)))
    for i, n in enumerate(sorted({len(one.names) for one in sets}), start=1):
        lines.append((f"chance, {n} classes ({1 / n:.3g})", [(0.0, 1 / n), (1.0, 1 / n)], colour(-i, dashed=True)))
    score = options.score.replace("_", " ")
    rows = [[f"{alpha:g}", *map(decimals, row)] for alpha, row in zip(options.alphas, curve, strict=True)]
    across = "alpha (0: the base model, 1: the fine-tuned one)"
    page = render(
        "wise_ft.html",
        title="WiSE-FT",
        chosen=f"Alpha {chosen:g} is {'the best on dev' if len(rows) > 1 else 'the only one'}.",
        chart=Chart(f"{score.capitalize()} of the mixed weights", across, lines),
        table=Table("", ["alpha", *(one.name for one in sets)], rows, words=[]),
    )
    write_page(curve_picture(options), page)


COMMAND = Command(
    "wise_ft",
    "mix a fine-tuned classifier with its base model",
    (
        MIXING,
        Group(
            "data",
            (flags.DEV, flags.TEST, flags.COLUMNS, flags.LABEL_NAMES, flags.DEV_OUT, flags.TEST_OUT),
            flags.ROW_FORMATS,
        ),
        flags.ROWS,
        Group("model", (flags.MODEL_PATH, flags.TOKENIZER)),
        flags.DEVICE,
    ),
    run,
    """
python run_llama.py --option finetune --lr 3e-4 --epochs 2 --batch_size 16 --schedule cosine
python run_llama.py --option wise_ft --finetuned finetune-2-0.0003.pt
python run_llama.py --option wise_ft --finetuned finetune-2-0.0003.pt --ood data/demo-test.txt
""",
    defaults=dict.fromkeys((*INHERITED_OPTIONS, "label_names", "dev_out", "test_out")),
    default_texts=dict.fromkeys((*INHERITED_OPTIONS, "label_names"), "that of the run that wrote --finetuned")
    | dict.fromkeys(("dev_out", "test_out"), "not written"),
    check=check,
    inputs=inputs,
    outputs=outputs,
)
