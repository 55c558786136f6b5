"""--option tokenizer: trains a SentencePiece tokenizer on text."""

from __future__ import annotations

from pathlib import Path

from minillama.cli import flags
from minillama.cli.checks import check_corpus, check_model_out, text_and_weight
from minillama.cli.header import report, report_next
from minillama.cli.loading import check_alone
from minillama.cli.options import Command, Group, Options

VOCAB_SIZE = 4096


def run(options: Options) -> None:
    """Trains and writes the tokenizer."""
    from minillama.text.documents import train_tokenizer

    check_alone(options)
    paths = [text_and_weight(text)[0] for text in options.corpus]
    size = options.vocab_size or VOCAB_SIZE
    report(f"training a tokenizer of {size} pieces on {', '.join(paths)}")
    train_tokenizer(paths, size, options.model_out, options.seed, report)
    report(f"wrote {options.model_out}")
    report_next(
        *("--option", "pretrain", "--tokenizer", options.model_out, "--corpus", *options.corpus),
        *("--model_out", str(Path(options.model_out).with_name("my-model.safetensors"))),
    )


COMMAND = Command(
    "tokenizer",
    "train a tokenizer on text",
    (Group("the tokenizer", (flags.CORPUS, flags.VOCAB_SIZE, flags.MODEL_OUT)),),
    run,
    """
python run_llama.py --option tokenizer --corpus README.md --vocab_size 600 --model_out mine.model
""",
    check=check_corpus,
    inputs=lambda options: [],
    outputs=lambda options: [check_model_out(options)],
)
