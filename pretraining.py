"""Language models on text: pretrain one, measure how well one predicts, make a tokenizer. One function an option."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import atomic_file, read_torch, write_checkpoint, write_safetensors
from config import PRESETS, LlamaConfig
from corpus import Corpus, Text, held_out_count, open_tokens, read_documents, text_files, tokenize_text, train_tokenizer
from distributed import Processes, started
from environment import (
    choose_device,
    choose_dtype,
    load_llama,
    load_tokenizer,
    print_header,
    report,
    settings_of,
)
from evaluation import DTYPES, score_documents
from llama import Llama
from options import text_and_weight, tokenizer_beside
from run_directory import RunDirectory
from tasks import LanguageModelling, Score
from tokenizer import Tokenizer
from training import train


def tokenizer(args: argparse.Namespace) -> None:
    """tokenizer: trains one on the texts."""
    paths = [text_and_weight(text)[0] for text in args.corpus]
    report(f"training a tokenizer of {args.vocab_size} pieces on {', '.join(paths)}; this takes minutes for 100 MB")
    train_tokenizer(paths, args.vocab_size, args.model_out, args.seed)
    report(f"wrote {args.model_out}")


def new_config(args: argparse.Namespace, vocab_size: int) -> LlamaConfig:
    """The config of a model to be trained from scratch: the preset's sizes, and those given; causal."""
    sizes = PRESETS[args.preset] | {
        name: getattr(args, name)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len")
        if getattr(args, name) is not None
    }
    return LlamaConfig(
        vocab_size=vocab_size, norm=args.norm or "layernorm", causal=args.attention != "bidirectional", **sizes
    )


def read_corpus(args: argparse.Namespace, tokenizer: Tokenizer, window: int, processes: Processes) -> Corpus:
    """The texts, tokenized by the main process where that was not yet done."""
    texts = []
    for path, weight in map(text_and_weight, args.corpus):
        files = text_files(path)
        if processes.is_main:
            done = [tokenize_text(file, tokenizer, Path(args.tokens_dir)) for file in files]
        done = processes.gather(done if processes.is_main else None)[0]
        tokens = [open_tokens(file, tokenizer) for file in done]
        text = Text(Path(path).stem, tokens, window, args.held_out, weight)
        documents = sum(len(one.text_bytes) for one in tokens)
        size = sum(len(one.ids) for one in tokens)
        report(
            f"corpus      {path}: {documents:,} documents, {size:,} tokens, {text.held_out_tokens:,} of them held out; "
            f"weight {weight:g}"
        )
        texts.append(text)
    return Corpus(texts, args.seed)


def pretrain(args: argparse.Namespace) -> None:
    """pretrain: trains a new model, or one that goes on from a checkpoint; writes it with its tokenizer."""
    tokenizer = load_tokenizer(args)
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    with started(device, args.fsdp) as processes:
        args.run_dir = processes.gather(args.run_dir)[0]
        torch.manual_seed(args.seed)
        if args.continued:
            llama, kind = load_llama(args, tokenizer)
        else:
            llama, kind = Llama(new_config(args, tokenizer.n_words)), "new, random weights"
        print_header(args, llama, kind, tokenizer, device, dtype)
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
        task = LanguageModelling(
            corpus, tokenizer, steps, args.batch_size, args.eval_every, sample_prompt=args.sample_prompt, seed=args.seed
        )
        run = RunDirectory(args.run_dir, writes=processes.is_main)

        def log(line: str) -> None:
            report(line)
            run.log(line)

        def write_best(state: dict[str, Tensor], epoch: int, score: Score) -> None:
            write_checkpoint(run.best_path, state, config, options=options, epoch=epoch, scores=score.metrics)

        options = vars(args) | {"dtype": next(name for name, value in DTYPES.items() if value == dtype)}
        if not args.resume:
            run.create(options)
        model = llama.to(device)
        if args.compile:
            model.compile(dynamic=False)
        train(model, task, settings_of(args, dtype), run, processes=processes, write_best=write_best, log=log)
        if processes.is_main:
            write_safetensors(args.model_out, read_torch(run.best_path)["model"], config, DTYPES[args.out_dtype])
            content = tokenizer.path.read_bytes()
            with atomic_file(tokenizer_beside(args.model_out), "wb") as file:
                file.write(content)
            report(f"wrote {args.model_out}, and {tokenizer_beside(args.model_out)}")


def perplexity(args: argparse.Namespace) -> None:
    """perplexity: how well the model predicts texts, document by document."""
    tokenizer = load_tokenizer(args)
    device = choose_device(args)
    dtype = choose_dtype(args, device)
    llama, kind = load_llama(args, tokenizer)
    print_header(args, llama, kind, tokenizer, device, dtype)
    if not llama.config.causal:
        raise ValueError("this model's attention is bidirectional: it sees what it should predict; no perplexity")
    llama.to(device)
    context = llama.config.max_seq_len
    window = args.window or context
    stride = args.stride or max(1, window // 2)
    if window > context or stride > window:
        raise ValueError(
            f"--window {window}, --stride {stride}: the stride must not exceed the window, nor that the context "
            f"of {context}"
        )
    for path in [text_and_weight(text)[0] for text in args.corpus]:
        documents = [document for file in text_files(path) for document in read_documents(file)]
        if not documents:
            raise ValueError(f"{path} holds no text; give a file with some")
        if args.held_out:
            documents = documents[-held_out_count(args.held_out, len(documents)) :]
        ids = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_many(documents)]
        nats, tokens = score_documents(llama, ids, window, stride, dtype)
        size = sum(len(document.encode()) for document in documents)
        print(
            f"{path}: {len(documents):,} documents, {size:,} bytes, {tokens:,} tokens: perplexity "
            f"{math.exp(nats / tokens):.3f}, bits per token {nats / tokens / math.log(2):.4f}, bits per byte "
            f"{nats / size / math.log(2):.4f}",
            flush=True,
        )
