"""--option pretrain: trains a language model on text, from random weights or from a checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.cli import flags
from minillama.cli.checks import check_corpus, check_training, model_files, text_and_weight
from minillama.cli.header import report, report_next
from minillama.cli.loading import check_causal, training_window
from minillama.cli.new_model import NEW_MODEL, TRAINED_BY, typed_sizes
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.parser import COUNT
from minillama.cli.plan import plan_corpus, scratch_folder
from minillama.cli.session import open_session
from minillama.formats.names import without_ending

if TYPE_CHECKING:
    from minillama.text.corpus import Corpus
    from minillama.training.distributed import Processes
    from tokenizer import Tokenizer

LR_OF_CONTINUED = 4e-4
TEXTS = Group(
    "texts",
    (
        flags.CORPUS,
        flags.HELD_OUT,
        flags.WINDOW,
        flags.BATCH_SIZE,
        Flag("--max_steps N", "number of steps", COUNT, default_text="--epochs passes over the corpus"),
        Flag("--eval_every N", "evaluate every N steps; without --max_steps also after each epoch", COUNT, 200),
        Flag("--sample_prompt TEXT", "prompt for a sample after each evaluation", str, "Once upon a time"),
        Flag("--tokens_dir DIR", "folder for tokenized texts", str, "runs/tokens"),
        flags.VOCAB_SIZE,
        flags.OPTIMIZER,
        flags.OUT_DTYPE,
        flags.MODEL_OUT,
    ),
)


def resolve(options: Options) -> Options:
    """The options, with a lower learning rate for a model that is trained already, unless one was typed."""
    lower = options.continued and "lr" not in options.typed
    return options.replace(lr=LR_OF_CONTINUED) if lower else options


def check(options: Options) -> None:
    check_corpus(options, weights=True)
    check_training(options)
    typed_sizes(options)


def read_corpus(
    options: Options, tokenizer: Tokenizer, window: int, processes: Processes, scratch: Path | None = None
) -> Corpus:
    """Opens the texts; the main process tokenizes new ones, into --tokens_dir or `scratch`. Raises ValueError if a file
    is named twice, because one text might train on the held-out documents of the other.
    """
    from minillama.text.corpus import Corpus, Text
    from minillama.text.documents import open_tokens, text_files, tokenize_text

    named = [(path, weight, text_files(path, report)) for path, weight in map(text_and_weight, options.corpus)]
    counts = Counter(file.resolve() for _, _, files in named for file in files)
    for file, count in counts.items():
        if count > 1:
            raise ValueError(f"--corpus: {file} is named twice, directly or by its folder; name it once, with a weight")
    stems = Counter(Path(without_ending(path)).name for path, _, _ in named)
    texts = []
    for path, weight, files in named:
        folder = Path(options.tokens_dir)
        done = processes.from_main(lambda: [tokenize_text(file, tokenizer, folder, scratch) for file in files])  # noqa: B023
        tokens = [open_tokens(file, tokenizer) for file in done]
        stem = Path(without_ending(path)).name
        name = stem if stem and stems[stem] == 1 else path
        text = Text(name, tokens, window, options.held_out, weight)
        documents = sum(len(one.text_bytes) for one in tokens)
        size = sum(len(one.ids) for one in tokens)
        report(
            f"corpus      {path}: {documents:,} document{'s' * (documents != 1)}, {size:,} tokens, "
            f"{text.held_out_tokens:,} of them held out; "
            f"weight {weight:g}"
        )
        texts.append(text)
    return Corpus(texts, options.seed)


def run(options: Options) -> None:
    """Trains the model and writes it with its tokenizer."""
    from minillama.formats.files import read_torch
    from minillama.training.language_modelling import LanguageModelling

    with scratch_folder(options) as scratch, open_session(options) as session:
        options, tokenizer, run = session.options, session.tokenizer, session.run
        if options.vocab_size not in (None, tokenizer.n_words):
            raise ValueError(
                f"--vocab_size is {options.vocab_size}, but {tokenizer.path} has {tokenizer.n_words} pieces"
            )
        llama, stop_ids = session.load_llama()
        check_causal(llama)
        config = llama.config
        window = training_window(options, config)
        corpus = read_corpus(options, tokenizer, window, session.processes, scratch)
        steps = plan_steps(options, corpus.pass_length, window)
        task = LanguageModelling(
            corpus,
            tokenizer,
            steps,
            options.batch_size,
            options.eval_every,
            sample_prompt=options.sample_prompt,
            seed=options.seed,
            passes=None if options.max_steps else options.epochs,
        )

        if options.plan:
            return plan_corpus(session, llama, task, corpus)
        write_best = session.best_writer(config, stop_ids)
        session.train(llama, task, write_best, dynamic=False)
        if session.processes.is_main:
            opened = session.write_model(read_torch(run.best_path)["model"], config, stop_ids)
            report_next(*opened, "--temperature", "0.8", "--prompt", options.sample_prompt)


def plan_steps(options: Options, pass_length: int, window: int) -> int:
    """The number of steps. Warns if it does not fit the corpus. pass_length: the windows of one pass."""
    steps = options.max_steps or max(1, math.ceil(options.epochs * pass_length / options.batch_size))
    report(
        f"steps       {steps:,} of {options.batch_size} x {window} tokens, "
        f"{steps * options.batch_size / pass_length:.2f} passes over the corpus"
    )
    if options.batch_size > pass_length:
        report(
            f"warning: the corpus has {pass_length} windows of {window} tokens, fewer than one --batch_size of "
            f"{options.batch_size}; give a smaller one, or a smaller --window, and more --epochs"
        )
    if options.warmup_steps >= steps:
        report(f"warning: --warmup_steps {options.warmup_steps} of {steps} steps: the learning rate never reaches --lr")
    return steps


COMMAND = Command(
    "pretrain",
    "train a language model on text",
    (TEXTS, NEW_MODEL, flags.TRAINING, flags.RUN, flags.TRAINED_MODEL, flags.DEVICE),
    run,
    """
python run_llama.py --option tokenizer --corpus README.md --vocab_size 600 --model_out mine.model
python run_llama.py --option pretrain --corpus README.md --tokenizer mine.model --dim 64 --n_layers 2 \\
    --max_seq_len 128 --batch_size 4 --epochs 5 --warmup_steps 10 --lr 3e-3 --model_out mine.safetensors
python run_llama.py --option pretrain --corpus README.md CHANGELOG.md=3 --max_steps 20 --model_out mine.safetensors
""",
    defaults={
        **TRAINED_BY,
        "batch_size": 8,
        "schedule": "linear",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "adam_beta2": 0.95,
        "epochs": 1,
        "held_out": 0.01,
    },
    default_texts={
        "pretrained_model_path": "a new model with random weights",
        "tokenizer": "tokenizer.model, else data/tokenizer.model, else the bundled one",
        "held_out": "0.01",
        "lr": f"{TRAINED_BY['lr']:g}; {LR_OF_CONTINUED:g} for a checkpoint",
        "window": "the model's context",
        "dropout": "0, or the checkpoint's",
        "out_dtype": "fp32",
        "vocab_size": "that of the tokenizer",
    },
    resolve=resolve,
    check=check,
    inputs=lambda options: [options.pretrained_model_path] if options.continued else [],
    outputs=model_files,
    trains=True,
)
