"""The speed and memory of pretraining steps by this program and by transformers, on the same random tokens."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from config import PRESETS, LlamaConfig
from llama import Llama
from minillama.benchmarks import measuring
from minillama.environment import optional_package
from minillama.layers.precision import DTYPES, autocast
from minillama.training.distributed import Processes
from minillama.training.language_modelling import LanguageModelling
from minillama.training.loop import Training
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings

STEPS = 6
LENGTH = 512  # tokens in a row, if the context has as many
LR, BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0
VOCABULARY = {"mini": 4096}  # the bundled model's; other presets have LlamaConfig's default


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measures some steps of one contender: seconds, and peak memory in bytes."""
    torch.manual_seed(args.seed)
    sizes = {name: size for name, size in [("vocab_size", VOCABULARY.get(args.preset))] if size}
    llama = Llama(LlamaConfig(**PRESETS[args.preset] | {"norm": "rmsnorm"} | sizes, causal=True))  # type: ignore[arg-type]
    config, dtype = llama.config, DTYPES[args.dtype]
    length = min(LENGTH, config.max_seq_len)
    windows = torch.randint(3, config.vocab_size, (args.batch_size, length + 1))
    make = {"ours": ours, "transformers": transformers}[args.contender]
    step = make(llama, windows, args.device, dtype)
    for _ in range(2):  # warm up
        step()
    start = measuring.now(args.device)
    for _ in range(STEPS):
        step()
    seconds = measuring.now(args.device) - start
    tokens = STEPS * args.batch_size * length
    # The input embedding is no product; a tied one is the output's, too.
    weights = measuring.matrix_weights(llama) + config.tie_embeddings * llama.output.weight.numel()
    return {
        "train_seconds": seconds,
        "steps": STEPS,
        "rows": STEPS * args.batch_size,
        "tokens": tokens,
        "peak_bytes": measuring.peak_bytes(args.device),
        # Forward, and backward to inputs and to weights: 2 operations each per weight and token.
        "operations": 6 * weights * tokens,
        "ceiling": measuring.matrix_product_ceiling(args.device, dtype),
    }


def ours(llama: Llama, windows: Tensor, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """The step of the training loop, on a corpus that consists of the windows (B, T + 1)."""
    length, rows = windows.shape[1] - 1, list(range(len(windows)))
    text: Any = SimpleNamespace(train=SimpleNamespace(length=length), weight=1.0, checksum=0)
    corpus: Any = SimpleNamespace(texts=[text], pass_length=len(windows), window=lambda i: windows[i].numpy())
    tokenizer: Any = SimpleNamespace(encode=lambda *_, **more: [])
    task = LanguageModelling(corpus, tokenizer, STEPS, len(windows), STEPS)
    settings = Settings(LR, dtype, BETAS, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
    run = RunDirectory(tempfile.gettempdir(), writes=False)
    training = Training(llama.to(device).train(), task, settings, run, Processes())
    return lambda: training.step(rows, LR)


def transformers(llama: Llama, windows: Tensor, device: str, dtype: torch.dtype) -> Callable[[], Any]:
    """A step of transformers' causal model (RMSNorm) with torch's fused AdamW and the same clipping."""
    with optional_package("transformers", "the comparison needs transformers (or give --without transformers)"):
        from transformers import LlamaForCausalLM
    tied = llama.config.tie_embeddings
    model: Any = LlamaForCausalLM(measuring.their_config(llama, tie_word_embeddings=tied))
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    inputs, targets = (part.contiguous().to(device) for part in (windows[:, :-1], windows[:, 1:]))

    def step() -> None:
        with autocast(torch.device(device), dtype):
            loss = model(input_ids=inputs, shift_labels=targets, labels=targets).loss
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()

    return step
