"""The speed of text generation by this program and by transformers, on the same weights."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minillama.benchmarks.tables import LONG_PROMPT, ROWS
from minillama.environment import optional_package

PROMPT = 5  # tokens of the short prompt
NEW = 64  # tokens decoded for a rate


def write_random_model(folder: Path, seed: int) -> None:
    """Writes a random model of stories42M's size (RMSNorm, causal) as a Hugging Face folder."""
    from config import PRESETS, LlamaConfig
    from llama import Llama
    from minillama.formats.huggingface import write_huggingface

    torch.manual_seed(seed)
    llama = Llama(LlamaConfig(**PRESETS["stories42M"], norm="rmsnorm", causal=True))
    write_huggingface(folder, llama.config, llama.state_dict(), 1, 2)


def process_start() -> float:
    """The start of this process on the clock of time.time(), read from Linux's /proc; on other systems, now."""
    try:
        after_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / 100
        return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + after_boot
    except (OSError, ValueError, IndexError):
        return time.time()


# run(prompts (B, T) int64, number of new tokens) -> the seconds of each new token; the first includes the prompt.
# Greedy; ours can also sample, with settings of `sampling.stream`.
Continue = Callable[..., list[float]]


def ours(path: str, dtype: Any, quantize: str | None, device: str) -> tuple[Continue, int]:
    """Decoding as in --option generate, and the size of its weights in bytes."""
    # Imported here, so that transformers' time to the first token does not include it.
    from llama import load_pretrained
    from minillama.decoding import sampling
    from minillama.decoding.fast_llama import InferenceLlama
    from minillama.formats.checkpoint import read_checkpoint

    @cache
    def model(rows: int) -> InferenceLlama:
        return InferenceLlama(load_pretrained(path).to(device), dtype, quantize, rows)

    def run(prompts: torch.Tensor, new: int, **settings: Any) -> list[float]:
        fast = model(len(prompts))
        seconds, last = [], time.perf_counter()
        for chosen in sampling.stream(fast, prompts, new, **{"temperature": 0.0} | settings):
            chosen.tolist()  # waits for the token, as printing would
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        return seconds

    parameters = sum(tensor.numel() for tensor in read_checkpoint(path).state.values())
    return run, parameters * (1 if quantize else dtype.itemsize)


def transformers(path: str, dtype: Any, device: str) -> tuple[Continue, int]:
    """Decoding by transformers' generate, timed by a streamer, and the size of its weights in bytes."""
    with optional_package("transformers", "the comparison needs transformers (or give --without transformers)"):
        from transformers import AutoModelForCausalLM
        from transformers.generation.streamers import BaseStreamer
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: Any, new: int) -> list[float]:
        times = [time.perf_counter()]

        class Watch(BaseStreamer):
            def put(self, value: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        if len(prompts) > 1:  # a streamer takes only one row
            model.generate(prompts, **settings)
            return [(time.perf_counter() - start) / new] * new
        model.generate(prompts, streamer=Watch(), **settings)
        return [later - earlier for earlier, later in zip(times[1:], times[2:], strict=False)]  # [0]: before the prompt

    return run, sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def read_ceiling(device: str) -> float:
    """The memory bandwidth in bytes per second: the best of several large reads."""
    big = torch.ones(64 * 2**20, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        big.sum().item()
        best = min(best, time.perf_counter() - start)
    return big.numel() * 4 / best


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one contender in this process: seconds to the first token, for a long prompt, and per new token."""
    began = process_start()
    name, _, kind = args.contender.partition("-")
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    path = args.pretrained_model_path
    if name == "ours":
        run, weight_bytes = ours(path, dtype, "int8" if kind == "int8" else None, args.device)
    else:
        run, weight_bytes = transformers(path, dtype, args.device)
    draw = torch.Generator().manual_seed(args.seed)

    def prompts(rows: int, tokens: int) -> Any:
        return torch.randint(3, 300, (rows, tokens), generator=draw).to(args.device)

    run(prompts(1, PROMPT), 1)
    first = time.time() - began
    run(prompts(1, PROMPT), 8)  # warm up
    decode, sampled, many, prefill, early, late = [], [], [], [], [], []
    for _ in range(3):
        steps = run(prompts(1, PROMPT), NEW)[1:]
        decode.append(statistics.mean(steps))
        early.append(statistics.median(steps[:16]))
        if name == "ours":
            sampled.append(statistics.mean(run(prompts(1, PROMPT), NEW, temperature=1.0, epsilon=0.05)[1:]))
        many.append(statistics.mean(run(prompts(ROWS, PROMPT), NEW // 2)[1:]))
        prefill.append(run(prompts(1, LONG_PROMPT), 1)[0])
        late.append(statistics.median(run(prompts(1, 992), 17)[1:]))
    return {
        "first_token_seconds": first,
        "prefill_seconds": min(prefill),
        "decode_seconds": min(decode),
        "decode_16_seconds": min(many),
        "early_seconds": min(early),
        "late_seconds": min(late),
        "weight_bytes": weight_bytes,
        "ceiling": read_ceiling(args.device),
        "threads": torch.get_num_threads(),
    } | ({"sampled_seconds": min(sampled)} if sampled else {})
