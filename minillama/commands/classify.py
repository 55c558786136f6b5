"""--option classify: sentences of one's own, and what a fine-tuned classifier says of them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence

from minillama.cli.console import check_stdin, lines_typed, prompts_of, speaks_utf8
from minillama.cli.loading import (
    adopt,
    check_alone,
    choose_device,
    choose_dtype,
    load_classifier,
    report,
    tokenize_data,
)
from minillama.formats.checkpoint import read_fine_tuned
from minillama.text.labelled import LINE_END, SEPARATOR, Row, class_labels
from minillama.training.evaluation import class_log_probs


def label_sentences(args: argparse.Namespace) -> None:
    """classify: prints for each sentence the likeliest class, its probability, and the sentence; with --json the
    probabilities of all classes.
    """
    check_alone(args)
    check_stdin(args)
    sentences = [] if args.interactive else prompts_of(args)
    if labelled := sum(re.match(rf"\S{{1,20}}{re.escape(SEPARATOR)}", sentence) is not None for sentence in sentences):
        report(
            f'warning: {labelled} of {len(sentences)} sentences begin with a label and "{SEPARATOR}", and are read so; '
            "--option wise_ft --alphas 1 --dev FILE scores such a file"
        )
    if any(not sentence.strip() for sentence in sentences):
        raise ValueError("--prompt is empty; give a sentence")
    found = read_fine_tuned(args.finetuned)
    adopt(args, found)
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    classifier, tokenizer, prompt = load_classifier(args, found, device, dtype)
    model = classifier.to(device)
    labels = class_labels(found.labels)

    def label(sentences: Sequence[str]) -> None:
        rows = [Row(0, LINE_END.sub(" ", sentence.strip())) for sentence in sentences]
        rows = tokenize_data(args, {"": rows}, tokenizer, found.config.max_seq_len, *prompt)[""]
        log_probs = class_log_probs(
            model,
            rows,
            args.batch_size,
            pad_id=tokenizer.pad_id,
            dtype=dtype,
            bucketed=args.pooling == "last_token",
            name="classifying",
        )
        for row, probabilities in zip(rows, log_probs.exp().tolist(), strict=True):
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            name = found.label_names[best]
            if args.json:
                all_classes = dict(zip(found.label_names, probabilities, strict=True))
                said = {
                    "sentence": row.sentence,
                    "label": json_label(labels[best]),
                    "class": name,
                    "probabilities": all_classes,
                }
                print(json.dumps(said, ensure_ascii=not speaks_utf8()), flush=True)
            else:
                print(f"{name} {probabilities[best]:.3f}{SEPARATOR}{row.sentence}", flush=True)

    if args.pooling == "last_column":
        report("warning: with --pooling last_column an answer depends on the other sentences of its batch")
    if not args.interactive:
        label(sentences)
        return
    report("Type a sentence, and Enter. Ctrl-D ends.")
    for line in lines_typed():
        try:
            if line.strip():
                label([line])
        except ValueError as error:  # what was typed cannot be read
            report(str(error))
        except KeyboardInterrupt:
            report("stopped")


def json_label(label: str) -> int | str:
    """A label of a label file for JSON: a number where it is a whole number as one is written, else the text."""
    return int(label) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) else label
