"""--option classify: classifies the user's sentences with a fine-tuned model."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.cli import classifiers, flags
from minillama.cli.bundled import use_bundled_classifier
from minillama.cli.checks import check_prompts, refuse
from minillama.cli.console import HOW_TO_END, STDIN, check_stdin, read_prompts, stdout_is_utf8, typed_lines
from minillama.cli.header import report, warn
from minillama.cli.loading import check_alone, choose_device, choose_dtype
from minillama.cli.options import Command, Group, Options, OwnFlag
from minillama.cli.provenance import Origin, check_made_from, lock_predictions
from minillama.cli.xray import XRAY, check_xray, page_of_classes, write_xray
from minillama.formats.names import PREDICTED, PROBABILITY, TABLES, is_table, path_and_fold, without_ending

if TYPE_CHECKING:
    from minillama.formats.checkpoint import FineTuned
    from minillama.text.labelled import Row

OUT = OwnFlag(
    "--out FILE",
    "a .csv or .jsonl to write: the columns of the table in --prompt_file, the label and the probability of each class",
    default_text="for a table, its name and -classified",
)


def check(options: Options) -> None:
    classifiers.check_fine_tuned(options)
    check_prompts(options, "out", "xray")
    check_xray(options)
    if not options.changed("prompt", "prompt_file", "interactive"):
        raise ValueError(
            "--option classify needs a sentence: --prompt TEXT, --prompt_file FILE (lines or a table, -: standard "
            "input), or --interactive"
        )
    if options.columns and not is_table(options.prompt_file or ""):
        raise ValueError(f"--columns names columns of a table; give --prompt_file with {', '.join(TABLES)}")
    if options.out is not None and not options.out.lower().endswith(classifiers.PREDICTION_TABLES):
        raise ValueError(f"--out is {options.out}; its name must end in {' or '.join(classifiers.PREDICTION_TABLES)}")
    if options.out is not None:
        refuse(options, ["json"], "--out writes the results, which --json would print")
    path = out_file(options)
    if path is not None and options.out is None and Path(path).is_file():
        check_made_from(Path(path), options.prompt_file, "name another file with --out")


def out_file(options: Options) -> str | None:
    """The table to write: --out, or one named after the table that is read. None: results go to stdout."""
    if options.out is not None or options.json or not is_table(options.prompt_file or ""):
        return options.out
    path = path_and_fold(options.prompt_file)[0]
    kind = ".jsonl" if Path(path).suffix.lower().startswith(".json") else ".csv"
    return f"{Path(without_ending(path)).name.lstrip('-')}-classified{kind}"


def outputs(options: Options) -> list[str]:
    return [path for path in (out_file(options), options.xray) if path]


def rows_to_classify(options: Options, found: FineTuned, sentences: list[str]) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a table with its own columns, or of `sentences`; and how its file is written, for
    `write_predictions`. Labels that a file has are not read.
    """
    from minillama.text.labelled import Row
    from minillama.text.tables import LINE_END, SEPARATOR

    known = {*found.labels, *found.label_names}
    if is_table(options.prompt_file or ""):
        learnt = found.options.get("columns")
        text = learnt.get("text") if isinstance(learnt, dict) else None
        own = {"text": text} if text else None
        path = options.prompt_file
        table = classifiers.read_table_file(options, path, options.columns or own, known, labelled=False)
        classifiers.tell_table(replace(table, label=""))
        if table.is_labelled:
            report(f"notice: {table.label} is not read; --option evaluate scores a model on labelled rows")
        replaced = [
            name for name in table.names if name == PREDICTED or name in {PROBABILITY + n for n in found.label_names}
        ]
        if replaced:
            report(f"warning: {table.path}: the columns {', '.join(replaced)} are replaced by the new predictions")
        rows = [Row(0, record.text, cells=record.cells) for record in table.records]
        return rows, {"separator": table.separator, "marked": table.marked}
    parts = [sentence.partition(SEPARATOR) for sentence in sentences]
    if options.prompt_file is not None and all(sign and label.strip() in known for label, sign, _ in parts):
        report("notice: the labels of these lines are not read; --option evaluate scores a model on labelled rows")
        sentences = [sentence for _, _, sentence in parts]
    elif labelled := sum(
        re.match(rf"\S{{1,20}}{re.escape(SEPARATOR)}", sentence) is not None for sentence in sentences
    ):
        report(f'warning: {labelled} of {len(sentences)} sentences begin with a label and "{SEPARATOR}", read as text')
    return [Row(0, LINE_END.sub(" ", sentence.strip())) for sentence in sentences], {}


def run(options: Options) -> None:
    """Prints the most likely class of each sentence, its probability and the sentence. With --json, prints the
    probabilities of all classes. Of a table, or with --out, writes a table instead.
    """
    from minillama.formats.checkpoint import read_fine_tuned
    from minillama.text.labelled import (
        LINE_END,
        SEPARATOR,
        Row,
        class_labels,
        json_label,
        prediction_records,
        write_predictions,
    )
    from minillama.training.evaluation import class_log_probs

    check_alone(options)
    check_stdin(options)
    sentences = [] if options.interactive or is_table(options.prompt_file or "") else read_prompts(options)
    if any(not sentence.strip() for sentence in sentences):
        raise ValueError("--prompt is empty; give a sentence")
    found = read_fine_tuned(options.finetuned, options.pretrained_model_path)
    rows, form = ([], {}) if options.interactive else rows_to_classify(options, found, sentences)
    options = classifiers.inherit_options(options, found, classifiers.OPTIONS_FROM_FINE_TUNED)
    device = choose_device(options)
    dtype = choose_dtype(options, device)
    classifier, tokenizer, prompt = classifiers.load_classifier(options, found, device, dtype)
    model = classifier.to(device)
    labels = class_labels(found.labels)
    is_file = options.prompt_file not in (None, *STDIN)
    data = {"test": (options.prompt_file, len(rows))} if is_file else {}
    origin = Origin.of(options, data, str(found.path)) if out_file(options) else None
    how = classifiers.reading_arguments(options, tokenizer, dtype)

    def label(rows: list[Row]) -> None:
        rows = classifiers.tokenize_data(options, {"": rows}, tokenizer, found.config.max_seq_len, *prompt)[""]
        log_probs = class_log_probs(model, rows, **how, name="classifying")
        likeliest, probabilities = log_probs.argmax(-1).tolist(), log_probs.softmax(-1).tolist()
        if options.xray:
            answer = found.label_names, probabilities[0]
            write_xray(options, page_of_classes(options, model, tokenizer, rows[0].ids, *answer))
        if (path := out_file(options)) is not None:
            with lock_predictions(path):
                write_predictions(path, likeliest, rows, found.labels, probabilities, **form)
                warn(origin.write_record(path, "test" if data else None) if origin else None)
            counts = Counter(found.label_names[best] for best in likeliest)
            shares = ", ".join(
                f"{name} {counts[name]:,} ({counts[name] / len(rows):.0%})" for name in found.label_names
            )
            print(f"{len(rows):,} rows: {shares}")
            report(f"wrote {path}")
            return
        if options.json and is_table(options.prompt_file or ""):
            records = prediction_records(likeliest, rows, found.labels, probabilities)
            print("\n".join(json.dumps(record, ensure_ascii=not stdout_is_utf8()) for record in records), flush=True)
            return
        for row, best, shares_of in zip(rows, likeliest, probabilities, strict=True):
            name = found.label_names[best]
            if not options.json:
                print(f"{name} {shares_of[best]:.3f}{SEPARATOR}{row.sentence}", flush=True)
                continue
            result = {
                "sentence": row.sentence,
                "label": json_label(labels[best]),
                "class": name,
                "probabilities": dict(zip(found.label_names, shares_of, strict=True)),
            }
            print(json.dumps(result, ensure_ascii=not stdout_is_utf8()), flush=True)

    if options.pooling == "last_column":
        report("warning: with --pooling last_column, a result depends on the other sentences of its batch")
    if not options.interactive:
        label(rows)
        return
    report(f"Type a sentence and press Enter. {HOW_TO_END}.")
    for line in typed_lines():
        try:
            if line.strip():
                label([Row(0, LINE_END.sub(" ", line.strip()))])
        except ValueError as error:  # the line cannot be read
            report(str(error))
        except KeyboardInterrupt:
            report("stopped")


COMMAND = Command(
    "classify",
    "classify your own sentences with a model from finetune or lora",
    (
        Group(
            "sentences",
            (flags.FINETUNED, flags.PROMPT, flags.PROMPT_FILE, flags.INTERACTIVE, flags.JSON, flags.COLUMNS, OUT),
            "Prints the class, its probability and the sentence; --json prints all classes. Of a .csv, .tsv or .jsonl\n"
            "in --prompt_file it writes a copy with the classes added.",
        ),
        flags.ROWS,
        XRAY,
        Group("model", (flags.MODEL_PATH, flags.TOKENIZER)),
        flags.DEVICE,
    ),
    run,
    """
python run_llama.py --option classify --prompt "I loved every minute of it."
python run_llama.py --option finetune --lr 3e-4 --epochs 2 --batch_size 16 --schedule cosine
python run_llama.py --option classify --finetuned finetune-2-0.0003.pt --prompt "A dull story, and a great film."
python run_llama.py --option classify --finetuned finetune-2-0.0003.pt --interactive
python run_llama.py --option classify --finetuned reviews-finetune-10-0.0003.pt --prompt_file new.csv
""",
    defaults=dict.fromkeys(classifiers.OPTIONS_FROM_FINE_TUNED),
    default_texts=dict.fromkeys(
        (*classifiers.OPTIONS_FROM_FINE_TUNED, "columns"), "that of the run that wrote --finetuned"
    )
    | {
        "prompt": "none; give this, --prompt_file or --interactive",
        "finetuned": "the bundled classifier of opinions",
    },
    resolve=use_bundled_classifier,
    check=check,
    inputs=lambda options: [options.finetuned, options.pretrained_model_path],
    outputs=outputs,
    only_prints=lambda options: not outputs(options),
)
