"""--option classify: classifies the user's sentences with a fine-tuned model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from minillama.cli import classifiers, flags
from minillama.cli.checks import check_prompts
from minillama.cli.console import HOW_TO_END, check_stdin, read_prompts, stdout_is_utf8, typed_lines
from minillama.cli.header import report
from minillama.cli.loading import check_alone, choose_device, choose_dtype
from minillama.cli.options import Command, Group, Options


def check(options: Options) -> None:
    classifiers.check_fine_tuned(options)
    check_prompts(options)
    if not options.changed("prompt", "prompt_file", "interactive"):
        raise ValueError(
            "--option classify needs a sentence: --prompt TEXT, --prompt_file FILE (-: standard input), or "
            "--interactive"
        )


def run(options: Options) -> None:
    """Prints the most likely class of each sentence, its probability and the sentence. With --json, prints the
    probabilities of all classes.
    """
    from minillama.formats.checkpoint import read_fine_tuned
    from minillama.text.labelled import LINE_END, SEPARATOR, Row, class_labels
    from minillama.training.evaluation import class_log_probs

    check_alone(options)
    check_stdin(options)
    sentences = [] if options.interactive else read_prompts(options)
    if labelled := sum(re.match(rf"\S{{1,20}}{re.escape(SEPARATOR)}", sentence) is not None for sentence in sentences):
        report(
            f'warning: {labelled} of {len(sentences)} sentences begin with a label and "{SEPARATOR}", read as text; '
            "to score a labelled file, use --option wise_ft --alphas 1 --dev FILE"
        )
    if any(not sentence.strip() for sentence in sentences):
        raise ValueError("--prompt is empty; give a sentence")
    found = read_fine_tuned(options.finetuned)
    options = classifiers.inherit_options(options, found, classifiers.OPTIONS_FROM_FINE_TUNED)
    device = choose_device(options)
    dtype = choose_dtype(options, device)
    classifier, tokenizer, prompt = classifiers.load_classifier(options, found, device, dtype)
    model = classifier.to(device)
    labels = class_labels(found.labels)
    how = classifiers.reading_arguments(options, tokenizer, dtype)

    def label(sentences: Sequence[str]) -> None:
        rows = [Row(0, LINE_END.sub(" ", sentence.strip())) for sentence in sentences]
        rows = classifiers.tokenize_data(options, {"": rows}, tokenizer, found.config.max_seq_len, *prompt)[""]
        log_probs = class_log_probs(model, rows, **how, name="classifying")
        for row, probabilities in zip(rows, log_probs.exp().tolist(), strict=True):
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            name = found.label_names[best]
            if not options.json:
                print(f"{name} {probabilities[best]:.3f}{SEPARATOR}{row.sentence}", flush=True)
                continue
            result = {
                "sentence": row.sentence,
                "label": json_label(labels[best]),
                "class": name,
                "probabilities": dict(zip(found.label_names, probabilities, strict=True)),
            }
            print(json.dumps(result, ensure_ascii=not stdout_is_utf8()), flush=True)

    if options.pooling == "last_column":
        report("warning: with --pooling last_column, a result depends on the other sentences of its batch")
    if not options.interactive:
        label(sentences)
        return
    report(f"Type a sentence and press Enter. {HOW_TO_END}.")
    for line in typed_lines():
        try:
            if line.strip():
                label([line])
        except ValueError as error:  # the line cannot be read
            report(str(error))
        except KeyboardInterrupt:
            report("stopped")


def json_label(label: str) -> int | str:
    """A label for JSON output: an int if the text is a plain decimal integer, else the text."""
    return int(label) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) else label


COMMAND = Command(
    "classify",
    "classify your own sentences with a model from finetune or lora",
    (
        Group(
            "sentences",
            (flags.FINETUNED, flags.PROMPT, flags.PROMPT_FILE, flags.INTERACTIVE, flags.JSON),
            "Prints the class, its probability and the sentence; --json prints all classes.",
        ),
        flags.ROWS,
        Group("model", (flags.MODEL_PATH, flags.TOKENIZER)),
        flags.DEVICE,
    ),
    run,
    """
python run_llama.py --option finetune --lr 3e-4 --epochs 10 --batch_size 16 --schedule cosine
python run_llama.py --option classify --finetuned finetune-10-0.0003.pt --prompt "A dull story, and a great film."
python run_llama.py --option classify --finetuned finetune-10-0.0003.pt --interactive
""",
    defaults=dict.fromkeys(classifiers.OPTIONS_FROM_FINE_TUNED),
    default_texts=dict.fromkeys(classifiers.OPTIONS_FROM_FINE_TUNED, "that of the run that wrote --finetuned")
    | {"prompt": "none; give this, --prompt_file or --interactive"},
    check=check,
    inputs=lambda options: [options.finetuned, options.pretrained_model_path],
    only_prints=lambda options: True,
)
