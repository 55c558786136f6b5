"""Functions that classifier commands share: labelled rows, predictions for dev and test, and fine-tuned models."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minillama.cli.checks import weak_dev
from minillama.cli.data_files import share_of, source
from minillama.cli.header import display_path, print_header, report, warn
from minillama.cli.loading import fit_tokenizer, load_tokenizer
from minillama.cli.options import Options, all_flags
from minillama.cli.provenance import check_default_output, write_with_record
from minillama.cli.session import make_log
from minillama.environment import HERE
from minillama.formats.names import TABLES, is_table, path_and_fold

if TYPE_CHECKING:
    import torch
    from torch import nn

    from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier
    from minillama.cli.provenance import Origin
    from minillama.cli.session import Session
    from minillama.formats.checkpoint import FineTuned
    from minillama.text.labelled import Row
    from minillama.text.tables import Table
    from minillama.training.evaluation import Evaluation
    from tokenizer import Tokenizer

PREDICTION_TABLES = (".csv", ".jsonl")  # endings of predictions with probabilities

# Options that come from the run that made the fine-tuned model, unless they are typed.
OPTIONS_FROM_FINE_TUNED = ("pretrained_model_path", "tokenizer", "max_sentence_len", "pooling", "batch_size")


# The options


def output_texts(ending: str) -> dict[str, str]:
    """The defaults of --dev_out and --test_out for `--help`."""
    return {
        f"{split}_out": f"named after the data; for the course's, cfimdb-{split}-{ending}; other names must end in "
        f"{split}-{ending}, .csv or .jsonl"
        for split in ("dev", "test")
    }


def check_predictions(options: Options, ending: str) -> None:
    """Raises ValueError unless --dev_out and --test_out are two files that end as the course requires, or in .csv or
    .jsonl.
    """
    named = {split: getattr(options, f"{split}_out") for split in ("dev", "test")}
    for split, path in named.items():
        if path is not None and getattr(options, split) is None:
            raise ValueError(f"--{split}_out {path} has no rows to predict; add --{split} FILE, or leave it out")
        if path is not None and not path.endswith((f"{split}-{ending}", *PREDICTION_TABLES)):
            raise ValueError(
                f"--{split}_out is {path}; for --option {options.option} its name must end in {split}-{ending}, or in "
                f"{' or '.join(PREDICTION_TABLES)} for a table"
            )
    if named["dev"] and named["test"] and Path(named["dev"]).resolve() == Path(named["test"]).resolve():
        raise ValueError(f"--dev_out and --test_out are both {options.dev_out}; give two files")


MEAN_OF_PROMPT = "--pooling mean is for --head linear: a prompt is answered at its last token; leave it out"


def check_pooling(options: Options) -> None:
    """Raises ValueError if --pooling mean would have to answer a prompt, or last_column to read the padding of a split
    batch.
    """
    if options.pooling == "mean" and (options.option == "prompt" or options.head == "prompt"):
        raise ValueError(MEAN_OF_PROMPT)
    split = options.command.trains and (options.micro_batch_size or options.batch_size) < options.batch_size
    if options.pooling == "last_column" and (split or options.processes > 1):
        raise ValueError(
            "--pooling last_column reads the padding of a whole batch, so a batch cannot be split: leave out "
            "--micro_batch_size, and run one process"
        )


def row_files(options: Options) -> list[str | None]:
    """The files that prompt, finetune and lora read."""
    rows = [
        path_and_fold(path)[0] for path in (options.train, options.dev, options.test) if path and not share_of(path)
    ]
    return [options.pretrained_model_path, *rows, options.label_names]


def check_fine_tuned(options: Options) -> None:
    """Raises ValueError if --finetuned is missing, or an option would override the config of that model."""
    if not options.finetuned:
        raise ValueError(f"--option {options.option} needs --finetuned, the file that finetune or lora wrote")
    if options.norm is not None or options.attention is not None:
        raise ValueError("the model keeps the --norm and --attention of its fine-tuning; leave them out")


# Rows


class Data(NamedTuple):
    """The rows of each split, without token ids; the class of each label; the word for each class in a prompt; the
    columns of the first table.
    """

    rows: dict[str, list[Row]]
    labels: dict[str, str | None]
    words: list[str]
    columns: dict[str, str] | None


def read_data(options: Options, splits: Sequence[str], labels: Mapping[str, str | None] | None = None) -> Data:
    """Reads the splits that have rows, and says what it took from tables. labels: those of a trained model; without
    them, the labels are those of --label-names or of the first split.
    """
    from minillama.text.labelled import (
        class_names,
        infer_labels,
        missing_classes,
        near_misses,
        read_labels,
        rows_of,
    )
    from minillama.text.splits import hold_out

    if labels is None and options.label_names is not None:
        labels = read_labels(options.label_names)
    inferred, columns = labels is None, options.columns
    given = [split for split in splits if getattr(options, split) is not None]
    rows: dict[str, list[Row]] = {}
    for split in given:
        path = getattr(options, split)
        if (share := share_of(path)) is not None:
            if "train" not in rows:
                raise ValueError(f"--dev {path} is a share of --train, which --option {options.option} does not read")
            rows["train"], rows[split] = hold_out(rows["train"], share, options.seed)
            report(
                f"{split:<12}{len(rows[split]):,} rows of {options.train}, held out; {len(rows['train']):,} to train on"
            )
            continue
        known = () if labels is None else {*labels, *(name for name in labels.values() if name is not None)}
        table = read_table_file(options, path, columns, known, labelled=split != "test" or labels is None)
        columns = columns or table.columns
        if labels is None:
            labels = infer_labels(table, named="label" in (options.columns or {}))
            for line in near_misses(table, labels):
                report(f"warning: {path}: {line}; if it is a slip, correct it and start again")
        rows[split] = rows_of(table, labels, may_lack_labels=split == "test")
        tell_table(table, class_names(labels) if inferred and split == given[0] else ())
    if "columns" in options.typed and not any(is_table(source(options, split)) for split in given):
        raise ValueError(f"--columns names columns of {', '.join(TABLES)}, but no file is one; leave it out")
    assert labels is not None
    names = class_names(labels)
    words = options.label_words or names
    if len(words) != len(names):
        raise ValueError(
            f"--label_words has {len(words)} words, {options.label_names or 'the data'} {len(names)} classes "
            f"({', '.join(names)}); give one word per class, in this order"
        )
    if "train" in rows and (missing := missing_classes(options.train, rows["train"], names)):
        report(f"warning: {options.train} has no row of {', '.join(missing)}; the model cannot learn that")
    warn(weak_dev(options, rows))
    for split in rows:
        if split != "train":
            check_default_output(options, split, [row.sentence for row in rows[split]])
    return Data(rows, dict(labels), words, columns)


def read_table_file(
    options: Options, path: str, columns: Mapping[str, str] | None, known: Collection[str], labelled: bool
) -> Table:
    """The file `path`. columns: of tables; if they were not typed but are those of the training data, a table without
    them is read by its own names.
    """
    from minillama.text.labelled import read_file

    columns = columns if is_table(path) else None
    if columns is None or "columns" in options.typed:
        return read_file(path, columns, known, labelled)
    numbers = all(name.replace("+", "").isdigit() for name in columns.values())
    first, second = (None, columns) if numbers else (columns, None)  # numbers are for a table without names
    try:
        return read_file(path, first, known, labelled)
    except ValueError:
        return read_file(path, second, known, labelled)


def tell_table(table: Table, classes: Sequence[str] = ()) -> None:
    """Says which columns of a table are read, and what was left out. classes: those found in it."""
    parts = [f"{len(table.records):,} rows"]
    parts += [f"text = {table.text}"] * bool(table.text) + [f"label = {table.label}"] * bool(table.label)
    found = (
        f" ({len(classes)} classes: {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})" if classes else ""
    )
    if table.names or classes:
        report(f"{table.path}: {', '.join(parts)}{found}")
    if table.left_out:
        shown = ", ".join(map(str, table.left_out[:5])) + (", ..." if len(table.left_out) > 5 else "")
        many = len(table.left_out) > 1
        told = f"{len(table.left_out):,} rows have no text and are" if many else "1 row has no text and is"
        report(f"warning: {table.path}: {told} left out (line{'s' * many} {shown})")


def tokenize_data(
    options: Options,
    data: dict[str, list[Row]],
    tokenizer: Tokenizer,
    context: int,
    before: str = "",
    question: str | None = None,
) -> dict[str, list[Row]]:
    """The rows of each split, tokenized. Prints one warning if sentences were cut to the model's context."""
    from minillama.text.batches import tokenize_rows

    done, cut = {}, 0
    for split, rows in data.items():
        done[split], cut_here = tokenize_rows(
            rows, tokenizer, context, before=before, question=question, max_sentence_len=options.max_sentence_len
        )
        cut += cut_here
    if cut:
        total = sum(map(len, data.values()))
        report(f"warning: {cut} of {total} sentences were cut; the model's context holds {context} tokens per row")
    return done


def reading_arguments(options: Options, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `evaluate` and `class_log_probs` for reading rows."""
    bucketed = options.pooling != "last_column"
    return {"batch_size": options.batch_size, "pad_id": tokenizer.pad_id, "dtype": dtype, "bucketed": bucketed}


def predict(
    session: Session,
    model: nn.Module,
    data: Mapping[str, list[Row]],
    labels: Mapping[str, str | None],
    origin: Origin | None,
) -> None:
    """Classifies dev and test, and writes both prediction files with their records. Reports the scores on stdout and in
    the run's log and metrics, even if a file cannot be written or the user stops the command.
    """
    from minillama.text.labelled import class_names
    from minillama.training.class_shares import final_warning, training_remedy
    from minillama.training.evaluation import describe, describe_chance, describe_classes, evaluate

    options, label_names = session.options, class_names(labels)
    how = reading_arguments(options, session.tokenizer, session.dtype)
    run = session.run if options.command.trains else None
    results, seconds = {}, {}
    try:
        for split in (split for split in ("dev", "test") if split in data):
            start = time.perf_counter()
            results[split] = evaluate(model, data[split], **how, processes=session.processes, name=split)
            seconds[split] = time.perf_counter() - start
        if origin is not None:
            for split, result in results.items():
                write_split(options, origin, split, data[split], result, labels)
    finally:
        log = make_log(run)
        lines = []
        for split, result in results.items():
            line = f"{split} {describe(result, with_loss=run is not None)} ({len(data[split])} rows)"
            if chance := describe_chance(result, data[split], label_names):
                line += f"; {chance}"
            lines.append(line)
            if session.processes.is_main:
                print(line, flush=True)
            log(f"{split} took {seconds[split]:.1f} s")
            if classes := describe_classes(result, data[split], label_names):
                log(f"\n{classes}\n")
        if run is not None and len(results) == len(data) - ("train" in data):
            for line in lines:
                run.log(line)
            remedy = training_remedy(options.class_weights != "none")
            if warning := final_warning(results["dev"], data["dev"], label_names, remedy):
                log(f"warning: {warning}")
            scores = {name: value for split, result in results.items() for name, value in result.scores(split).items()}
            run.finish(classes=label_names, **scores)


def write_split(
    options: Options,
    origin: Origin,
    split: str,
    rows: Sequence[Row],
    result: Evaluation,
    labels: Mapping[str, str | None],
    **more: Any,
) -> None:
    """Writes the predictions of a split and their record. more: for the record, before the scores."""
    from minillama.text.labelled import write_predictions

    found: dict[str, Any] = {"predictions": result.predictions, "probabilities": result.probabilities}
    write = partial(write_predictions, rows=rows, labels=labels, **found)
    scores = {**more, "accuracy": result.accuracy, "macro_f1": result.macro_f1}
    write_with_record(options, origin, split, [row.sentence for row in rows], write, **scores)


def labels_of(options: Options, found: FineTuned) -> dict[str, str | None]:
    """The class of each label in the data. Raises ValueError if the model was trained with other classes."""
    from minillama.text.labelled import class_names, read_labels

    labels = found.labels if options.label_names is None else read_labels(options.label_names)
    if (names := class_names(labels)) != found.label_names:
        raise ValueError(
            f"{options.label_names} has {', '.join(names)}, but {found.path} was trained with "
            f"{', '.join(found.label_names)}; leave out --label-names"
        )
    return labels


# Fine-tuned models


def inherit_options(options: Options, found: FineTuned, names: Sequence[str]) -> Options:
    """Takes each option of `names` that was not typed from the run that made the file. Bundled files are found from any
    folder. Raises ValueError if the file lacks one of the options.
    """
    from config import shown

    known = all_flags(options.commands)
    adopted: dict[str, object] = {}
    inherited = found.options.get("substituted")
    if isinstance(inherited, list):
        adopted["substituted"] = [name for name in inherited if name not in options.typed]
    for name in names:
        if getattr(options, name) is not None:
            continue
        value = found.options.get(name)
        kind = {"max_sentence_len": int, "batch_size": int, "columns": dict}.get(name, str)
        optional = name in ("tokenizer", "max_sentence_len", "test", "columns") and value is None
        if not optional and (type(value) is not kind or not value):
            raise ValueError(f"{found.path} has {shown(value)} as {name}; give it with {known[name].name}")
        if isinstance(value, str) and name != "pooling" and not Path(value).exists():
            value = display_path(HERE / value) if (HERE / value).exists() else value
            if name == "tokenizer" and not Path(value).exists():
                raise FileNotFoundError(
                    f"{found.path} was trained with the tokenizer {value}, which is missing; name it with --tokenizer"
                )
        adopted[name] = value
    return options.replace(**adopted)


def load_classifier(
    options: Options, found: FineTuned, device: torch.device, dtype: torch.dtype, base: str | None = None
) -> tuple[LlamaEmbeddingClassifier | LlamaPromptClassifier, Tokenizer, tuple[str, ...]]:
    """Loads the fine-tuned classifier on the CPU and prints the header. Returns the classifier, its tokenizer and, for
    a prompted model, the text before and after a sentence. base: the header's words for the base model, if not usual.
    """
    from classifier import classifier_of
    from minillama.text.batches import prompt_parts

    if found.head == "prompt" and options.pooling == "mean":
        raise ValueError(MEAN_OF_PROMPT)
    tokenizer = load_tokenizer(options, finetuned=options.finetuned)
    fit_tokenizer(found.path, found.config, tokenizer, lies_with=options.pretrained_model_path)
    model = classifier_of(found, tokenizer)
    model.pooling = options.pooling
    prompt = prompt_parts(found.template, found.words, options.pooling) if found.head == "prompt" else ()
    base = base or ("its base" if "base_sha256" in found.options else "its base, not needed")  # an adapter needs it
    head = f"{found.head} head" + (" on the mean of all tokens" if options.pooling == "mean" else "")
    report(f"finetuned   {found.path} ({found.options.get('option')}, {head})")
    print_header(options, model.llama, base, tokenizer, device, dtype)
    if prompt:
        report(f"prompt      {'{sentence}'.join(prompt)}")
    return model, tokenizer, prompt
