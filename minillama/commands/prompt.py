"""--option prompt: classifies without training: picks the class whose word is most likely after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minillama.cli import classifiers, flags
from minillama.cli.bundled import use_bundled_rows
from minillama.cli.checks import check_template
from minillama.cli.header import report
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.session import open_session
from minillama.cli.xray import XRAY, check_xray, page_of_tokens, read_other, write_xray

if TYPE_CHECKING:
    from classifier import LlamaZeroShotClassifier
    from minillama.cli.session import Session
    from minillama.text.labelled import Row

ENDING = "prompting-output.txt"
# Sentences without content. Their results are the prior probabilities of the labels.
CONTENT_FREE = {"contextual": ("N/A", "[MASK]", ""), "pmi": ("",)}
CALIBRATE = Flag(
    "--calibrate",
    "divide a label's probability by its probability after a prompt without content; contextual: the mean of the "
    'sentences "N/A", "[MASK]" and an empty one; pmi: only the empty one',
    ("none", *CONTENT_FREE),
    "none",
    elsewhere="belongs to --option prompt",
)


def check(options: Options) -> None:
    classifiers.check_pooling(options)
    if options.calibrate != "none" and options.pooling == "last_column":
        raise ValueError(
            "--pooling last_column reads most rows at their padding, but prompts without content have none; leave out "
            f"--calibrate {options.calibrate}, or --pooling"
        )
    check_template(options)
    check_xray(options)
    classifiers.check_predictions(options, ENDING)


def run(options: Options) -> None:
    """Builds the zero-shot classifier and predicts dev and test."""
    from types import SimpleNamespace

    from classifier import LlamaZeroShotClassifier
    from minillama.text.batches import prompt_parts

    raw, labels, words, _ = classifiers.read_data(options, ("dev", "test"))
    with open_session(options) as session:
        tokenizer = session.tokenizer
        origin = session.origin(raw)
        files = ", ".join(f"{split} {getattr(options, split)}" for split in raw)
        llama, _ = session.load_llama(f"{files}, labels {options.label_names or 'those of the data'}")
        prompt = prompt_parts(options.template, words, options.pooling)
        report(f"prompt      {'{sentence}'.join(prompt)}")
        config = SimpleNamespace(llama=llama, num_labels=len(words), pooling=options.pooling)
        model = LlamaZeroShotClassifier(config, tokenizer, words).to(session.device).eval()
        rows = classifiers.tokenize_data(options, raw, tokenizer, model.max_input_len, *prompt)
        if options.calibrate != "none":
            calibrate(session, model, words, prompt)
        if options.xray:  # before the long work
            ids = first_that_fits(next(iter(rows.values())))
            other = read_other(options, llama.config, tokenizer)
            path = options.pretrained_model_path
            write_xray(options, page_of_tokens(path, llama, tokenizer, ids, len(ids), other=other))
        classifiers.predict(session, model, rows, labels, origin)


def first_that_fits(rows: Sequence[Row]) -> Sequence[int]:
    """The tokens of the first row that the X-ray page can show; of the shortest row if there is none."""
    from minillama.cli.xray_page import MOST_TOKENS

    return next((row.ids for row in rows if len(row.ids) <= MOST_TOKENS), min((row.ids for row in rows), key=len))


def calibrate(session: Session, model: LlamaZeroShotClassifier, words: list[str], prompt: tuple[str, str]) -> None:
    """Calibrates the model with prompts without content. prompt: the text before and after a sentence."""
    from minillama.layers.precision import autocast
    from minillama.text.batches import pad, tokenize_rows
    from minillama.text.labelled import Row

    method, tokenizer, device = session.options.calibrate, session.tokenizer, session.device
    empty = [Row(0, text) for text in CONTENT_FREE[method]]
    before, question = prompt
    prompts, _ = tokenize_rows(empty, tokenizer, model.max_input_len, before=before, question=question)
    ids, mask = pad([row.ids for row in prompts], tokenizer.pad_id)
    with autocast(device, session.dtype):
        prior = model.calibrate(ids.to(device), None if mask is None else mask.to(device))
    shares = prior.softmax(-1).tolist()
    shown = ", ".join(f"{word} {share:.3f}" for word, share in zip(words, shares, strict=True))
    report(f"calibrated  {method}; shares of the words without content: {shown}")


COMMAND = Command(
    "prompt",
    "classify sentences by asking the model, without training",
    (
        flags.DATA._replace(note=flags.ROW_FORMATS),
        Group("prompt", (flags.TEMPLATE, flags.LABEL_WORDS, CALIBRATE)),
        flags.ROWS,
        XRAY,
        flags.MODEL,
        flags.DEVICE,
    ),
    run,
    """
python run_llama.py --option prompt
python run_llama.py --option prompt --calibrate contextual --batch_size 10
""",
    resolve=lambda options: use_bundled_rows(options, ENDING, ("dev", "test", "label_names")),
    default_texts=classifiers.output_texts(ENDING),
    check=check,
    inputs=classifiers.row_files,
    outputs=lambda options: [path for path in (options.dev_out, options.test_out, options.xray) if path],
)
