"""Supervised fine-tuning: a language model learns to answer prompts as examples do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama import Llama
from lora import apply_lora, merge_lora_weights
from minillama.cli.loading import (
    add_lora,
    agree_on_run,
    check_causal,
    choose_device,
    choose_dtype,
    load_llama,
    load_tokenizer,
    log_of,
    open_checkpoint,
    print_header,
    put_tokenizer_beside,
    report,
    report_next,
    settings_of,
    warn,
)
from minillama.cli.options import lora_settings
from minillama.cli.provenance import Origin, check_default_output, settled_output, writing_turn
from minillama.formats.checkpoint import write_checkpoint, write_safetensors
from minillama.formats.files import read_torch
from minillama.layers.precision import DTYPES
from minillama.text.examples import Example, read_examples, tokenize_examples, write_answers
from minillama.training.answering import Instruction
from minillama.training.distributed import process_group
from minillama.training.evaluation import answer_prompts, answer_scores, describe_answers
from minillama.training.loop import train
from minillama.training.run_directory import RunDirectory
from minillama.training.task import Score
from tokenizer import Tokenizer


def read_data(args: argparse.Namespace) -> dict[str, list[Example]]:
    """The examples of each split that was named, not yet tokenized. Raises ValueError if the answers to dev or test
    would be written, unasked, over those to other prompts.
    """
    data = {split: read_examples(path) for split in ("train", "dev", "test") if (path := getattr(args, split))}
    for split in ("dev", "test"):
        if examples := data.get(split):
            check_default_output(args, split, [example.prompt for example in examples])
    return data


def tokenize_data(
    args: argparse.Namespace, raw: dict[str, list[Example]], tokenizer: Tokenizer, window: int
) -> tuple[dict[str, list[Example]], int]:
    """The examples of each split with their ids, and the tokens of a row: `window` where the options say it, else as
    many as the longest example has. One warning if prompts had to be cut to the window.
    """
    data, cut = {}, 0
    for split, examples in raw.items():
        data[split], cut_here = tokenize_examples(
            getattr(args, split), examples, tokenizer, window, args.max_new_tokens
        )
        cut += cut_here
    if cut:
        report(
            f"warning: {cut} prompts lost their beginning: a row has room for {window} tokens, of which an answer may "
            f"take --max_new_tokens {args.max_new_tokens}"
        )
    train = data["train"]
    size, targets = (
        sum(numbers) / len(train) for numbers in zip(*((len(e.ids), e.targets) for e in train), strict=True)
    )
    width = args.window or max(len(example.ids) - 1 for example in (*train, *data["dev"]))
    report(
        f"examples    {', '.join(f'{len(examples):,} {split}' for split, examples in data.items())}; of {size:.0f} "
        f"tokens, {targets:.1f} of them to be learnt; in rows of {width}"
    )
    return data, width


def write_model(args: argparse.Namespace, llama: Llama, state: dict[str, Tensor], stop_ids: Sequence[int]) -> None:
    """Writes the model that was trained, with `state`, the best of it, and its stop ids; LoRA layers are merged into
    what they wrap.
    """
    if args.lora_rank:
        apply_lora(llama, **lora_settings(args))
    llama.load_state_dict(state)
    merge_lora_weights(llama)
    write_safetensors(args.model_out, llama.state_dict(), llama.config, DTYPES[args.out_dtype or "fp32"], stop_ids)
    report(f"wrote {args.model_out}")


def instruct(args: argparse.Namespace) -> None:
    """sft: trains a model to answer prompts, writes it with its tokenizer, and answers dev and test with it."""
    raw = read_data(args)
    tokenizer = load_tokenizer(args)
    tokenizer_content = tokenizer.path.read_bytes()  # as it is now, whatever becomes of the file during the run
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    with process_group(device, args.fsdp) as processes:
        agree_on_run(args, processes)
        torch.manual_seed(args.seed)
        checkpoint = open_checkpoint(args, tokenizer)
        judged = {split: (getattr(args, split), len(raw[split])) for split in raw if split != "train"}
        origin = Origin.of(args, judged) if processes.is_main else None
        llama = load_llama(args, checkpoint, dtype)
        print_header(args, llama, checkpoint.kind, tokenizer, device, dtype)
        check_causal(llama)
        config = llama.config
        window = args.window or config.max_seq_len
        if window > config.max_seq_len:
            raise ValueError(f"--window {window} is longer than the model's context of {config.max_seq_len}")
        data, width = tokenize_data(args, raw, tokenizer, window)
        if args.lora_rank:
            add_lora(args, llama)
        run = RunDirectory(args.run_dir, writes=processes.is_main)

        def write_best(state: dict[str, Tensor], epoch: int, score: Score) -> None:
            described: dict[str, Any] = {"options": options, "epoch": epoch, "scores": score.metrics}
            write_checkpoint(run.best_path, state, config, stop_ids=list(checkpoint.stop_ids), **described)

        task = Instruction(
            data["train"],
            data["dev"],
            tokenizer,
            epochs=args.epochs,
            batch_size=args.batch_size,
            window=width,
            seed=args.seed,
            max_new_tokens=args.max_new_tokens,
            answer_rows=args.answer_rows,
        )
        options = vars(args) | {"dtype": next(name for name, value in DTYPES.items() if value == dtype)}
        if not args.resume:
            run.create(options)
        if args.compile:
            llama.compile(dynamic=True)
        torch.manual_seed(args.seed + processes.rank)  # dropout differs from process to process
        settings = settings_of(args, dtype)
        model = train(
            llama.to(device), task, settings, run, processes=processes, write_best=write_best, log=log_of(run)
        )
        if processes.is_main:  # from the file, for what was trained may be in shards
            best = read_torch(run.best_path)["model"]
            write_model(args, load_llama(args, checkpoint, dtype), best, checkpoint.stop_ids)
            opened = put_tokenizer_beside(args.model_out, tokenizer, tokenizer_content)
        answers = {}
        try:
            for split in judged:
                answers[split] = answer_prompts(
                    model,
                    data[split],
                    tokenizer,
                    args.batch_size,
                    args.max_new_tokens,
                    dtype=dtype,
                    processes=processes,
                    name=split,
                )
            if origin is not None:
                for split, found in answers.items():
                    with writing_turn(getattr(args, f"{split}_out")):
                        path, moved = settled_output(args, split, [example.prompt for example in data[split]])
                        write_answers(path, found, data[split])
                        warn(origin.write_record(path, split, **answer_scores(found, data[split])))
                    warn(moved)
        finally:  # even if a file cannot be written, or the user stops
            scores: dict[str, float] = {}
            for split, found in answers.items() if processes.is_main else ():
                line = f"{split} {describe_answers(found, data[split])} ({len(data[split])} rows)"
                print(line, flush=True)
                run.log(line)
                scores |= {f"{split}_{name}": value for name, value in answer_scores(found, data[split]).items()}
            if len(answers) == len(judged):
                run.finish(**scores)
        if processes.is_main:
            report_next(*opened, "--temperature", "0", "--prompt", data["dev"][0].prompt)
