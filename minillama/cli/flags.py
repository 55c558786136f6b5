"""Flags that several commands share, in groups. The module of a command declares the flags that only it has.

Imports no torch, so that `--help` stays instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from config import NORMS
from minillama.cli.data_files import columns
from minillama.cli.options import Flag, Group, OwnFlag
from minillama.cli.parser import COUNT, COUNT_OR_ZERO, FRACTION, NOT_NEGATIVE, POSITIVE, SHARE, number
from minillama.formats.names import COURSE_TEMPLATE, RUNS

COURSE_PROMPT = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
TOKENS = number(int, "a whole number from 0 to 1,000,000", lambda value: 0 <= value <= 1_000_000)
# Names for --lora_targets that stand for several linear layers of a block.
LORA_TARGETS = {
    "attention": ("compute_query", "compute_key", "compute_value", "compute_output"),
    "mlp": ("w1", "w2", "w3"),
}
LORA_TARGETS["all"] = (*LORA_TARGETS["attention"], *LORA_TARGETS["mlp"])
DEFAULT_PRESET = "mini"  # the bundled model's sizes
LORA_VARIANTS = ("rslora", "lora_plus", "dora", "lora_targets")
DTYPE_NAMES = ("fp32", "bf16", "fp16")


def numbers(kind: type, allowed: str, accepts: Callable[[list[Any]], bool]) -> Callable[[str], list[Any]]:
    """An argparse type: comma-separated numbers. `accepts` checks the list; `allowed` describes it in errors."""

    def parse(text: str) -> list[Any]:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        if not values or not accepts(values):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be {allowed}")
        return values

    return parse


def words(text: str) -> list[str]:
    """An argparse type: two or more different words, separated by commas."""
    found = [word.strip() for word in text.split(",")]
    if len(found) < 2 or not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be two or more different words, as in a,b")
    return found


# The model and the machine

MODEL_PATH = Flag(
    "--pretrained-model-path PATH",
    "checkpoint: the course's .pt or ours, our .safetensors, llama2.c's .pt or .bin, or a folder of Meta (Llama 1 to "
    "3.2) or Hugging Face; the format is detected from the content",
    str,
    "stories42M.pt",
    default_text="stories42M.pt; if that is missing, the bundled model",
)
TOKENIZER = Flag(
    "--tokenizer PATH",
    "SentencePiece model, Llama 3's tokenizer.model, the two files of GPT-2, or a tokenizer.json",
    default_text="the checkpoint's, else tokenizer.model, else data/tokenizer.model",
)
ADAPTER = Flag(
    "--adapter PATH",
    "LoRA adapter to merge into the model: a file of --option lora, or a folder of peft",
    elsewhere="is for commands that run or convert a model",
)
NORM = Flag("--norm", "the model's norm", NORMS, default_text="the checkpoint's; a new model: rmsnorm")
ATTENTION = Flag(
    "--attention",
    "causal: a token attends only to itself and earlier tokens; bidirectional: to all tokens",
    ("causal", "bidirectional"),
    default_text="the checkpoint's; the course's are bidirectional, new models causal",
)
DEVICE = Group(
    "device and precision",
    (
        Flag("--use_gpu", "run on CUDA; of several processes, each on its own card", bool),
        Flag(
            "--device NAME",
            "cpu, cuda, cuda:1, ..., or mps for the GPU of a Mac (untested)",
            default_text="cpu; cuda with --use_gpu",
        ),
        Flag(
            "--deterministic",
            "on CUDA, use only kernels whose results are the same in each run, which are slower; on the CPU all are",
            bool,
        ),
        Flag(
            "--dtype",
            "precision of the matrix products; trained weights stay float32. auto: bf16 where the hardware supports "
            "it, else fp32; fp32 for generation on the CPU",
            ("auto", *DTYPE_NAMES),
            "auto",
        ),
    ),
)
QUANTIZE = Flag(
    "--quantize",
    "keep the weights in 8 bits: smaller and faster, slightly less accurate",
    ("int8",),
    elsewhere="is for commands that only run a model",
)
TRAINED_MODEL = Group("model", (MODEL_PATH, TOKENIZER, NORM, ATTENTION))
MODEL = Group("model", (MODEL_PATH, TOKENIZER, ADAPTER, NORM, ATTENTION))

# Texts

PROMPT = Flag(
    "--prompt TEXT",
    "the text to continue, or the sentence to classify",
    str,
    COURSE_PROMPT,
    default_text="the film review of the course",
)
PROMPT_FILE = OwnFlag(
    "--prompt_file FILE",
    "instead of --prompt: each line of a file (-: standard input) is a prompt, for classify also each row of a table; "
    "--batch_size of them form a batch. Above temperature 0, a text depends on the other lines of its batch",
)
INTERACTIVE = OwnFlag(
    "--interactive",
    "ask for prompts one by one, with --chat as one conversation; Ctrl-C stops an answer; Ctrl-D, or the line quit, "
    "exit or :q, ends the program",
    bool,
)
JSON = OwnFlag("--json", "print one JSON object per line, for use by programs", bool)
MAX_NEW_TOKENS = Flag("--max_new_tokens N", "maximum number of new tokens", TOKENS, 75)
CORPUS = Flag(
    "--corpus TEXT[=WEIGHT]",
    "text files, or folders of .txt files; <|endoftext|> separates documents. WEIGHT (pretrain): how often one "
    "pass reads the text (default 1)",
    str,
    [],
    nargs="+",
)
HELD_OUT = Flag(
    "--held_out N",
    "hold out the last documents of each text, a fraction below 1 or a count: pretrain evaluates on them, perplexity "
    "reads only them",
    NOT_NEGATIVE,
    0.0,
    default_text="0: all documents",
)
WINDOW = Flag(
    "--window N",
    "tokens per row; a row of training data holds several documents in sequence",
    COUNT,
    default_text="the model's context; sft: the length of the longest example",
)
VOCAB_SIZE = Flag(
    "--vocab_size N", "vocabulary size of a new tokenizer; models take their tokenizer's", COUNT, default_text="4096"
)
OPTIMIZER = OwnFlag(
    "--optimizer",
    "muon trains the matrices of the layers by Muon, and everything else by AdamW",
    ("adamw", "muon"),
    "adamw",
)

# Labelled rows

FINETUNED = Flag(
    "--finetuned PATH", "the folder of a run, its best.pt, or the .pt file that finetune, lora or wise_ft wrote"
)
ROW_FORMATS = """\
A data file is a .csv (comma, semicolon or tab), a .tsv or a .jsonl, or has lines of `label ||| sentence`.
Columns are found by usual names such as text and label, or by --columns; else the label is the first column.
PATH#fold=PATTERN reads only the rows whose fold matches, as in "reviews.tsv#fold=cv[0-8]*"."""
TRAIN_ALONE = (
    "With --train FILE alone, a tenth of it is held out as dev, nothing is tested, and its labels are the classes."
)
TRAIN, DEV, TEST = (
    Flag(
        f"--{split} FILE",
        f"{what} data{more}",
        str,
        f"data/cfimdb-{split}.txt",
        default_text=f"{own}; without --train, data/cfimdb-{split}.txt or the demo data".removeprefix("; "),
    )
    for split, what, more, own in (
        ("train", "training", "", ""),
        ("dev", "development", ", or the share of --train to hold out, as in 0.2", "0.1"),
        ("test", "test", "", "none"),
    )
)
COLUMNS = Flag(
    "--columns text=NAME,label=NAME",
    "the columns of a table to read, by name or number; text=title+body joins two; fold=NAME is for #fold",
    columns,
    default_text="those with usual names",
)
LABEL_NAMES = Flag(
    "--label-names FILE",
    'JSON: a list of class names, for the labels 0, 1, ...; or an object from labels to class names, as in {"0": '
    '"bad", "1": null, "2": "good"}. null skips the rows of a label; class ids follow the order of first appearance',
    str,
    "data/cfimdb-label-mapping.json",
    default_text="the labels in --train; without --train, data/cfimdb-label-mapping.json or that of the demo data",
)
DEV_OUT, TEST_OUT = (
    Flag(
        f"--{split}_out FILE",
        f"predictions for {split}; a .csv or .jsonl has probabilities and the columns of the data",
        str,
        f"cfimdb-{split}-prompting-output.txt",
    )
    for split in ("dev", "test")
)
DATA = Group("data", (TRAIN, DEV, TEST, COLUMNS, LABEL_NAMES, DEV_OUT, TEST_OUT), f"{ROW_FORMATS}\n{TRAIN_ALONE}")
BATCH_SIZE = Flag("--batch_size N", "rows per step", COUNT, 8)
ROWS = Group(
    "rows",
    (
        Flag("--max_sentence_len N", "cut sentences to N tokens", COUNT, default_text="to the model's context"),
        BATCH_SIZE,
        Flag(
            "--pooling",
            "whose state the head reads; last_token: the last real token's; mean: the mean over all real tokens, "
            "better for LoRA and for long texts; last_column: as in the course, that of the batch's last column, even "
            "if it is padding",
            ("last_token", "mean", "last_column"),
            "last_token",
        ),
    ),
)
TEMPLATE = Flag(
    "--template TEXT",
    "the prompt for a row; {sentence} is the row's sentence, {labels} a list such as `bad, average, or good`; a space "
    "and the label follow it; in a row that is too long, the end of the sentence is cut",
    str,
    COURSE_TEMPLATE,
    elsewhere="belongs to --option prompt and to --head prompt of finetune and lora",
)
LABEL_WORDS = Flag(
    "--label_words W1,W2,...",
    "the words for the classes in the prompt, in the order of the class ids",
    words,
    default_text="the class names",
    elsewhere=TEMPLATE.elsewhere,
)

# Training

CLASS_WEIGHTS = OwnFlag(
    "--class_weights",
    "balanced: multiply the loss of each row by N / (K * n), for N training rows, K classes, and n rows of its class; "
    "rare classes then count as much as frequent ones",
    ("none", "balanced"),
    "none",
)
TRAINING = Group(
    "training",
    (
        Flag("--epochs N", "passes over the training set", COUNT, 5),
        Flag("--lr RATE", "learning rate; LoRA needs about ten times more than full fine-tuning", POSITIVE, 2e-5),
        Flag("--schedule", "shape of the learning rate after the warmup", ("constant", "cosine", "linear"), "constant"),
        Flag(
            "--decay_share S",
            "share of the steps, at the end, in which the linear schedule falls; the rate is constant before",
            SHARE,
            1.0,
        ),
        Flag("--warmup_steps N", "steps over which the learning rate rises to --lr", COUNT_OR_ZERO, 0),
        Flag("--min_lr RATE", "final learning rate of the cosine and the linear schedule", NOT_NEGATIVE, 0.0),
        Flag("--weight_decay W", "weight decay of matrices; norms and biases have none", NOT_NEGATIVE, 0.0),
        Flag(
            "--layer_decay D",
            "from each layer to the one below, and to the embedding at last, the learning rate is multiplied by D",
            SHARE,
            1.0,
        ),
        Flag("--adam_beta2 B", "AdamW's decay rate for the average of squared gradients", FRACTION, 0.999),
        Flag("--max_grad_norm G", "clip the norm of the gradient to G", POSITIVE),
        Flag(
            "--dropout P",
            "dropout inside the model: embeddings, attention weights and the output of each block",
            FRACTION,
            default_text="the checkpoint's, usually 0",
        ),
        Flag(
            "--micro_batch_size N",
            "most rows in a forward pass, if --batch_size rows do not fit into memory; the step stays the same",
            COUNT,
            default_text="the whole batch, or pieces that save padding",
        ),
        Flag("--patience N", "stop after N epochs without a better dev score", COUNT),
    ),
)
PLAN = OwnFlag(
    "--plan",
    "train nothing and write nothing: print what the data hold, the memory and time that the run needs, and what a "
    "model has to beat; --json prints it as JSON. Exit code 3: the memory does not suffice",
    bool,
)
RUN = Group(
    "the run",
    (
        PLAN,
        JSON,
        OwnFlag(
            "--run_dir DIR",
            "folder for the run's options, metrics, log and checkpoints, and, if the package tensorboard is installed, "
            f"events for it (`tensorboard --logdir {RUNS}`)",
            default_text=f"a new folder under {RUNS}/",
        ),
        Flag(
            "--resume",
            "continue the run in --run_dir (default: the latest under runs/) with its original options; the result is "
            "exactly that of an uninterrupted run. With a larger --epochs the run goes on longer; a finished run needs "
            "--keep_state for that",
            bool,
        ),
        OwnFlag(
            "--keep_state",
            "keep the optimizer's state of the finished run, which takes about three times the model's memory, so that "
            "--resume can add epochs",
            bool,
        ),
        Flag("--save_every N", "save the state every N steps, and after each epoch", COUNT, 500),
        OwnFlag("--fsdp", "shard the model over the processes of torchrun, instead of one copy per process", bool),
        Flag("--compile", "compile the model with torch.compile; the start is slow", bool),
    ),
)
LORA = Group(
    "LoRA",
    (
        Flag("--lora_rank R", "rank of the LoRA update", COUNT, 4),
        Flag("--lora_alpha A", "the update is scaled by alpha / rank", POSITIVE, 1.0),
        Flag(
            "--rslora",
            "scale by alpha / sqrt(rank), for high ranks (rsLoRA)",
            bool,
            elsewhere="belongs to --option lora",
        ),
        Flag(
            "--lora_plus RATIO",
            "learning rate of every lora_B, as a multiple of --lr; LoRA+ suggests 16",
            POSITIVE,
            1.0,
            elsewhere="belongs to --option lora",
        ),
        Flag(
            "--dora",
            "train the norm and the direction of each weight row separately (DoRA)",
            bool,
            elsewhere="belongs to --option lora",
        ),
        Flag(
            "--lora_targets NAME",
            f"the weights to adapt: {', '.join(LORA_TARGETS)}, or some of {', '.join(LORA_TARGETS['all'])}",
            str,
            ["attention"],
            default_text="attention",
            elsewhere="belongs to --option lora",
            nargs="+",
            choices=(*LORA_TARGETS, *LORA_TARGETS["all"]),
        ),
    ),
)

# The result

OUT_DTYPE = Flag(
    "--out_dtype",
    "precision of --model_out; llama2.c's formats are always fp32 or int8",
    DTYPE_NAMES,
    default_text="fp32; convert: the checkpoint's own",
)
MODEL_OUT = Flag("--model_out PATH", "the model or tokenizer to write; a model's tokenizer goes into the same folder")
