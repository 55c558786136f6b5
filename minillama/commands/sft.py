"""--option sft: supervised fine-tuning of a language model on examples of prompts and answers."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from minillama.cli import flags
from minillama.cli.bundled import use_bundled_model, use_demo_data
from minillama.cli.checks import check_differ, check_training, model_files, weak_dev
from minillama.cli.header import display_path, report, report_next, warn
from minillama.cli.loading import add_lora, check_causal, lora_settings, training_window
from minillama.cli.new_model import NEW_MODEL, TRAINED_BY, is_new, typed_sizes
from minillama.cli.options import Command, Flag, Group, Options
from minillama.cli.parser import COUNT_OR_ZERO
from minillama.cli.plan import plan_examples
from minillama.cli.provenance import check_default_output, write_with_record
from minillama.cli.session import open_session
from minillama.environment import HERE

if TYPE_CHECKING:
    from torch import Tensor, nn

    from config import LlamaConfig
    from minillama.cli.provenance import Origin
    from minillama.cli.session import Session
    from minillama.text.examples import Example
    from tokenizer import Tokenizer

SPLITS = ("train", "dev", "test")
LR = 5e-4
ANSWER_ROWS = Flag(
    "--answer_rows N",
    "number of dev rows, evenly spaced, to answer after each epoch; the model with the best token F1 is kept. "
    "0: keep the model with the best dev loss",
    COUNT_OR_ZERO,
    200,
)
DATA = Group(
    "data",
    (
        *(flags.TRAIN, flags.DEV, flags.TEST, flags.DEV_OUT, flags.TEST_OUT, flags.WINDOW, flags.MAX_NEW_TOKENS),
        *(flags.BATCH_SIZE, ANSWER_ROWS, flags.OPTIMIZER, flags.OUT_DTYPE, flags.MODEL_OUT),
    ),
    'Lines of {"prompt": "...", "answer": "..."}. Short examples share a row; each attends only to itself.',
)


# The options


def resolve(options: Options) -> Options:
    """The options, with the bundled model or what a new one needs, and the demo data if no data is named."""
    if not is_new(options):
        options = use_bundled_model(options)
    elif not options.lora_rank:
        options = options.replace(**{name: value for name, value in TRAINED_BY.items() if name not in options.typed})
    if options.train or options.dev:
        return options
    report(f"using the demo data, {display_path(HERE / 'data')}/demo-qa-* (--train and --dev name others)")
    splits = [split for split in SPLITS if split != "test" or not options.test]
    return use_demo_data(options, {split: f"demo-qa-{split}.jsonl" for split in splits})


def check(options: Options) -> None:
    if not options.lora_rank and (variants := options.changed(*flags.LORA_VARIANTS)):
        raise ValueError(f"--{variants[0]} needs LoRA, but all weights would be trained; add --lora_rank 4")
    if options.lora_rank and options.optimizer == "muon":
        raise ValueError("--optimizer muon is for whole matrices, but --lora_rank trains parts; give only one of them")
    check_training(options)
    typed_sizes(options)
    if not (options.train and options.dev):
        raise ValueError(
            f"--train is {options.train} and --dev {options.dev}; --option sft needs both, or neither for the demo data"
        )
    check_differ(outputs(options))


def outputs(options: Options) -> list[str]:
    answers = [options.dev_out, *([options.test_out] if options.test else [])]
    return [*model_files(options), *answers]


# The command


def run(options: Options) -> None:
    """Trains the model, writes it with its tokenizer, and answers the prompts of dev and test."""
    from minillama.formats.files import read_torch
    from minillama.text.examples import read_examples
    from minillama.training.answering import Instruction

    raw = {split: read_examples(path) for split in SPLITS if (path := getattr(options, split))}
    warn(weak_dev(options, raw))
    judged = [split for split in raw if split != "train"]
    for split in judged:
        check_default_output(options, split, [example.prompt for example in raw[split]])
    with open_session(options) as session:
        options, tokenizer, run = session.options, session.tokenizer, session.run
        origin = session.origin(raw)
        llama, stop_ids = session.load_llama(", ".join(f"{split} {getattr(options, split)}" for split in raw))
        check_causal(llama)
        config = llama.config
        window = training_window(options, config)
        data, width = tokenize_data(options, raw, tokenizer, window)
        if options.lora_rank:
            add_lora(options, llama)
        task = Instruction(
            data["train"],
            data["dev"],
            tokenizer,
            epochs=options.epochs,
            batch_size=options.batch_size,
            window=width,
            seed=options.seed,
            max_new_tokens=options.max_new_tokens,
            answer_rows=options.answer_rows,
        )

        write_best = session.best_writer(config, stop_ids)
        session.seed_dropout()
        if options.plan:
            return plan_examples(session, llama, task, data)
        model = session.train(llama, task, write_best, dynamic=True)
        if session.processes.is_main:  # read the file, because the model in memory may be sharded
            opened = write_merged(session, config, stop_ids, read_torch(run.best_path)["model"])
        answer(session, model, {split: data[split] for split in judged}, origin)
        if session.processes.is_main:
            report_next(*opened, "--temperature", "0", "--prompt", data["dev"][0].prompt)


def tokenize_data(
    options: Options, raw: dict[str, list[Example]], tokenizer: Tokenizer, window: int
) -> tuple[dict[str, list[Example]], int]:
    """The tokenized examples of each split, and the tokens per row: --window, else the length of the longest example.
    Prints one warning if prompts were cut to the window.
    """
    from minillama.text.examples import tokenize_examples

    data, cut = {}, 0
    for split, examples in raw.items():
        data[split], cut_here = tokenize_examples(
            getattr(options, split), examples, tokenizer, window, options.max_new_tokens
        )
        cut += cut_here
    if cut:
        report(
            f"warning: the start of {cut} prompts was cut: a row holds {window} tokens, of which an answer may "
            f"take --max_new_tokens {options.max_new_tokens}"
        )
    train = data["train"]
    size, targets = (
        sum(numbers) / len(train) for numbers in zip(*((len(e.ids), e.targets) for e in train), strict=True)
    )
    width = options.window or max(len(example.ids) - 1 for example in (*train, *data["dev"]))
    report(
        f"examples    {', '.join(f'{len(examples):,} {split}' for split, examples in data.items())}; mean {size:.0f} "
        f"tokens, {targets:.1f} of them targets; rows of {width} tokens"
    )
    return data, width


def write_merged(
    session: Session, config: LlamaConfig, stop_ids: tuple[int, ...], state: dict[str, Tensor]
) -> list[str]:
    """Writes the model with `state`, its best weights, and LoRA merged. Returns the arguments that open the
    model.
    """
    from llama import Llama
    from lora import apply_lora, merge_lora_weights

    options = session.options
    llama = Llama(config)
    if options.lora_rank:
        apply_lora(llama, **lora_settings(options))
    llama.load_state_dict(state)
    merge_lora_weights(llama)
    return session.write_model(llama.state_dict(), config, stop_ids)


def answer(session: Session, model: nn.Module, data: dict[str, list[Example]], origin: Origin | None) -> None:
    """Answers the prompts of each split and writes the answers with their records. Reports the scores, even if a file
    cannot be written or the user stops the command.
    """
    from minillama.text.examples import write_answers
    from minillama.training.evaluation import answer_prompts, answer_scores, describe_answers

    options, run, is_main = session.options, session.run, session.processes.is_main
    answers = {}
    try:
        for split, examples in data.items():
            answers[split] = answer_prompts(
                model,
                examples,
                session.tokenizer,
                options.batch_size,
                options.max_new_tokens,
                dtype=session.dtype,
                processes=session.processes,
                name=split,
            )
        if origin is not None:
            for split, found in answers.items():
                prompts = [example.prompt for example in data[split]]
                write = partial(write_answers, answers=found, examples=data[split])
                write_with_record(options, origin, split, prompts, write, **answer_scores(found, data[split]))
    finally:
        scores: dict[str, float] = {}
        for split, found in answers.items() if is_main else ():
            line = f"{split} {describe_answers(found, data[split])} ({len(data[split])} rows)"
            print(line, flush=True)
            run.log(line)
            scores |= {f"{split}_{name}": value for name, value in answer_scores(found, data[split]).items()}
        if len(answers) == len(data):
            run.finish(**scores)


COMMAND = Command(
    "sft",
    "train a language model to answer prompts",
    (DATA, NEW_MODEL, flags.TRAINING, flags.LORA, flags.RUN, flags.TRAINED_MODEL, flags.DEVICE),
    run,
    """
python run_llama.py --option sft --pretrained-model-path data/mini-llama.safetensors --model_out answers.safetensors
python run_llama.py --option sft --train data/demo-qa-train.jsonl --dev data/demo-qa-dev.jsonl --lora_rank 4 \\
    --pretrained-model-path data/mini-llama.safetensors --model_out answers.safetensors
""",
    defaults={
        "lr": LR,
        "batch_size": 16,
        "schedule": "cosine",
        "warmup_steps": 20,
        "max_grad_norm": 1.0,
        "max_new_tokens": 32,
        "epochs": 4,
        "lora_rank": None,
        "train": None,
        "dev": None,
        "test": None,
        "dev_out": "sft-dev-answers.jsonl",
        "test_out": "sft-test-answers.jsonl",
    },
    default_texts={
        "lr": f"{LR:g}; {TRAINED_BY['lr']:g} for a new model",
        "optimizer": "adamw; muon for a new model",
        "train": "the demo data, data/demo-qa-train.jsonl",
        "dev": "the demo data",
        "test": "none, or the demo data if --train and --dev are missing",
        "lora_rank": "train all weights",
        "window": "the length of the longest example",
        "out_dtype": "fp32",
    },
    resolve=resolve,
    check=check,
    inputs=lambda options: [
        *([] if is_new(options) else [options.pretrained_model_path]),
        options.train,
        options.dev,
        options.test,
    ],
    outputs=outputs,
    trains=True,
)
