"""Language models on text: pretrain one, measure how well one predicts, make a tokenizer. One function an option."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import PRESETS, LlamaConfig
from llama import Llama
from minillama.cli.flags import DEFAULT_PRESET, NEW_MODEL
from minillama.cli.loading import (
    agree_on_run,
    check_alone,
    check_causal,
    choose_device,
    choose_dtype,
    load_for_inference,
    load_llama,
    load_tokenizer,
    log_of,
    open_checkpoint,
    print_header,
    put_tokenizer_beside,
    report,
    report_next,
    settings_of,
)
from minillama.cli.options import text_and_weight
from minillama.decoding.fast_llama import fast_model
from minillama.formats.checkpoint import write_checkpoint, write_safetensors
from minillama.formats.files import read_torch
from minillama.formats.names import without_ending
from minillama.layers.precision import DTYPES
from minillama.text.corpus import Corpus, Text, held_out_count
from minillama.text.documents import open_tokens, read_documents, text_files, tokenize_text, train_tokenizer
from minillama.training.distributed import Processes, process_group
from minillama.training.evaluation import score_documents
from minillama.training.language_modelling import LanguageModelling
from minillama.training.loop import train
from minillama.training.run_directory import RunDirectory
from minillama.training.task import Score
from tokenizer import Tokenizer

VOCAB_SIZE = 4096  # of a new tokenizer, by default
SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len")


def tokenizer(args: argparse.Namespace) -> None:
    """tokenizer: trains one on the texts."""
    check_alone(args)
    paths = [text_and_weight(text)[0] for text in args.corpus]
    size = args.vocab_size or VOCAB_SIZE
    report(f"training a tokenizer of {size} pieces on {', '.join(paths)}")
    train_tokenizer(paths, size, args.model_out, args.seed, report)
    report(f"wrote {args.model_out}")
    report_next(
        *("--option", "pretrain", "--tokenizer", args.model_out, "--corpus", *args.corpus),
        *("--model_out", str(Path(args.model_out).with_name("my-model.safetensors"))),
    )


def new_config(args: argparse.Namespace, vocab_size: int) -> LlamaConfig:
    """The config of a model to be trained from scratch: the preset's sizes, and those given; causal."""
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    sizes = PRESETS[args.preset or DEFAULT_PRESET] | given
    if args.norm is not None:
        sizes["norm"] = args.norm
    if args.dim is not None:
        sizes["hidden_dim"] = None  # the preset's was for its own width
    sizes |= {
        "position_embedding_type": args.position or "rotary",
        "sliding_window": args.sliding_window,
        "attention_type": "differential" if args.differential else "softmax",
    }
    sizes |= {"vocab_size": vocab_size, "causal": args.attention != "bidirectional", "dropout": args.dropout or 0.0}
    return LlamaConfig(**sizes)


def read_corpus(args: argparse.Namespace, tokenizer: Tokenizer, window: int, processes: Processes) -> Corpus:
    """The texts, tokenized by the main process where that was not yet done. Raises ValueError if a file is named twice,
    for one text's training documents might be another's held-out ones.
    """
    named = [(path, weight, text_files(path, report)) for path, weight in map(text_and_weight, args.corpus)]
    counts = Counter(file.resolve() for _, _, files in named for file in files)
    for file, count in counts.items():
        if count > 1:
            raise ValueError(
                f"--corpus: {file} is named twice, by itself or by its folder; name it once, with a weight"
            )
    stems = Counter(Path(without_ending(path)).name for path, _, _ in named)
    texts = []
    for path, weight, files in named:
        if processes.is_main:
            done = [tokenize_text(file, tokenizer, Path(args.tokens_dir)) for file in files]
        done = processes.gather(done if processes.is_main else None)[0]
        tokens = [open_tokens(file, tokenizer) for file in done]
        stem = Path(without_ending(path)).name
        name = stem if stem and stems[stem] == 1 else path
        text = Text(name, tokens, window, args.held_out, weight)
        documents = sum(len(one.text_bytes) for one in tokens)
        size = sum(len(one.ids) for one in tokens)
        report(
            f"corpus      {path}: {documents:,} document{'s' * (documents != 1)}, {size:,} tokens, "
            f"{text.held_out_tokens:,} of them held out; "
            f"weight {weight:g}"
        )
        texts.append(text)
    return Corpus(texts, args.seed)


def pretrain(args: argparse.Namespace) -> None:
    """pretrain: trains a new model, or one that goes on from a checkpoint; writes it with its tokenizer."""
    of_new = ("preset", *SIZES, *NEW_MODEL)
    if args.continued and (sizes := [name for name in of_new if getattr(args, name) not in (None, False)]):
        raise ValueError(f"--{sizes[0]} is of a new model, but --pretrained-model-path has its own sizes; give one")
    tokenizer = load_tokenizer(args)
    tokenizer_content = tokenizer.path.read_bytes()  # as it is now, whatever becomes of the file during the run
    if args.vocab_size not in (None, tokenizer.n_words):
        raise ValueError(f"--vocab_size is {args.vocab_size}, but {tokenizer.path} has {tokenizer.n_words} pieces")
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    with process_group(device, args.fsdp) as processes:
        agree_on_run(args, processes)
        torch.manual_seed(args.seed)
        if args.continued:
            checkpoint = open_checkpoint(args, tokenizer)
            llama, kind, stop_ids = load_llama(args, checkpoint, dtype), checkpoint.kind, checkpoint.stop_ids
        else:
            llama, kind, stop_ids = Llama(new_config(args, tokenizer.n_words)), "new, random weights", ()
        print_header(args, llama, kind, tokenizer, device, dtype)
        check_causal(llama)
        config = llama.config
        window = args.window or config.max_seq_len
        if window > config.max_seq_len:
            raise ValueError(f"--window {window} is longer than the model's context of {config.max_seq_len}")
        corpus = read_corpus(args, tokenizer, window, processes)
        steps = args.max_steps or max(1, math.ceil(args.epochs * corpus.pass_length / args.batch_size))
        report(
            f"steps       {steps:,} of {args.batch_size} x {window} tokens, "
            f"{steps * args.batch_size / corpus.pass_length:.2f} passes over the corpus"
        )
        if args.batch_size > corpus.pass_length:
            report(
                f"warning: the corpus has {corpus.pass_length} windows of {window} tokens, not one --batch_size of "
                f"{args.batch_size}; give a smaller one, or a smaller --window, and more --epochs"
            )
        if args.warmup_steps >= steps:
            report(
                f"warning: --warmup_steps {args.warmup_steps} of {steps} steps: the learning rate never gets to --lr"
            )
        task = LanguageModelling(
            corpus, tokenizer, steps, args.batch_size, args.eval_every, sample_prompt=args.sample_prompt, seed=args.seed
        )
        run = RunDirectory(args.run_dir, writes=processes.is_main)

        def write_best(state: dict[str, Tensor], epoch: int, score: Score) -> None:
            described: dict[str, Any] = {"options": options, "epoch": epoch, "scores": score.metrics}
            write_checkpoint(run.best_path, state, config, stop_ids=list(stop_ids), **described)

        options = vars(args) | {"dtype": next(name for name, value in DTYPES.items() if value == dtype)}
        if not args.resume:
            run.create(options)
        model = llama.to(device)
        if args.compile:
            model.compile(dynamic=False)
        train(model, task, settings_of(args, dtype), run, processes=processes, write_best=write_best, log=log_of(run))
        if processes.is_main:
            best = read_torch(run.best_path)["model"]
            write_safetensors(args.model_out, best, config, DTYPES[args.out_dtype or "fp32"], stop_ids)
            report(f"wrote {args.model_out}")
            opened = put_tokenizer_beside(args.model_out, tokenizer, tokenizer_content)
            report_next(*opened, "--temperature", "0.8", "--prompt", args.sample_prompt)


def perplexity(args: argparse.Namespace) -> None:
    """perplexity: how well the model predicts texts, document by document."""
    files = {path: text_files(path, report) for path, _ in map(text_and_weight, args.corpus)}
    llama, tokenizer, device, dtype = load_for_inference(args)
    check_causal(llama)
    model = llama if args.quantize is None else fast_model(llama, quantize=args.quantize)
    context = llama.config.max_seq_len
    window = args.window or context
    stride = args.stride or max(1, window // 2)
    if window > context:
        raise ValueError(f"--window {window}: more than the context of {context} tokens; give as many, or fewer")
    if stride > window:
        raise ValueError(f"--stride {stride}: windows of {window} tokens would leave some out; give as many, or fewer")
    report(f"windows     {window} tokens, one every {stride}")
    for path, found in files.items():
        documents = [document for file in found for document in read_documents(file)]
        if not documents:
            raise ValueError(f"{path} holds no text; give a file with some")
        if args.held_out:
            count = held_out_count(args.held_out, len(documents))
            if not 0 < count <= len(documents):
                raise ValueError(
                    f"{path} has {len(documents)} documents; --held_out {args.held_out:g} of them cannot be"
                )
            documents = documents[-count:]
        ids = [[tokenizer.bos_id] * tokenizer.adds_bos + ids for ids in tokenizer.encode_many(documents)]
        nats, tokens = score_documents(model, ids, window, stride, dtype, device=device)
        size = sum(len(document.encode()) for document in documents)
        if not tokenizer.adds_bos:  # the first token of a document follows nothing, so it is not scored
            size -= sum(map(tokenizer.bytes_of_first, documents))
        if not tokens or not size:
            raise ValueError(f"{path}: no document has a second token to be scored; give longer ones")
        perplexity = math.exp(min(nats / tokens, 700.0))
        print(
            f"{path}: {len(documents):,} document{'s' * (len(documents) != 1)}, {size:,} bytes, {tokens:,} tokens: "
            f"perplexity {perplexity:.3f}, bits per token {nats / tokens / math.log(2):.4f}, bits per byte "
            f"{nats / size / math.log(2):.4f}",
            flush=True,
        )
