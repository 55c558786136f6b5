"""The command line: classify by prompting, fine-tune, also with LoRA; and all else by way of text_generation.py,
pretraining.py, instruction.py, conversion.py and others. `--help` says how.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from minillama.cli.checks import check_options, output_files
from minillama.cli.display import Display, report_loss, safe_display
from minillama.cli.flags import RESUME_MAY_CHANGE, TRAINING
from minillama.cli.loading import (
    add_lora,
    agree_on_run,
    choose_device,
    choose_dtype,
    load_llama,
    load_tokenizer,
    log_of,
    open_checkpoint,
    print_header,
    report,
    report_next,
    settings_of,
    tokenize_data,
    use_bundled_defaults,
    warn,
)
from minillama.cli.options import active_options, best_model_path, flag, only_prints, parse_options
from minillama.environment import Process, this_process
from minillama.formats.names import RUNS

if TYPE_CHECKING:
    from types import SimpleNamespace

    import torch
    from torch import Tensor

    from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier, LlamaZeroShotClassifier
    from minillama.cli.provenance import Origin
    from minillama.text.labelled import Row
    from minillama.training.distributed import Processes
    from minillama.training.run_directory import RunDirectory
    from minillama.training.task import Score
    from tokenizer import Tokenizer

# What is put in the place of a sentence to learn how probable a label is without one.
CONTENT_FREE = {"contextual": ("N/A", "[MASK]", ""), "pmi": ("",)}


def read_data(
    args: argparse.Namespace, splits: tuple[str, ...], labels: Mapping[str, str | None]
) -> dict[str, list[Row]]:
    """The rows of each split, not yet tokenized."""
    from minillama.text.labelled import class_names, missing_classes, read_rows

    data = {split: read_rows(getattr(args, split), labels) for split in splits}
    if "train" in data and (missing := missing_classes(args.train, data["train"], class_names(labels))):
        report(f"warning: {args.train} has no row of {', '.join(missing)}, so that is not learnt")
    return data


def predict(
    args: argparse.Namespace,
    model: torch.nn.Module,
    data: dict[str, list[Row]],
    labels: Mapping[str, str | None],
    dtype: torch.dtype,
    pad_id: int,
    processes: Processes,
    origin: Origin | None,
    run: RunDirectory | None = None,
) -> None:
    """Classifies dev and test, writes both prediction files, each with its record, and tells the scores: on stdout, and
    in the log and the metrics of the run. The scores are told even if a file cannot be written, or the user stops.

    origin: of the records, which the main process has.
    """
    from minillama.cli.provenance import settled_output, writing_turn
    from minillama.text.labelled import class_names, write_predictions
    from minillama.training.evaluation import describe, describe_chance, describe_classes, evaluate

    label_names = class_names(labels)
    outputs = {"dev": args.dev_out, "test": args.test_out}
    results, seconds = {}, {}
    try:
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
            seconds[split] = time.perf_counter() - start
        if origin is not None:
            for split, path in outputs.items():
                scores = {"accuracy": results[split].accuracy, "macro_f1": results[split].macro_f1}
                with writing_turn(path):
                    path, moved = settled_output(args, split, [row.sentence for row in data[split]])
                    write_predictions(path, results[split].predictions, data[split], labels)
                    warn(origin.write_record(path, split, **scores))
                warn(moved)
    finally:
        log = log_of(run)
        lines = []
        for split, result in results.items():
            line = f"{split} {describe(result, with_loss=args.option != 'prompt')} ({len(data[split])} rows)"
            if args.option == "prompt" and (chance := describe_chance(result, data[split], len(label_names))):
                line += f"; {chance}"
            lines.append(line)
            if processes.is_main:
                print(line, flush=True)
            log(f"{split} took {seconds[split]:.1f} s")
            if classes := describe_classes(result, data[split], label_names):
                log(f"\n{classes}\n")
        if run is not None and len(results) == len(outputs):
            for line in lines:
                run.log(line)
            run.finish(classes=label_names, **results["dev"].scores("dev"), **results["test"].scores("test"))


def zero_shot(
    args: argparse.Namespace,
    config: SimpleNamespace,
    raw: dict[str, list[Row]],
    words: list[str],
    prompt: tuple[str, str],
    tokenizer: Tokenizer,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[LlamaZeroShotClassifier, dict[str, list[Row]]]:
    """The classifier that asks which of `words` follows `prompt`, what stands before and behind a sentence, calibrated
    as the options say; and the tokenized prompts of each split."""
    from classifier import LlamaZeroShotClassifier
    from minillama.layers.precision import autocast
    from minillama.text.batches import pad, tokenize_rows
    from minillama.text.labelled import Row

    model = LlamaZeroShotClassifier(config, tokenizer, words).to(device).eval()
    data = tokenize_data(args, raw, tokenizer, model.max_input_len, *prompt)
    if args.calibrate != "none":
        empty = [Row(0, text) for text in CONTENT_FREE[args.calibrate]]
        before, question = prompt
        prompts, _ = tokenize_rows(empty, tokenizer, model.max_input_len, before=before, question=question)
        ids, mask = pad([row.ids for row in prompts], tokenizer.pad_id)
        with autocast(device, dtype):
            prior = model.calibrate(ids.to(device), None if mask is None else mask.to(device))
        shares = prior.softmax(-1).tolist()  # without content
        shown = ", ".join(f"{word} {share:.3f}" for word, share in zip(words, shares, strict=True))
        report(f"calibrated  {args.calibrate}; without content, of these words: {shown}")
    return model, data


def classify(args: argparse.Namespace) -> None:
    """prompt, finetune and lora: builds the classifier, trains it unless it is zero-shot, predicts dev and test."""
    from types import SimpleNamespace

    import torch

    from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier, acting_dropout
    from minillama.cli.provenance import Origin, check_default_output
    from minillama.text.batches import prompt_parts
    from minillama.text.labelled import class_names, read_labels
    from minillama.training.distributed import process_group

    labels = read_labels(args.label_names)
    label_names = class_names(labels)
    words = args.label_words or label_names
    if len(words) != len(label_names):
        raise ValueError(
            f"--label_words has {len(words)} words, {args.label_names} {len(label_names)} classes "
            f"({', '.join(label_names)}); give a word for each, in this order"
        )
    splits = ("dev", "test") if args.option == "prompt" else ("train", "dev", "test")
    raw = read_data(args, splits, labels)
    for split in ("dev", "test"):
        check_default_output(args, split, [row.sentence for row in raw[split]])
    tokenizer = load_tokenizer(args)
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    with process_group(device, args.fsdp) as processes:
        agree_on_run(args, processes)
        torch.manual_seed(args.seed)
        checkpoint = open_checkpoint(args, tokenizer)
        judged = {split: (getattr(args, split), len(raw[split])) for split in ("dev", "test")}
        origin = Origin.of(args, judged) if processes.is_main else None
        llama = load_llama(args, checkpoint, dtype)
        print_header(args, llama, checkpoint.kind, tokenizer, device, dtype)
        config = SimpleNamespace(
            llama=llama,
            num_labels=len(label_names),
            hidden_dropout_prob=args.hidden_dropout_prob,
            option=args.option,
            pooling=args.pooling,
        )
        run: RunDirectory | None = None
        asked = args.option == "prompt" or args.head == "prompt"
        prompt = prompt_parts(args.template, words, args.pooling)
        if asked:
            report(f"prompt      {'{sentence}'.join(prompt)}")
        if args.option == "prompt":
            model: torch.nn.Module
            model, data = zero_shot(args, config, raw, words, prompt, tokenizer, device, dtype)
        else:
            data = tokenize_data(args, raw, tokenizer, llama.config.max_seq_len, *(prompt if asked else ()))
            head: LlamaEmbeddingClassifier | LlamaPromptClassifier
            head = LlamaPromptClassifier(config, tokenizer, words) if asked else LlamaEmbeddingClassifier(config)
            if args.r_drop and not acting_dropout(head):
                raise ValueError(
                    "--r_drop compares two dropout masks, and no dropout acts here: the model's and "
                    "--hidden_dropout_prob are both 0; add --dropout 0.1"
                )
            if args.option == "lora":
                add_lora(args, head, "" if asked else ", beside the head")
            model, run = fine_tune(args, head.to(device), data, labels, dtype, tokenizer.pad_id, processes)
        predict(args, model, data, labels, dtype, tokenizer.pad_id, processes, origin, run)
        if args.option != "prompt":
            report(f"wrote {best_model_path(args)}, the model that is best on dev")
            report_next("--option", "classify", "--finetuned", best_model_path(args), "--prompt", "your sentence")


def fine_tune(
    args: argparse.Namespace,
    model: LlamaEmbeddingClassifier | LlamaPromptClassifier,
    data: dict[str, list[Row]],
    labels: dict[str, str | None],
    dtype: torch.dtype,
    pad_id: int,
    processes: Processes,
) -> tuple[torch.nn.Module, RunDirectory]:
    """Trains `model` in the run's folder; the best by dev accuracy is there and at `best_model_path`. Returns the model
    to predict with, and the folder."""
    import torch

    from minillama.formats.checkpoint import write_checkpoint
    from minillama.formats.files import link_or_copy
    from minillama.layers.precision import DTYPES
    from minillama.text.labelled import class_names
    from minillama.training.classification import Classification
    from minillama.training.loop import train
    from minillama.training.regularizers import MovingAverage, Smart
    from minillama.training.run_directory import RunDirectory

    options = vars(args) | {"dtype": next(name for name, value in DTYPES.items() if value == dtype)}
    config = model.llama.config
    run = RunDirectory(args.run_dir, writes=processes.is_main)

    def write_best(state: dict[str, Tensor], epoch: int, score: Score) -> None:
        write_checkpoint(
            run.best_path,
            state,
            config,
            kind="classifier",
            head=args.head,
            label_names=class_names(labels),
            labels=labels,
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
        smart=Smart(args.smart, args.smart_eps, args.smart_step, args.smart_noise) if args.smart else None,
        average=MovingAverage(args.bregman, args.bregman_beta) if args.bregman else None,
        r_drop=args.r_drop,
    )
    if not args.resume:
        run.create(options)
    if args.compile:
        model.compile(dynamic=True)
    torch.manual_seed(args.seed + processes.rank)  # dropout differs from process to process
    trained = train(
        model, task, settings_of(args, dtype), run, processes=processes, write_best=write_best, log=log_of(run)
    )
    if processes.is_main:
        link_or_copy(run.best_path, best_model_path(args))  # another run may have had that name since
    return trained, run


def resumed(args: argparse.Namespace, argv: list[str] | None, held: ExitStack) -> argparse.Namespace:
    """The options of the run to go on with, and those of the command line that may differ. The main process locks the
    run until `held` is closed.

    Raises ValueError or FileNotFoundError if there is no such run, it is still going, or an option contradicts it.
    """
    from minillama.training.run_directory import RunDirectory, latest_run_path, locked

    folder = args.run_dir or str(latest_run_path(Path(RUNS)))
    run = RunDirectory(folder)
    run.options()  # where there is no run, no lock is made
    if this_process().rank == 0:
        held.enter_context(locked(run.path))
    saved = active_options(run.options())
    processes = args.processes
    args, _ = parse_options(argv, saved)
    args.resume, args.run_dir, args.processes = True, folder, processes
    if args.dtype == "auto":
        args.dtype = saved.get("dtype", "auto")
    for name, value in saved.items():
        if name not in RESUME_MAY_CHANGE and getattr(args, name) != value:
            raise ValueError(
                f"{flag(name).lstrip('-')} is {getattr(args, name)}, but {folder} was started with {value}; "
                "give that, or leave it out"
            )
    return args


def name_run(args: argparse.Namespace, held: ExitStack) -> None:
    """Makes and locks the folder of a run that starts now, under a new name unless --run_dir names one. Only the main
    process does; the others learn the name later (`agree_on_run`). When `held` is closed, the lock ends, and a folder
    without a run is removed. Raises ValueError if the folder is taken or cannot be made.
    """
    from minillama.training.run_directory import new_run

    if this_process().rank == 0:
        args.run_dir = str(held.enter_context(new_run(args.run_dir, Path(RUNS), args.option)))


def run_option(args: argparse.Namespace) -> None:
    """Runs the option that --option names."""
    if args.option == "generate":
        from minillama.commands.generate import generate

        generate(args)
    elif args.option in ("prompt", "finetune", "lora"):
        classify(args)
    elif args.option == "classify":
        from minillama.commands.classify import label_sentences

        label_sentences(args)
    elif args.option == "convert":
        from minillama.commands.convert import convert

        convert(args)
    elif args.option == "sft":
        from minillama.commands.sft import instruct

        instruct(args)
    elif args.option == "wise_ft":
        from minillama.commands.wise_ft import wise_ft

        wise_ft(args)
    elif args.option == "report":
        from minillama.commands.report import write_report

        write_report(args)
    else:
        from minillama.commands import pretrain as pretraining

        {"pretrain": pretraining.pretrain, "perplexity": pretraining.perplexity, "tokenizer": pretraining.tokenizer}[
            args.option
        ](args)


def run_command(
    args: argparse.Namespace, typed: frozenset[str], argv: list[str] | None, process: Process, out: Display
) -> None:
    """Checks the options, and runs what --option names. typed: the options that were typed, in `argv` or a file of
    --config. out: the standard output.
    """
    args.processes = process.world
    with ExitStack() as held:  # the run's lock
        if args.resume:
            args = resumed(args, argv, held)
        else:
            use_bundled_defaults(args, typed)
        check_options(args)
        if only_prints(args):
            out.require()
        from minillama.formats.files import check_writable  # from here on torch is imported

        check_writable(*output_files(args))
        if args.option in TRAINING and not args.resume:
            name_run(args, held)
        run_option(args)


def main(argv: list[str] | None = None) -> int:
    """Runs one option; the exit code is 0, 2 for bad input (one line on stderr), or 128 and the number of the signal
    that stopped it (Ctrl-C: 130).

    A standard output that fails stops only a command that has no other result (a reader that left: 141).
    """
    with safe_display() as out:
        process = Process(0, 1, 0)  # until the options are read: --help works whatever the environment
        try:
            try:
                options = parse_options(argv)
                process = this_process()
                run_command(*options, argv, process, out)
            finally:
                out.flush()
        except BrokenPipeError:  # whoever read the output has enough of it
            return 128 + signal.SIGPIPE
        except (ValueError, OSError) as error:
            # From every process, for the cause may be in one of them only.
            who = f" (process {process.rank})" if process.rank else ""
            print(f"run_llama.py: error{who}: {error}", file=sys.stderr, flush=True)
            return 2
        except ImportError as error:  # missing or broken; the optional packages have errors of their own
            reason = " ".join(str(error).split())[:300]
            print(f"run_llama.py: error: {reason}; type `pip install -r requirements.txt`", file=sys.stderr)
            return 2
        except RuntimeError as error:  # torch's, when the connection to another process breaks; that one says why
            if process.world == 1:
                raise
            print(f"run_llama.py: error (process {process.rank}): {str(error).splitlines()[0]}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:  # Stopped is one, too
            report(f"run_llama.py: {str(stop) or 'stopped by Ctrl-C'}")
            return 128 + getattr(stop, "number", 2)
        report_loss(out)
        return 0


if __name__ == "__main__":
    sys.exit(main())
