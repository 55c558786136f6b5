"""How fast text is generated, by this program and by transformers, on the same weights; for benchmark.py."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillama.environment import optional_package

CONTENDERS = ("ours", "ours-bf16", "ours-int8", "transformers", "transformers-bf16")
PROMPT, LONG_PROMPT, ROWS = 5, 512, 16
NEW = 64  # tokens decoded for a rate


def write_random_model(folder: Path, seed: int) -> None:
    """A random model of stories42M's sizes (RMSNorm, causal) as a folder that transformers opens, too."""
    import torch

    from config import PRESETS, LlamaConfig
    from llama import Llama
    from minillama.formats.huggingface import write_huggingface

    torch.manual_seed(seed)
    llama = Llama(LlamaConfig(**PRESETS["stories42M"], norm="rmsnorm", causal=True))
    write_huggingface(folder, llama.config, llama.state_dict(), 1, 2)


def process_start() -> float:
    """When this process began, on time.time()'s clock; Linux tells, elsewhere it is now."""
    try:
        after_boot = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / 100
        return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + after_boot
    except (OSError, ValueError, IndexError):
        return time.time()


# One token after another: continue(prompts (B, T) int64, new tokens) -> seconds each took, the first with the prompt.
Continue = Callable[[Any, int], list[float]]


def ours(path: str, dtype: Any, quantize: str | None, device: str) -> tuple[Continue, int]:
    """Decoding as --option generate does it, and the number of bytes of its weights."""
    import torch

    from llama import load_pretrained
    from minillama.decoding import sampling
    from minillama.decoding.fast_llama import InferenceLlama

    llama = load_pretrained(path).to(device)
    parameters = sum(parameter.numel() for parameter in llama.parameters())
    model = InferenceLlama(llama, dtype, quantize)

    def run(prompts: torch.Tensor, new: int) -> list[float]:
        seconds, last = [], time.perf_counter()
        for chosen in sampling.stream(model, prompts, new, temperature=0.0):
            chosen.tolist()  # as a terminal would need it
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        return seconds

    return run, parameters * (1 if quantize else dtype.itemsize)


def transformers(path: str, dtype: Any, device: str) -> tuple[Continue, int]:
    """transformers' generate, watched by a streamer."""
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
        if len(prompts) > 1:  # a streamer sees one row only
            model.generate(prompts, **settings)
            return [(time.perf_counter() - start) / new] * new
        model.generate(prompts, streamer=Watch(), **settings)
        return [later - earlier for earlier, later in zip(times[1:], times[2:], strict=False)]  # [0]: before the prompt

    return run, sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def read_ceiling(device: str) -> float:
    """Bytes a second of a large read, here and now, the best of several."""
    import torch

    big = torch.ones(64 * 2**20, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        big.sum().item()
        best = min(best, time.perf_counter() - start)
    return big.numel() * 4 / best


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process: seconds to the first token, and of a prompt and of tokens after it."""
    import torch

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
    decode, many, prefill, early, late = [], [], [], [], []
    for _ in range(3):
        steps = run(prompts(1, PROMPT), NEW)[1:]
        decode.append(statistics.mean(steps))
        early.append(statistics.median(steps[:16]))
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
    }


def summary(found: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """A row of figures for each contender, medians of the rounds, and how ours compare, round by round."""

    def median(name: str, value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, found[name]))

    table = {
        name: {
            "first_token_seconds": median(name, lambda one: one["first_token_seconds"]),
            "prefill_tokens_a_second": median(name, lambda one: LONG_PROMPT / one["prefill_seconds"]),
            "tokens_a_second": median(name, lambda one: 1 / one["decode_seconds"]),
            "tokens_a_second_of_16_rows": median(name, lambda one: ROWS / one["decode_16_seconds"]),
            "position_1000_against_10": median(name, lambda one: one["late_seconds"] / one["early_seconds"]),
            "of_the_bandwidth": median(name, lambda one: one["weight_bytes"] / one["decode_seconds"] / one["ceiling"]),
        }
        for name in found
    }
    ratios = {}
    for mine, theirs in (("ours", "transformers"), ("ours-bf16", "transformers-bf16"), ("ours-int8", "transformers")):
        if mine in found and theirs in found:
            for what in ("prefill_seconds", "decode_seconds", "decode_16_seconds"):
                pairs = zip(found[mine], found[theirs], strict=True)
                ratios[f"{mine} against {theirs}, {what.removesuffix('_seconds')}"] = statistics.median(
                    b[what] / a[what] for a, b in pairs
                )
    return table, ratios


def print_summary(table: dict[str, dict[str, float]], ratios: dict[str, float]) -> None:
    """The figures for people."""
    heads = ("first token s", "prefill tok/s", "tok/s", "tok/s of 16", "1000 : 10", "of bandwidth")
    print(f"{'':18}" + "".join(f"{head:>15}" for head in heads))
    for name, values in table.items():
        figures = (f"{value:15.2f}" if value < 20 else f"{value:15,.0f}" for value in values.values())
        print(f"{name:18}" + "".join(figures))
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.2f}x")
    sys.stdout.flush()
