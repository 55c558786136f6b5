"""The options of run_llama.py, and the checks that need no more than them. Imports no torch: `--help` stays instant."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from command_line import COUNT, COUNT_OR_ZERO, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, OneLineParser, number
from config import NORMS, PRESETS

COURSE_PROMPT = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
OPTIONS = ("generate", "prompt", "finetune", "lora", "pretrain", "sft", "perplexity", "tokenizer", "convert")
TRAINING = ("finetune", "lora", "pretrain", "sft")
# Where pretraining wants another default than fine-tuning.
PRETRAINING_DEFAULTS = {
    "lr": 1e-3,
    "batch_size": 32,
    "schedule": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "adam_beta2": 0.95,
    "epochs": 1,
    "held_out": 0.01,
}
# And where supervised fine-tuning does. No data named: the demo data; no rank given: all weights are trained.
SFT_DEFAULTS = {
    "lr": 5e-4,
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
}
OPTION_DEFAULTS: dict[str, dict[str, Any]] = {"pretrain": PRETRAINING_DEFAULTS, "sft": SFT_DEFAULTS}
TOKENS = number(int, "a whole number from 0 to 1,000,000", lambda value: 0 <= value <= 1_000_000)
FILE_FORMATS = ("safetensors", "llama2c-v0", "llama2c-v1", "llama2c-v2", "gguf")
FOLDER_FORMATS = ("huggingface", "peft")
DEFAULT_PRESET = "mini"  # the bundled model's sizes
RUNS = "runs"  # where a run's folder is made
RUN_FILES = ("options.json", "metrics.jsonl", "log.txt", "last.pt", "last.json", "best.pt")
CORPUS_ENDINGS = (".txt", ".tokens")
OUTPUT_ENDINGS = {"prompt": "prompting-output.txt", "finetune": "finetuning-output.txt", "lora": "lora-output.txt"}

EXAMPLES = """\
examples:
  python run_llama.py --option generate --prompt "Once upon a time" --temperature 0.8
  python run_llama.py --option prompt --batch_size 10 --train data/sst-train.txt --dev data/sst-dev.txt \\
      --test data/sst-test.txt --label-names data/sst-label-mapping.json \\
      --dev_out sst-dev-prompting-output.txt --test_out sst-test-prompting-output.txt
  python run_llama.py --option finetune --epochs 5 --lr 2e-5 --batch_size 80 --train data/sst-train.txt \\
      --dev data/sst-dev.txt --test data/sst-test.txt --label-names data/sst-label-mapping.json \\
      --dev_out sst-dev-finetuning-output.txt --test_out sst-test-finetuning-output.txt
  python run_llama.py --option tokenizer --corpus stories/ --vocab_size 4096 --model_out mine.model
  python run_llama.py --option pretrain --corpus stories/ reviews.txt=3 --tokenizer mine.model \\
      --model_out mine.safetensors
  python run_llama.py --option sft --train train.jsonl --dev dev.jsonl --model_out answers.safetensors
  python run_llama.py --option perplexity --corpus other.txt --pretrained-model-path mine.safetensors
  python run_llama.py --option convert --to huggingface --model_out mine --pretrained-model-path mine.safetensors
  python run_llama.py --option lora --lora_rank 4 --lora_alpha 1.0 --lr 2e-5 --batch_size 10 \\
      --dev_out cfimdb-dev-lora-output.txt --test_out cfimdb-test-lora-output.txt
"""


def build_parser() -> argparse.ArgumentParser:
    """The options, grouped; every default is written here and nowhere else."""
    parser = OneLineParser(
        prog="run_llama.py",
        description="Runs a Llama: generates text, classifies by prompting, fine-tunes, also with LoRA, pretrains.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--option",
        choices=OPTIONS,
        default="generate",
        help="what to do: continue a prompt; classify sentences by asking the model; train all weights and "
        "a classifier head; train LoRA adapters and a head; train a language model on text; train one to answer "
        "prompts; tell how well a model predicts a text; make a tokenizer from text; write a checkpoint in another "
        "format (default: %(default)s)",
    )
    add("--seed", type=SEED, default=1337, help="seed of every random draw (default: %(default)s)")

    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained-model-path",
        default="stories42M.pt",
        metavar="PATH",
        help="checkpoint: the course's .pt or ours, our .safetensors, llama2.c's .pt or .bin, or a folder as Meta "
        "(Llama 1 to 3.2) or Hugging Face has it; told apart by what is in it. pretrain starts from random weights "
        "unless it is given (default: %(default)s, and where that is missing the bundled model)",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="SentencePiece model, Llama 3's tokenizer.model, GPT-2's pair of files, or a tokenizer.json (default: "
        "the one with the checkpoint, else tokenizer.model, else data/tokenizer.model; for a new model the bundled "
        "one)",
    )
    add(
        "--adapter",
        metavar="PATH",
        help="LoRA adapter merged into the model: a file of --option lora, or a folder that peft saved (default: none)",
    )
    add("--norm", choices=NORMS, help="the model's norm (default: what the checkpoint says; a new one: layernorm)")
    add(
        "--attention",
        choices=("causal", "bidirectional"),
        help="whether a token sees what follows it (default: what the checkpoint says; the course's are bidirectional, "
        "new ones causal)",
    )

    add = parser.add_argument_group("device and precision").add_argument
    add("--use_gpu", action="store_true", help="run on the first CUDA device")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu, or cuda with --use_gpu)")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the matrix products; weights that are trained stay float32. auto: bf16 where the hardware "
        "multiplies it itself, else fp32; fp32 for generation on the CPU (default: %(default)s)",
    )

    add = parser.add_argument_group("generate").add_argument
    add("--prompt", default=COURSE_PROMPT, metavar="TEXT", help="what to continue (default: the course's film review)")
    add(
        "--chat",
        action="store_true",
        help="the prompt is what a user says, the continuation the reply, in the format of Llama 2's or Llama 3's chat "
        "models, whichever the tokenizer is; prints the reply alone",
    )
    add("--system", metavar="TEXT", help="with --chat: what the model is told before (default: nothing)")
    add("--max_new_tokens", type=TOKENS, default=75, metavar="N", help="tokens to add (default: %(default)s)")
    add(
        "--temperature",
        type=NOT_NEGATIVE,
        metavar="T",
        help="0 takes the likeliest token, 1 samples as the model thinks. Prints one continuation and writes no file "
        "(default: one at 0 and one at 1, each written to its file)",
    )
    add(
        "--epsilon",
        type=FRACTION,
        default=0.05,
        metavar="E",
        help="sample only tokens of at least this probability; 0 keeps all (default: %(default)s)",
    )
    add(
        "--generated_sentence_low_temp_out",
        default="generated-sentence-temp-0.txt",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    add(
        "--generated_sentence_high_temp_out",
        default="generated-sentence-temp-1.txt",
        metavar="FILE",
        help="(default: %(default)s)",
    )

    add = parser.add_argument_group("data of prompt, finetune and lora (lines of `label ||| sentence`)").add_argument
    for split in ("train", "dev", "test"):
        add(f"--{split}", default=f"data/cfimdb-{split}.txt", metavar="FILE", help="(default: %(default)s)")
    add(
        "--label-names",
        default="data/cfimdb-label-mapping.json",
        metavar="FILE",
        help="class names, a JSON list (default: %(default)s)",
    )
    add(
        "--max_sentence_len",
        type=COUNT,
        metavar="N",
        help="cut sentences to N tokens (default: to the model's context)",
    )
    add(
        "--dev_out",
        default="cfimdb-dev-prompting-output.txt",
        metavar="FILE",
        help="predictions for dev (default: %(default)s)",
    )
    add(
        "--test_out",
        default="cfimdb-test-prompting-output.txt",
        metavar="FILE",
        help="predictions for test (default: %(default)s)",
    )
    add("--batch_size", type=COUNT, default=8, metavar="N", help="rows a step (default: %(default)s)")
    add(
        "--pooling",
        choices=("last_token", "last_column"),
        default="last_token",
        help="what is read of a row: its last real token, padding masked; or, as the course does it, the batch's last "
        "column, padding and all (default: %(default)s)",
    )

    add = parser.add_argument_group("training (finetune, lora, pretrain, sft)").add_argument
    add(
        "--adam_beta2",
        type=FRACTION,
        default=0.999,
        metavar="B",
        help="AdamW's memory of squared gradients (default: %(default)s)",
    )
    add("--epochs", type=COUNT, default=5, metavar="N", help="passes over the training set (default: %(default)s)")
    add("--lr", type=POSITIVE, default=2e-5, help="learning rate; LoRA likes ten times more (default: %(default)s)")
    add(
        "--hidden_dropout_prob",
        type=FRACTION,
        default=0.3,
        metavar="P",
        help="dropout before the head (default: %(default)s)",
    )
    add(
        "--dropout",
        type=FRACTION,
        metavar="P",
        help="dropout inside the model: of embeddings, attention weights and what each block adds (default: what the "
        "checkpoint says, mostly 0)",
    )
    add(
        "--micro_batch_size",
        type=COUNT,
        metavar="N",
        help="rows computed at once, where --batch_size rows do not fit into memory; the step is the same "
        "(default: all of the batch)",
    )
    add("--schedule", choices=("constant", "cosine"), default="constant", help="of --lr (default: %(default)s)")
    add(
        "--warmup_steps",
        type=COUNT_OR_ZERO,
        default=0,
        metavar="N",
        help="steps in which --lr is reached, from nearly 0 (default: %(default)s)",
    )
    add("--min_lr", type=NOT_NEGATIVE, default=0.0, help="where the cosine ends (default: %(default)s)")
    add(
        "--weight_decay",
        type=NOT_NEGATIVE,
        default=0.0,
        metavar="W",
        help="of matrices, not of norms and biases (default: %(default)s)",
    )
    add("--max_grad_norm", type=POSITIVE, metavar="G", help="clip the gradient's norm to G (default: leave it)")
    add(
        "--label_smoothing",
        type=FRACTION,
        default=0.0,
        metavar="S",
        help="spread S of each label over all classes (default: %(default)s)",
    )
    add("--patience", type=COUNT, metavar="N", help="stop after N epochs without a better dev (default: never)")
    add("--eval_train", action="store_true", help="score the whole training set after each epoch, too")
    add("--lora_rank", type=COUNT, default=4, metavar="R", help="rank of the LoRA update (default: %(default)s)")
    add(
        "--lora_alpha",
        type=POSITIVE,
        default=1.0,
        metavar="A",
        help="the update counts alpha / rank (default: %(default)s)",
    )

    add = parser.add_argument_group(
        "language models (pretrain, perplexity, tokenizer)",
        "Pretraining has defaults of its own: "
        + ", ".join(f"--{name} {value}" for name, value in PRETRAINING_DEFAULTS.items())
        + ". With --pretrained-model-path it goes on from that checkpoint, else it starts from random weights.",
    ).add_argument
    add(
        "--corpus",
        nargs="+",
        default=[],
        metavar="TEXT[=WEIGHT]",
        help="text files, or folders of .txt files; <|endoftext|> parts documents. WEIGHT: how often its text comes in "
        "one pass (1)",
    )
    add(
        "--held_out",
        type=NOT_NEGATIVE,
        default=0.0,
        metavar="N",
        help="the last documents of each text, a share below 1 or a number: pretrain keeps them to judge by, "
        "perplexity reads them alone (default: all of it)",
    )
    add("--preset", choices=PRESETS, help="sizes of a new model (default: mini, the bundled model's)")
    for name, what in (
        ("dim", "width"),
        ("n_layers", "layers"),
        ("n_heads", "query heads"),
        ("n_kv_heads", "key/value heads"),
        ("max_seq_len", "context in tokens"),
    ):
        add(f"--{name}", type=COUNT, metavar="N", help=f"{what} of a new model (default: the preset's)")
    add(
        "--window",
        type=COUNT,
        metavar="N",
        help="tokens of one row; in training one document follows another in it (default: the model's context; sft: "
        "what its longest example takes)",
    )
    add("--stride", type=COUNT, metavar="N", help="perplexity: tokens between windows (default: half the window)")
    add("--max_steps", type=COUNT, metavar="N", help="stop after N steps (default: --epochs passes over the corpus)")
    add("--eval_every", type=COUNT, default=200, metavar="N", help="judge every N steps (default: %(default)s)")
    add("--sample_prompt", default="Once upon a time", metavar="TEXT", help="continued after each judgement")
    add("--tokens_dir", default="runs/tokens", metavar="DIR", help="where tokenized texts go (default: %(default)s)")
    add(
        "--vocab_size",
        type=COUNT,
        metavar="N",
        help="pieces of a new tokenizer (default: 4096); a new model has its tokenizer's",
    )
    add(
        "--out_dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of --model_out (default: fp32, for convert what the checkpoint has; llama2.c's are always fp32 or int8)",
    )
    add(
        "--model_out",
        metavar="PATH",
        help="where the model or tokenizer goes; a safetensors file gets its tokenizer beside it",
    )

    own = ", ".join(f"--{name} {value}" for name, value in SFT_DEFAULTS.items() if value is not None)
    add = parser.add_argument_group(
        "supervised fine-tuning (sft)",
        'Trains on --train and --dev, and answers --test if there is one: lines of {"prompt": "...", "answer": "..."} '
        "(default: the demo data, data/demo-qa-*). All weights, or with --lora_rank LoRA's, merged in at the end; "
        "examples that fit share a row of --window tokens, and do not see each other. It has defaults of its own: "
        f"{own}.",
    ).add_argument
    add(
        "--answer_rows",
        type=COUNT_OR_ZERO,
        default=200,
        metavar="N",
        help="rows of dev, evenly spread, that are answered after each epoch, to keep the best by token F1; 0: to keep "
        "the best by dev loss (default: %(default)s)",
    )

    add = parser.add_argument_group("convert").add_argument
    add(
        "--to",
        choices=(*FILE_FORMATS, *FOLDER_FORMATS),
        default="safetensors",
        help="what --model_out becomes: a file of ours, of llama2.c (v2: int8) or of llama.cpp, or a folder of "
        "transformers, or, for an --adapter, of peft (default: %(default)s)",
    )

    add = parser.add_argument_group("the run (finetune, lora, pretrain, sft)").add_argument
    add(
        "--run_dir",
        metavar="DIR",
        help="where options, metrics, log and checkpoints of the run go (default: a new folder under runs/)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the run in --run_dir (default: the latest under runs/), to the very same result. It has the "
        "options it was started with; those that change a number cannot be changed",
    )
    add(
        "--save_every",
        type=COUNT,
        default=500,
        metavar="N",
        help="save the state every N steps, and after each epoch (default: %(default)s)",
    )
    add(
        "--fsdp",
        action="store_true",
        help="shard the model over the processes that torchrun starts, instead of a copy in each",
    )
    add("--compile", action="store_true", help="compile the model with torch.compile: slow to start")
    return parser


def parse_options(
    argv: list[str] | None, saved: dict[str, Any] | None = None
) -> tuple[argparse.Namespace, frozenset[str]]:
    """The options, and the names of those that were typed. `saved`: the defaults of a run that goes on."""
    parser = build_parser()
    absent = object()
    names = vars(parser.parse_args([]))
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    given = {name: value for name, value in vars(typed).items() if value is not absent}
    defaults = OPTION_DEFAULTS.get(given.get("option", ""), {})
    # What pretraining starts from: a checkpoint that was named, or random weights.
    derived = {"continued": "pretrained_model_path" in given}
    return argparse.Namespace(**(names | derived | defaults | (saved or {}) | given)), frozenset(given)


def flag(name: str) -> str:
    """How an option is typed, from its name in the program."""
    spellings = {action.dest: action.option_strings[0] for action in build_parser()._actions}
    return spellings.get(name, name)


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other; needs no torch and touches no file."""
    clashes = {str(Path(path).resolve()) for path in input_files(args)}
    folders = {Path(path).resolve() for path in (args.pretrained_model_path, args.adapter, args.tokenizer) if path}
    for path in output_files(args):
        if around := folders & set(Path(path).resolve().parents):
            raise ValueError(f"{path} lies in {around.pop()}, which is read; write it elsewhere")
        if str(Path(path).resolve()) in clashes:
            raise ValueError(f"{path} is to be read and to be written; give another name for what is written")
    for text in args.corpus:
        folder = Path(text_and_weight(text)[0]).resolve()
        for path in output_files(args):
            inside = folder in Path(path).resolve().parents
            if inside and Path(path).suffix in CORPUS_ENDINGS:
                raise ValueError(f"{path} would be one of the texts of --corpus {text}; write it elsewhere")
        if args.option == "pretrain" and folder in Path(args.run_dir or RUNS, "a").resolve().parents:
            raise ValueError(
                f"the run's folder, {args.run_dir or RUNS}, lies in --corpus {text}, and its log would be one of the "
                "texts; give the texts a folder of their own, or a --run_dir elsewhere"
            )
    if args.run_dir is not None:
        for path in output_files(args):
            if Path(path).resolve().parent == Path(args.run_dir).resolve() and Path(path).name in RUN_FILES:
                raise ValueError(f"{path} is a file of the run's own; give another name")
    if args.use_gpu and args.device and not args.device.startswith("cuda"):
        raise ValueError(f"--use_gpu contradicts --device {args.device}; give one of them")
    if args.option not in TRAINING:
        for name in ("run_dir", "fsdp"):
            if getattr(args, name):
                raise ValueError(f"--{name} belongs to --option {', '.join(TRAINING)}; leave it out for {args.option}")
    if args.adapter is not None and args.option in (*TRAINING, "tokenizer"):
        raise ValueError(f"--adapter is for a model that is run or converted; leave it out for --option {args.option}")
    if args.option == "convert":
        if args.to == "peft" and args.adapter is None:
            raise ValueError("--to peft writes an adapter; say which with --adapter")
        return
    if args.system is not None and not args.chat:
        raise ValueError("--system is part of a chat; add --chat")
    if args.option == "generate":
        low, high = args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out
        if Path(low).resolve() == Path(high).resolve() and Path(low).resolve() != Path(os.devnull):
            raise ValueError(f"both generated sentences would go to {low}; give two files")
        return
    if args.pooling == "last_column" and (args.micro_batch_size or args.processes > 1):
        raise ValueError(
            "--pooling last_column reads the padding of a whole batch, so a batch cannot be parted: leave out "
            "--micro_batch_size, and run one process"
        )
    if args.fsdp and args.dtype == "fp16":
        raise ValueError("--fsdp does not go with --dtype fp16 (each shard would judge its scale alone); give bf16")
    if args.min_lr > args.lr:
        raise ValueError(f"--min_lr {args.min_lr:g} is above --lr {args.lr:g}; it must not be")
    if args.option in ("pretrain", "perplexity", "tokenizer"):
        if not args.corpus:
            raise ValueError(f"--option {args.option} needs --corpus: text files, or folders of them")
        if args.option != "pretrain" and any(text_and_weight(text)[1] != 1.0 for text in args.corpus):
            raise ValueError(f"--option {args.option} reads each text once; leave out the weights of --corpus")
        return
    if args.option == "sft":
        if not (args.train and args.dev):
            raise ValueError(
                f"--train is {args.train} and --dev {args.dev}; --option sft needs both, or none for the demo"
            )
        paths = output_files(args)
        if twice := [path for path in paths if [Path(one).resolve() for one in paths].count(Path(path).resolve()) > 1]:
            raise ValueError(f"{twice[0]} would be written twice; give two files")
        return
    ending = OUTPUT_ENDINGS[args.option]
    for option, path, split in (("--dev_out", args.dev_out, "dev"), ("--test_out", args.test_out, "test")):
        if not path.endswith(f"{split}-{ending}"):
            raise ValueError(f"{option} is {path}; for --option {args.option} its name must end in {split}-{ending}")
    if Path(args.dev_out).resolve() == Path(args.test_out).resolve():
        raise ValueError(f"--dev_out and --test_out are both {args.dev_out}; give two files")


def input_files(args: argparse.Namespace) -> list[str]:
    """Every file that the run reads, as far as the options tell."""
    new = args.option == "tokenizer" or (args.option == "pretrain" and not args.continued)
    named = [args.tokenizer, args.adapter, *([] if new else [args.pretrained_model_path])]
    if args.option in OUTPUT_ENDINGS:
        named += [args.train, args.dev, args.test, args.label_names]
    if args.option == "sft":
        named += [args.train, args.dev, args.test]
    return [path for path in named if path] + [text_and_weight(text)[0] for text in args.corpus]


def output_files(args: argparse.Namespace) -> list[str]:
    """Every file that the run will write, beside its folder."""
    if args.option == "generate":
        both = [args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out]
        return both if args.temperature is None else []
    if args.option in ("pretrain", "sft", "tokenizer", "convert"):
        if not args.model_out:
            raise ValueError(f"--option {args.option} needs --model_out, the file to write")
        if args.option == "convert" and args.to in FOLDER_FORMATS:
            return []  # a folder, made anew
        if args.option == "convert" and args.to != "safetensors":
            return [args.model_out]
        beside = tokenizer_beside(args.model_out)
        if args.option != "tokenizer" and beside == str(Path(args.model_out)):
            raise ValueError(
                f"--model_out {args.model_out} is where its tokenizer would go; let it end in .safetensors"
            )
        stays = args.option == "tokenizer" or (
            args.tokenizer and Path(args.tokenizer).resolve() == Path(beside).resolve()
        )
        answers = [args.dev_out, *([args.test_out] if args.test else [])] if args.option == "sft" else []
        return [args.model_out, *([] if stays else [beside]), *answers]
    if args.option == "perplexity":
        return []
    return [args.dev_out, args.test_out, *([best_model_path(args)] if args.option != "prompt" else [])]


def tokenizer_beside(model: str) -> str:
    """Where the tokenizer of a checkpoint is looked for first: beside it, under its name."""
    return str(Path(model).with_suffix(".model"))


def text_and_weight(text: str) -> tuple[str, float]:
    """The path and the weight of a `--corpus`. Raises ValueError if there is no path, or what follows the last `=` is
    no number above 0.
    """
    path, sign, weight = text.rpartition("=")
    if not text or (sign and not path):
        raise ValueError(f"--corpus {text!r} names no text; give a text file, or a folder of them")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return path, POSITIVE(weight)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--corpus {text}: the weight {error}") from error


def best_model_path(args: argparse.Namespace) -> str:
    """Where finetune and lora keep the best model."""
    return f"{args.option}-{args.epochs}-{args.lr}.pt"
