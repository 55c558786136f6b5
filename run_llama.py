"""The command line: generate text, classify by prompting, fine-tune, fine-tune with LoRA. `--help` says how."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import COUNT, COUNT_OR_ZERO, FRACTION, NOT_NEGATIVE, POSITIVE, SEED, OneLineParser

if TYPE_CHECKING:
    import torch

    from dataset import Row
    from llama import Llama
    from tokenizer import Tokenizer
    from training import Evaluation

COURSE_PROMPT = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
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
  python run_llama.py --option lora --lora_rank 4 --lora_alpha 1.0 --lr 2e-5 --batch_size 10 \\
      --dev_out cfimdb-dev-lora-output.txt --test_out cfimdb-test-lora-output.txt
"""


def build_parser() -> argparse.ArgumentParser:
    """The options, grouped; every default is written here and nowhere else."""
    parser = OneLineParser(
        prog="run_llama.py",
        description="Runs a Llama: generates text, classifies by prompting, fine-tunes, fine-tunes with LoRA.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--option",
        choices=("generate", "prompt", "finetune", "lora"),
        default="generate",
        help="what to do: continue a prompt; classify sentences by asking the model; train all weights and "
        "a classifier head; train LoRA adapters and a head (default: %(default)s)",
    )
    add("--seed", type=SEED, default=1337, help="seed of every random draw (default: %(default)s)")

    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained-model-path",
        default="stories42M.pt",
        metavar="FILE",
        help="checkpoint: the course's .pt, or llama2.c's .bin of version 0 or 1 (default: %(default)s)",
    )
    add("--tokenizer", metavar="FILE", help="SentencePiece model (default: tokenizer.model, else data/tokenizer.model)")
    add("--norm", choices=("layernorm", "rmsnorm"), help="the model's norm (default: what the checkpoint says)")
    add(
        "--attention",
        choices=("causal", "bidirectional"),
        help="whether a token sees what follows it (default: what the checkpoint says; course ones: bidirectional)",
    )

    add = parser.add_argument_group("device and precision").add_argument
    add("--use_gpu", action="store_true", help="run on the first CUDA device")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cpu, or cuda with --use_gpu)")
    add(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the matrix products; weights stay float32. auto: bf16 where the hardware multiplies "
        "it itself, else fp32; fp32 for generation on the CPU (default: %(default)s)",
    )

    add = parser.add_argument_group("generate").add_argument
    add("--prompt", default=COURSE_PROMPT, metavar="TEXT", help="what to continue (default: the course's film review)")
    add("--max_new_tokens", type=COUNT_OR_ZERO, default=75, metavar="N", help="tokens to add (default: %(default)s)")
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

    add = parser.add_argument_group("training (finetune, lora)").add_argument
    add("--epochs", type=COUNT, default=5, metavar="N", help="passes over the training set (default: %(default)s)")
    add("--lr", type=POSITIVE, default=2e-5, help="learning rate; LoRA likes ten times more (default: %(default)s)")
    add(
        "--hidden_dropout_prob",
        type=FRACTION,
        default=0.3,
        metavar="P",
        help="dropout before the head (default: %(default)s)",
    )
    add("--lora_rank", type=COUNT, default=4, metavar="R", help="rank of the LoRA update (default: %(default)s)")
    add(
        "--lora_alpha",
        type=POSITIVE,
        default=1.0,
        metavar="A",
        help="the update counts alpha / rank (default: %(default)s)",
    )
    return parser


def report(line: str) -> None:
    """Prints a line about the run to stderr; stdout is for its result."""
    print(line, file=sys.stderr, flush=True)


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that contradict each other; needs no torch and touches no file."""
    if args.use_gpu and args.device and not args.device.startswith("cuda"):
        raise ValueError(f"--use_gpu contradicts --device {args.device}; give one of them")
    if args.option == "generate":
        return
    ending = OUTPUT_ENDINGS[args.option]
    for option, path, split in (("--dev_out", args.dev_out, "dev"), ("--test_out", args.test_out, "test")):
        if not path.endswith(f"{split}-{ending}"):
            raise ValueError(f"{option} is {path}; for --option {args.option} its name must end in {split}-{ending}")
    if Path(args.dev_out).resolve() == Path(args.test_out).resolve():
        raise ValueError(f"--dev_out and --test_out are both {args.dev_out}; give two files")


def output_files(args: argparse.Namespace) -> list[str]:
    """Every file that the run will write."""
    if args.option == "generate":
        both = [args.generated_sentence_low_temp_out, args.generated_sentence_high_temp_out]
        return both if args.temperature is None else []
    return [args.dev_out, args.test_out, *([best_model_path(args)] if args.option != "prompt" else [])]


def best_model_path(args: argparse.Namespace) -> str:
    """Where finetune and lora keep the best model."""
    return f"{args.option}-{args.epochs}-{args.lr}.pt"


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device asked for. Raises ValueError if there is no such device here."""
    import torch

    name = args.device or ("cuda" if args.use_gpu else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"{name}: no CUDA device is available here; leave out --use_gpu, or give --device cpu"
            ) from error
        raise ValueError(f"--device {name} is not available here; give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; give cpu, cuda or cuda:N")
    return device


def choose_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The precision of the matrix products."""
    from training import DTYPES, bf16_is_native

    if args.dtype != "auto":
        return DTYPES[args.dtype]
    if args.option == "generate" and device.type == "cpu":
        return DTYPES["fp32"]
    return DTYPES["bf16" if bf16_is_native(device) else "fp32"]


def load_llama(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Llama, str]:
    """The backbone, with the overrides of the command line, and its format in words.

    Raises ValueError if its vocabulary is another than the tokenizer's.
    """
    from checkpoint import read_checkpoint
    from llama import llama_from_checkpoint

    checkpoint = read_checkpoint(args.pretrained_model_path)
    if checkpoint.config.vocab_size != tokenizer.n_words:
        raise ValueError(
            f"{args.pretrained_model_path} has a vocabulary of {checkpoint.config.vocab_size}, {tokenizer.path} one of "
            f"{tokenizer.n_words}; give the --tokenizer that the model was trained with"
        )
    causal = None if args.attention is None else args.attention == "causal"
    return llama_from_checkpoint(checkpoint, args.norm, causal), checkpoint.kind


def print_header(
    args: argparse.Namespace, llama: Llama, kind: str, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype
) -> None:
    """What is about to run, on what, from and to which files."""
    config = llama.config
    size = sum(parameter.numel() for parameter in llama.parameters())
    report(f"option      {args.option}, seed {args.seed}")
    report(f"model       {args.pretrained_model_path} ({kind}), {size:,} parameters")
    report(
        f"size        {config.n_layers} layers, dim {config.dim}, {config.n_heads} heads, {config.kv_heads} key/value "
        f"heads, vocabulary {config.vocab_size}, context {config.max_seq_len}"
    )
    report(f"convention  {config.convention}")
    report(f"device      {device}, matrix products in {str(dtype).removeprefix('torch.')}")
    report(f"tokenizer   {tokenizer.path}")
    if args.option != "generate":
        files = ([("train", args.train)] if args.option != "prompt" else []) + [("dev", args.dev), ("test", args.test)]
        report(f"data        {', '.join(f'{split} {path}' for split, path in files)}, labels {args.label_names}")
    for path in output_files(args):
        report(f"writes      {path}")


def generate(args: argparse.Namespace) -> None:
    """Continues the prompt: at the temperature asked for, or at 0 and at 1 into the two files."""
    import torch

    from checkpoint import atomic_file
    from tokenizer import Tokenizer
    from training import precision

    tokenizer = Tokenizer(tokenizer_model=args.tokenizer)
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    llama, kind = load_llama(args, tokenizer)
    print_header(args, llama, kind, tokenizer, device, dtype)
    llama.to(device)

    prompt = tokenizer.encode(args.prompt, bos=True, eos=False)
    if len(prompt) + args.max_new_tokens > llama.config.max_seq_len:
        report(
            f"warning: {len(prompt)} tokens of prompt and {args.max_new_tokens} new ones exceed the model's context of "
            f"{llama.config.max_seq_len}; it will see only the last {llama.config.max_seq_len}"
        )
    runs: list[tuple[float, str | None]] = [(args.temperature, None)]
    if args.temperature is None:
        runs = [(0.0, args.generated_sentence_low_temp_out), (1.0, args.generated_sentence_high_temp_out)]
    for temperature, path in runs:
        with precision(device, dtype):
            tokens = llama.generate(
                torch.tensor([prompt], device=device),
                args.max_new_tokens,
                temperature,
                args.epsilon,
                eos_id=tokenizer.eos_id,
                generator=torch.Generator(device).manual_seed(args.seed),
            )
        text = tokenizer.decode(tokens[0].tolist())
        if path is not None:
            report(f"\ntemperature {temperature:g} -> {path}")
            with atomic_file(path) as file:
                file.write(text + "\n")
        print(text, flush=True)


def read_data(args: argparse.Namespace, splits: tuple[str, ...], label_names: list[str]) -> dict[str, list[Row]]:
    """The rows of each split, not yet tokenized."""
    from dataset import missing_classes, read_rows

    data = {split: read_rows(getattr(args, split), label_names) for split in splits}
    if "train" in data and (missing := missing_classes(args.train, data["train"], label_names)):
        report(f"warning: {args.train} has no row of {', '.join(missing)}, so that is not learnt")
    return data


def tokenize_data(
    args: argparse.Namespace,
    data: dict[str, list[Row]],
    tokenizer: Tokenizer,
    context: int,
    question: str | None = None,
) -> dict[str, list[Row]]:
    """The rows of each split with their ids; one warning if sentences had to be cut to the model's context."""
    from dataset import tokenize_rows

    done, cut = {}, 0
    for split, rows in data.items():
        done[split], cut_here = tokenize_rows(
            rows, tokenizer, context, question=question, max_sentence_len=args.max_sentence_len
        )
        cut += cut_here
    if cut:
        report(f"warning: {cut} sentences were cut; the model's context has room for {context} tokens a row")
    return done


def predict(
    args: argparse.Namespace, model: torch.nn.Module, data: dict[str, list[Row]], dtype: torch.dtype, pad_id: int
) -> None:
    """Classifies dev and test, prints the scores, and writes both prediction files at the end."""
    from dataset import write_predictions
    from training import describe, evaluate

    outputs = {"dev": args.dev_out, "test": args.test_out}
    results = {}
    for split in outputs:
        start = time.perf_counter()
        results[split] = evaluate(
            model,
            data[split],
            args.batch_size,
            pad_id=pad_id,
            dtype=dtype,
            in_file_order=args.pooling == "last_column",
            name=split,
        )
        print(f"{split} {describe(results[split])} ({len(data[split])} rows)", flush=True)
        report(f"{split} took {time.perf_counter() - start:.1f} s")
    for split, path in outputs.items():
        write_predictions(path, results[split].predictions, data[split])


def classify(args: argparse.Namespace) -> None:
    """prompt, finetune and lora: builds the classifier, trains it unless it is zero-shot, predicts dev and test."""
    from types import SimpleNamespace

    import torch

    from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
    from dataset import prompt_question, read_label_names
    from lora import apply_lora, count_lora_parameters
    from tokenizer import Tokenizer

    label_names = read_label_names(args.label_names)
    splits = ("dev", "test") if args.option == "prompt" else ("train", "dev", "test")
    raw = read_data(args, splits, label_names)
    tokenizer = Tokenizer(tokenizer_model=args.tokenizer)
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    torch.manual_seed(args.seed)
    llama, kind = load_llama(args, tokenizer)
    print_header(args, llama, kind, tokenizer, device, dtype)

    config = SimpleNamespace(
        llama=llama,
        num_labels=len(label_names),
        hidden_dropout_prob=args.hidden_dropout_prob,
        option=args.option,
        pooling=args.pooling,
    )
    if args.option == "prompt":
        question = prompt_question(label_names)
        if args.pooling == "last_token":
            question = question.rstrip()  # a label's first piece brings its own space
        zero_shot = LlamaZeroShotClassifier(config, tokenizer, label_names).to(device).eval()
        data = tokenize_data(args, raw, tokenizer, zero_shot.max_input_len, question)
        predict(args, zero_shot, data, dtype, tokenizer.pad_id)
        return

    data = tokenize_data(args, raw, tokenizer, llama.config.max_seq_len)
    model = LlamaEmbeddingClassifier(config)
    if args.option == "lora":
        apply_lora(model, args.lora_rank, args.lora_alpha)
        adapters, total, percent = count_lora_parameters(model)
        report(f"LoRA        {adapters:,} of {total:,} parameters ({percent:.2f} %), beside the head")
    fine_tune(args, model.to(device), data, label_names, dtype, tokenizer.pad_id)
    predict(args, model, data, dtype, tokenizer.pad_id)


def fine_tune(
    args: argparse.Namespace,
    model: torch.nn.Module,
    data: dict[str, list[Row]],
    label_names: list[str],
    dtype: torch.dtype,
    pad_id: int,
) -> None:
    """Trains `model`, keeping the best by dev accuracy in memory and in `best_model_path`."""
    from checkpoint import write_checkpoint
    from training import Settings, train

    def save_best(epoch: int, dev: Evaluation) -> None:
        write_checkpoint(
            best_model_path(args),
            model.state_dict(),
            model.llama.config,  # type: ignore[union-attr, arg-type]
            kind="classifier",
            label_names=label_names,
            options=vars(args),
            epoch=epoch,
            dev_accuracy=dev.accuracy,
        )

    settings = Settings(
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        dtype=dtype,
        pad_id=pad_id,
        in_file_order=args.pooling == "last_column",
    )
    train(model, data["train"], data["dev"], settings, save_best=save_best, log=report)


def main(argv: list[str] | None = None) -> int:
    """Runs one option; the exit code is 0, 2 for bad input (one line on stderr), or 130 for Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        check_options(args)
        from checkpoint import check_writable  # from here on torch is imported

        check_writable(*output_files(args))
        (generate if args.option == "generate" else classify)(args)
    except (ValueError, OSError) as error:
        report(f"run_llama.py: error: {error}")
        return 2
    except KeyboardInterrupt:
        report("run_llama.py: stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
