"""The command line: generate text, classify by prompting, fine-tune, also with LoRA, and by way of pretraining.py and
instruction.py make and measure language models. `--help` says how.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from environment import (
    IS_MAIN,
    PROCESSES,
    add_lora,
    choose_device,
    choose_dtype,
    fall_back,
    load_llama,
    load_tokenizer,
    open_checkpoint,
    print_header,
    ready,
    report,
    settings_of,
)
from options import RUNS, TRAINING, best_model_path, check_options, flag, output_files, parse_options

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from classifier import LlamaEmbeddingClassifier
    from dataset import Row
    from distributed import Processes
    from tasks import Score
    from tokenizer import Tokenizer

# What may differ when a run is resumed: it changes no number.
MAY_DIFFER = ("resume", "run_dir", "save_every", "dev_out", "test_out", "model_out", "tokens_dir", "device", "use_gpu")


def generate(args: argparse.Namespace) -> None:
    """Continues the prompt: at the temperature asked for, or at 0 and at 1 into the two files."""
    import torch

    from evaluation import precision
    from files import atomic_file

    llama, tokenizer, device, dtype = ready(args)

    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompt = tokenizer.encode_chat([*system, {"role": "user", "content": args.prompt}])
    else:
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
                eos_ids=tokenizer.stop_ids,
                generator=torch.Generator(device).manual_seed(args.seed),
            )
        text = tokenizer.decode(tokens[0, len(prompt) if args.chat else 0 :].tolist())
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
    args: argparse.Namespace,
    model: torch.nn.Module,
    data: dict[str, list[Row]],
    label_names: list[str],
    dtype: torch.dtype,
    pad_id: int,
    processes: Processes,
    log: Callable[[str], None] = report,
) -> None:
    """Classifies dev and test, prints the scores, and writes both prediction files at the end."""
    from dataset import write_predictions
    from evaluation import describe, describe_classes, evaluate

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
            bucketed=args.pooling == "last_token",
            processes=processes,
            name=split,
        )
        seconds = time.perf_counter() - start
        if processes.is_main:
            print(f"{split} {describe(results[split])} ({len(data[split])} rows)", flush=True)
        log(f"{split} took {seconds:.1f} s")
        if classes := describe_classes(results[split], data[split], label_names):
            log(f"\n{classes}\n")
    if processes.is_main:
        for split, path in outputs.items():
            write_predictions(path, results[split].predictions, data[split])


def classify(args: argparse.Namespace) -> None:
    """prompt, finetune and lora: builds the classifier, trains it unless it is zero-shot, predicts dev and test."""
    from types import SimpleNamespace

    import torch

    from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
    from dataset import prompt_question, read_label_names
    from distributed import started

    label_names = read_label_names(args.label_names)
    splits = ("dev", "test") if args.option == "prompt" else ("train", "dev", "test")
    raw = read_data(args, splits, label_names)
    tokenizer = load_tokenizer(args)
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    with started(device, args.fsdp) as processes:
        args.run_dir = processes.gather(args.run_dir)[0]  # a new one has the time in its name
        torch.manual_seed(args.seed)
        checkpoint = open_checkpoint(args, tokenizer)
        llama = load_llama(args, checkpoint, dtype)
        print_header(args, llama, checkpoint.kind, tokenizer, device, dtype)
        config = SimpleNamespace(
            llama=llama,
            num_labels=len(label_names),
            hidden_dropout_prob=args.hidden_dropout_prob,
            option=args.option,
            pooling=args.pooling,
        )
        log: Callable[[str], None] = report
        if args.option == "prompt":
            question = prompt_question(label_names)
            if args.pooling == "last_token":
                question = question.rstrip()  # a label's first piece brings its own space
            zero_shot = LlamaZeroShotClassifier(config, tokenizer, label_names).to(device).eval()
            data = tokenize_data(args, raw, tokenizer, zero_shot.max_input_len, question)
            model: torch.nn.Module = zero_shot
        else:
            data = tokenize_data(args, raw, tokenizer, llama.config.max_seq_len)
            head = LlamaEmbeddingClassifier(config)
            if args.option == "lora":
                add_lora(args, head, ", beside the head")
            model, log = fine_tune(args, head.to(device), data, label_names, dtype, tokenizer.pad_id, processes)
        predict(args, model, data, label_names, dtype, tokenizer.pad_id, processes, log)


def fine_tune(
    args: argparse.Namespace,
    model: LlamaEmbeddingClassifier,
    data: dict[str, list[Row]],
    label_names: list[str],
    dtype: torch.dtype,
    pad_id: int,
    processes: Processes,
) -> tuple[torch.nn.Module, Callable[[str], None]]:
    """Trains `model` in the run's folder; the best by dev accuracy is there and at `best_model_path`. Returns the model
    to predict with, and where to tell of it."""
    import torch

    from checkpoint import write_checkpoint
    from evaluation import DTYPES
    from files import link_or_copy
    from run_directory import RunDirectory
    from tasks import Classification
    from training import train

    options = vars(args) | {"dtype": next(name for name, value in DTYPES.items() if value == dtype)}
    config = model.llama.config
    run = RunDirectory(args.run_dir, writes=processes.is_main)

    def log(line: str) -> None:
        report(line)
        run.log(line)

    def write_best(state: dict[str, Tensor], epoch: int, score: Score) -> None:
        write_checkpoint(
            run.best_path,
            state,
            config,
            kind="classifier",
            label_names=label_names,
            options=options,
            epoch=epoch,
            dev_accuracy=score.quality,
        )
        link_or_copy(run.best_path, best_model_path(args))

    task = Classification(
        data["train"],
        data["dev"],
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        pad_id=pad_id,
        bucketed=args.pooling == "last_token",
        label_smoothing=args.label_smoothing,
        evaluate_train=args.eval_train,
    )
    if not args.resume:
        run.create(options)
    if args.compile:
        model.compile(dynamic=True)
    torch.manual_seed(args.seed + processes.rank)  # dropout differs from process to process
    trained = train(model, task, settings_of(args, dtype), run, processes=processes, write_best=write_best, log=log)
    if processes.is_main:
        link_or_copy(run.best_path, best_model_path(args))  # another run may have had that name since
    return trained, log


def resumed(args: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """The options of the run to go on with, and those of the command line that may differ.

    Raises ValueError or FileNotFoundError if there is no such run, or an option contradicts it.
    """
    from run_directory import RunDirectory, latest_run_path

    folder = args.run_dir or str(latest_run_path(Path(RUNS)))
    saved = RunDirectory(folder).options()
    args, _ = parse_options(argv, saved)
    args.resume, args.run_dir, args.processes = True, folder, PROCESSES
    if args.dtype == "auto":
        args.dtype = saved.get("dtype", "auto")
    for name, value in saved.items():
        if name not in MAY_DIFFER and getattr(args, name) != value:
            raise ValueError(
                f"{flag(name).lstrip('-')} is {getattr(args, name)}, but {folder} was started with {value}; "
                "give that, or leave it out"
            )
    return args


def name_run(args: argparse.Namespace) -> None:
    """A folder for a run that starts now, unless --run_dir names one; raises ValueError if that is taken."""
    from run_directory import RunDirectory, new_run_path

    if args.run_dir is None:
        args.run_dir = str(new_run_path(Path(RUNS), args.option))
    RunDirectory(args.run_dir).check_free()


def run_option(args: argparse.Namespace) -> None:
    """What --option names."""
    if args.option == "generate":
        generate(args)
    elif args.option in ("prompt", "finetune", "lora"):
        classify(args)
    elif args.option == "convert":
        from conversion import convert

        convert(args)
    elif args.option == "sft":
        from instruction import instruct

        instruct(args)
    else:
        import pretraining

        {"pretrain": pretraining.pretrain, "perplexity": pretraining.perplexity, "tokenizer": pretraining.tokenizer}[
            args.option
        ](args)


def main(argv: list[str] | None = None) -> int:
    """Runs one option; the exit code is 0, 2 for bad input (one line on stderr), or 128 and the number of the signal
    that stopped it (Ctrl-C: 130).
    """
    args, typed = parse_options(argv)
    args.processes = PROCESSES
    try:
        if args.resume:
            args = resumed(args, argv)
        else:
            fall_back(args, typed)
        check_options(args)
        from files import check_writable  # from here on torch is imported

        check_writable(*output_files(args))
        if args.option in TRAINING and not args.resume:
            name_run(args)
        run_option(args)
    except (ValueError, OSError) as error:
        # From every process, for the cause may be in one of them only.
        who = "" if IS_MAIN else f" (process {os.environ['RANK']})"
        print(f"run_llama.py: error{who}: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:  # torch's, when the connection to another process breaks; that one says why
        if PROCESSES == 1:
            raise
        print(f"run_llama.py: error (process {os.environ['RANK']}): {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # Stopped is one, too
        report(f"run_llama.py: {str(stop) or 'stopped by Ctrl-C'}")
        return 128 + getattr(stop, "number", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
