"""--option evaluate: scores a fine-tuned classifier on labelled rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from minillama.cli import classifiers, flags
from minillama.cli.console import stdout_is_utf8
from minillama.cli.data_files import source
from minillama.cli.header import report
from minillama.cli.loading import check_alone, choose_device, choose_dtype
from minillama.cli.options import Command, Group, Options
from minillama.cli.provenance import Origin
from minillama.environment import file_sha256
from minillama.formats.names import path_and_fold

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minillama.text.labelled import Row
    from minillama.training.evaluation import Evaluation

INHERITED = (*classifiers.OPTIONS_FROM_FINE_TUNED, "columns")


def check(options: Options) -> None:
    classifiers.check_fine_tuned(options)
    if options.test is None:
        raise ValueError("--option evaluate needs --test FILE, labelled rows")


def run(options: Options) -> None:
    """Prints the scores, with --json as one object, and writes the predictions if --test_out is given."""
    from minillama.formats.checkpoint import read_fine_tuned
    from minillama.text.labelled import has_gold_labels
    from minillama.training.evaluation import commonest_class, describe_classes, evaluate, intervals

    check_alone(options)
    found = read_fine_tuned(options.finetuned, options.pretrained_model_path)
    options = classifiers.inherit_options(options, found, INHERITED)
    labels, names = classifiers.labels_of(options, found), found.label_names
    raw = classifiers.read_data(options, ("test",), labels).rows
    if file_sha256(path_and_fold(options.test)[0]) == found.options.get("train_sha256"):
        report(f"warning: {found.path} was trained on {options.test}, so these scores say nothing about other rows")
    if not has_gold_labels(raw["test"]):
        raise ValueError(
            f"{options.test} has no labels, or the same one in all rows, so there is nothing to score; "
            f"--option classify --prompt_file {options.test} labels its rows"
        )
    device = choose_device(options)
    dtype = choose_dtype(options, device)
    model, tokenizer, prompt = classifiers.load_classifier(options, found, device, dtype)
    origin = Origin.of(options, {"test": (source(options, "test"), len(raw["test"]))}, options.finetuned)
    rows = classifiers.tokenize_data(options, raw, tokenizer, found.config.max_seq_len, *prompt)["test"]
    how = classifiers.reading_arguments(options, tokenizer, dtype)
    result = evaluate(model.to(device), rows, **how, name="scoring")
    if options.test_out is not None:
        classifiers.write_split(options, origin, "test", rows, result, labels)
        report(f"wrote {options.test_out}")
    ranges = intervals(result, rows, options.seed)
    if options.json:
        scored = scores_of(result, rows, names, ranges) | {"test": options.test, "finetuned": options.finetuned}
        print(json.dumps(scored, ensure_ascii=not stdout_is_utf8()), flush=True)
        return
    for name, value in (("accuracy", result.accuracy), ("macro-F1", result.macro_f1)):
        low, high = ranges[name.replace("-", "_").lower()]
        print(f"{name:<10}{value:.3f}   95 % interval {low:.3f} to {high:.3f}")
    print(f"loss      {result.loss:.4f}")
    common, share = commonest_class(rows)
    print(f"rows      {len(rows):,}; chance {1 / len(names):.3f}; the commonest class, {names[common]}, {share:.3f}\n")
    print(describe_classes(result, rows, names), flush=True)


def scores_of(
    result: Evaluation, rows: Sequence[Row], names: Sequence[str], ranges: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """All scores by name, for --json."""
    from sklearn.metrics import precision_recall_fscore_support

    from minillama.training.evaluation import commonest_class

    common, share = commonest_class(rows)
    gold, known = [row.label for row in rows], list(range(len(names)))
    scores = precision_recall_fscore_support(gold, result.predictions, labels=known, zero_division=0)
    columns = ("precision", "recall", "f1", "rows")
    classes = {
        name: dict(zip(columns, (part[k].item() for part in scores), strict=True)) for k, name in enumerate(names)
    }
    return {
        "rows": len(rows),
        "accuracy": result.accuracy,
        "accuracy_interval": list(ranges["accuracy"]),
        "macro_f1": result.macro_f1,
        "macro_f1_interval": list(ranges["macro_f1"]),
        "loss": result.loss,
        "commonest_class": names[common],
        "commonest_share": share,
        "classes": classes,
        "confusion": result.confusion,
    }


COMMAND = Command(
    "evaluate",
    "score a model from finetune or lora on labelled sentences",
    (
        Group(
            "data",
            (flags.FINETUNED, flags.TEST, flags.COLUMNS, flags.LABEL_NAMES, flags.TEST_OUT, flags.JSON),
            "Prints accuracy, macro-F1, the scores of each class and the confusion matrix.",
        ),
        flags.ROWS,
        Group("model", (flags.MODEL_PATH, flags.TOKENIZER)),
        flags.DEVICE,
    ),
    run,
    """
python run_llama.py --option finetune --lr 3e-4 --epochs 2 --batch_size 16 --schedule cosine
python run_llama.py --option evaluate --finetuned finetune-2-0.0003.pt --test data/demo-test.txt
""",
    defaults=dict.fromkeys((*INHERITED, "test", "label_names", "test_out")),
    default_texts=dict.fromkeys((*INHERITED, "label_names"), "that of the run that wrote --finetuned")
    | {"test": "none; give a file", "test_out": "not written"},
    check=check,
    inputs=lambda options: [
        options.finetuned,
        options.pretrained_model_path,
        path_and_fold(options.test)[0] if options.test else None,
        options.label_names,
    ],
    outputs=lambda options: [options.test_out] if options.test_out else [],
    only_prints=lambda options: options.test_out is None,
)
