"""Tests that need a GPU; about five minutes on one card: `python -m pytest -m cuda tests/test_cuda.py -s`.

Without a card, or with ON_CPU=1, the tests that can run on the CPU do so, which checks the tests themselves. Those for
two cards are skipped on one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from classifier import LlamaEmbeddingClassifier
from config import LlamaConfig
from conftest import ROOT
from llama import Llama
from minillama.cli.loading import choose_device
from minillama.decoding.fast_llama import InferenceLlama
from minillama.decoding.sampling import LanguageModel, generate, stream
from minillama.layers.precision import autocast
from minillama.text.labelled import Row
from minillama.training.classification import Classification
from minillama.training.compilation import compile_model
from minillama.training.distributed import Processes
from minillama.training.loop import Training
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings
from models import tiny_llama
from optimizer import AdamW

ON_CPU = bool(os.environ.get("ON_CPU")) or not torch.cuda.is_available()
DEVICE = torch.device("cpu" if ON_CPU else "cuda:0")
CARDS = 0 if ON_CPU else torch.cuda.device_count()
pytestmark = pytest.mark.cuda
needs_gpu = pytest.mark.skipif(ON_CPU, reason="needs a GPU")
two_gpus = pytest.mark.skipif(CARDS < 2, reason="needs two GPUs")
CARD = "the CPU" if ON_CPU else torch.cuda.get_device_name()
KINDS: dict[str, dict[str, Any]] = {
    "bidirectional": {"norm": "layernorm"},
    "grouped": {"causal": True, "norm": "rmsnorm"},
    "alibi": {"causal": True, "position_embedding_type": "alibi"},
    "window": {"causal": True, "sliding_window": 5},
    "differential": {"causal": True, "attention_type": "differential"},
}


@pytest.fixture(scope="module", autouse=True)
def as_the_program_sets_it_up() -> Iterator[None]:
    """The switches of torch that the program sets for a device."""
    options: Any = SimpleNamespace(device=DEVICE.type, use_gpu=False, deterministic=True)
    before = torch.are_deterministic_algorithms_enabled()
    choose_device(options)
    yield
    torch.use_deterministic_algorithms(before)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.float().cpu(), wanted.float().cpu()
    return float((found - wanted).norm() / wanted.norm())


def seconds_a_token(model: LanguageModel, prompt: torch.Tensor, new: int) -> list[float]:
    """The seconds of each new token, greedy, read one by one as a program that prints them does."""
    times, last = [], time.perf_counter()
    for chosen in stream(model, prompt, new, temperature=0.0):
        int(chosen)
        times.append(time.perf_counter() - last)
        last = time.perf_counter()
    return times


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-4), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)])
def test_logits_are_those_of_the_cpu(kind, padded, dtype, allowed):
    model = tiny_llama(**KINDS[kind])
    ids = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(24) < torch.tensor([24, 17, 9])[:, None] if padded else None
    with torch.no_grad():
        wanted, _ = model(ids, ids, mask)
        model.to(DEVICE)
        with autocast(DEVICE, dtype):
            found, _ = model(ids.to(DEVICE), ids.to(DEVICE), None if mask is None else mask.to(DEVICE))
    real = slice(None) if mask is None else mask
    assert relative_error(found.cpu()[real], wanted[real]) < allowed


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("kind", ["grouped", "alibi", "window"])
def test_the_cache_changes_nothing(kind, quantize, padded):
    """Token by token through the cache, and all at once; with prompts padded on the left, too."""
    rows = 2 if padded else 1
    model = InferenceLlama(tiny_llama(**KINDS[kind]).to(DEVICE), torch.bfloat16, quantize, rows)
    ids = torch.randint(3, 64, (rows, 20), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    mask = torch.ones(rows, 20, dtype=torch.bool, device=DEVICE)
    mask[1:, :4] = False
    with torch.no_grad():
        wanted, _ = model(ids, ids, mask if padded else None)
        cache = model.new_cache(20)
        model(ids[:, :8], attention_mask=mask[:, :8] if padded else None, cache=cache)
        for end in range(9, 21):
            found, _ = model(ids[:, end - 1 : end], cache=cache)
            assert relative_error(found[:, -1], wanted[:, end - 1]) < 4e-2


@pytest.mark.parametrize("T", [63, 64, 96, 128, 192, 320])
def test_gradients_under_a_mask_are_finite(T):
    """cuDNN's backward pass gives NaN at T % 128 == 64 with a mask and strongly negative scores (pytorch#196678)."""
    query = torch.randn(1, 1, T, 64, device=DEVICE, dtype=torch.bfloat16) * 0.1
    key, value = torch.randn_like(query) * 0.1, torch.randn_like(query)
    query[..., 0], key[..., 0] = 1.0, -120 * 8.0
    for tensor in (query, key, value):
        tensor.requires_grad_()
    mask = torch.ones(T, T, dtype=torch.bool, device=DEVICE).tril()[None, None]
    F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None and tensor.grad.isfinite().all()


@needs_gpu
def test_a_new_length_of_the_cache_is_no_slower_than_a_known_one():
    """cuDNN would build a plan for each length."""
    config = LlamaConfig(dim=512, n_layers=8, n_heads=8, max_seq_len=512, norm="rmsnorm", causal=True)
    model = InferenceLlama(Llama(config).to(DEVICE), torch.bfloat16)
    prompt = torch.randint(3, 300, (1, 40), device=DEVICE)
    seconds_a_token(model, prompt[:, :5], 20)  # warm up at other lengths
    first, again = (statistics.median(seconds_a_token(model, prompt, 60)[2:]) for _ in range(2))
    print(f"{CARD}: {first * 1e3:.2f} ms a token at new lengths, {again * 1e3:.2f} ms again")
    assert first < 2 * again


def training_of(folder: Path, dtype: torch.dtype, shortest: int = 3, **changes: Any) -> Training:
    torch.manual_seed(0)
    llama = tiny_llama(dropout=0.1, dim=64, max_seq_len=shortest + 9)
    config = SimpleNamespace(llama=llama, num_labels=3, hidden_dropout_prob=0.1, option="finetune")
    rows = [Row(i % 3, f"row {i}", tuple(1 + (i * j) % 60 for j in range(shortest + i % 9))) for i in range(24)]
    task = Classification(rows, rows, epochs=1, batch_size=8, seed=1)
    folder.mkdir(exist_ok=True)
    run = RunDirectory(folder)
    run.create({})
    model = LlamaEmbeddingClassifier(config).to(DEVICE).train()
    return Training(model, task, Settings(lr=1e-2, dtype=dtype, **changes), run, Processes(), lambda line: None)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_and_a_token_wait_once(dtype, tmp_path):
    """For the loss of the step, and for the token that the program prints."""
    training = training_of(tmp_path, dtype, max_grad_norm=1.0)
    model = InferenceLlama(tiny_llama(causal=True).to(DEVICE), dtype)
    prompt = torch.randint(3, 64, (1, 5), device=DEVICE)
    training.step(list(range(8)), 1e-2)
    torch.use_deterministic_algorithms(False)  # else the running total of a draw is computed on the CPU
    try:
        tokens = stream(model, prompt, 30, temperature=0.8, eos_ids=(2,))
        next(tokens)
        step = waits(lambda: training.step(list(range(8)), 1e-2))
        token = [waits(lambda: int(next(tokens)[0])) for _ in range(16)]
    finally:
        torch.use_deterministic_algorithms(True)
    assert step <= 1 and statistics.median(token) <= 1 and max(token) <= 2  # of every 16 tokens, one checks for the end


def waits(run: Callable[[], Any]) -> int:
    """How often `run` waits for the card."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(one.message) for one in found)


@pytest.mark.parametrize("micro", [None, 3])
def test_a_float32_step_is_that_of_the_cpu(tmp_path, micro):
    """With padding, pieces, clipping, and the fused AdamW against the formula; without dropout."""
    settings = {"max_grad_norm": 0.5, "weight_decay": 0.1, "micro_batch_size": micro}
    ours = training_of(tmp_path / "a", torch.float32, **settings)
    theirs = training_of(tmp_path / "b", torch.float32, **settings)
    for training in (ours, theirs):
        llama: Any = training.model.llama
        llama.config = replace(llama.config, dropout=0.0)
        for module in training.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in llama.layers:
            layer.attention.config = llama.config
    theirs.model.cpu()
    theirs.device = torch.device("cpu")
    theirs.optimizer = AdamW(theirs.optimizer.param_groups, lr=1e-2, fused=False)
    for step in range(3):
        rows = list(range(8 * step, 8 * step + 8))
        assert ours.step(rows, 1e-3)[0] == pytest.approx(theirs.step(rows, 1e-3)[0], rel=1e-4)
    for mine, wanted in zip(ours.trained, theirs.trained, strict=True):
        torch.testing.assert_close(mine.cpu(), wanted, atol=2e-4, rtol=2e-3)


def test_fp16_skips_an_overflow_and_resumes_from_there(tmp_path):
    training = training_of(tmp_path, torch.float16, max_grad_norm=1.0)
    training.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**30)
    before = [p.detach().clone() for p in training.trained]
    training.step(list(range(8)), 1e-2)
    assert training.scaler.get_scale() == 2.0**29
    assert all(torch.equal(a, b) for a, b in zip(before, training.trained, strict=True))
    training.progress.step = training.progress.batch = 1
    training.save()
    again = training_of(tmp_path, torch.float16, max_grad_norm=1.0)
    again.restore()
    assert again.scaler.get_scale() == 2.0**29 and not again.optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, dtype):
    """With --deterministic and dropout. The rows are so long that the backward pass adds up several blocks."""
    shortest = 60 if ON_CPU else 600
    whole = training_of(tmp_path / "whole", dtype, shortest)
    torch.manual_seed(5)
    batches = [list(range(i, i + 8)) for i in (0, 8, 16, 4)]
    for number, rows in enumerate(batches, start=1):
        whole.step(rows, 1e-2)
        if number == 2:
            whole.progress.step = whole.progress.batch = 2
            whole.save()
    torch.manual_seed(99)
    resumed = training_of(tmp_path / "whole", dtype, shortest)
    resumed.restore()
    for rows in batches[2:]:
        resumed.step(rows, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(whole.trained, resumed.trained, strict=True))


@needs_gpu
def test_compiled_it_computes_the_same_from_few_graphs():
    from torch._dynamo.utils import counters

    model = tiny_llama(causal=True, norm="rmsnorm", max_seq_len=256).to(DEVICE)
    ids = torch.randint(0, 64, (4, 33), device=DEVICE)
    with torch.no_grad(), autocast(DEVICE, torch.bfloat16):
        wanted, _ = model(ids, ids)
    torch._dynamo.reset()
    counters.clear()
    compile_model(model, DEVICE, dynamic=True)
    for length in (33, 40, 90, 200):
        some = torch.randint(0, 64, (4, length), device=DEVICE)
        with torch.no_grad(), autocast(DEVICE, torch.bfloat16):
            model(some, some)
            found, _ = model(ids, ids)
    assert relative_error(found, wanted) < 2e-2 and counters["stats"]["unique_graphs"] <= 3


@needs_gpu
def test_decoding_a_large_shape_reads_the_weights_at_the_speed_of_memory():
    """Four layers of a model of 7 billion weights, in bfloat16 and int8, against the speed of a copy."""
    bandwidth = copy_bandwidth()
    rates = {}
    for quantize in (None, "int8"):
        sizes: dict[str, Any] = dict(dim=4096, n_layers=4, n_heads=32, n_kv_heads=32, hidden_dim=11008)
        config = LlamaConfig(**sizes, max_seq_len=1024, norm="rmsnorm", causal=True, tie_embeddings=False)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(DEVICE):
            llama = Llama(config)
        torch.set_default_dtype(torch.float32)
        weights = sum(p.numel() for name, p in llama.named_parameters() if "tok_embeddings" not in name)
        torch.cuda.reset_peak_memory_stats()
        model = InferenceLlama(llama, torch.bfloat16, quantize)
        prompt = torch.randint(3, 300, (1, 16), device=DEVICE)
        seconds_a_token(model, prompt, 48)
        assert model.graphs is not None and model.graphs.steps  # else a capture failed
        rates[quantize] = 1 / statistics.median(seconds_a_token(model, prompt, 48)[4:])
        size = weights * (1 if quantize else 2)
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{CARD}, {quantize or 'bfloat16'}: {rates[quantize]:.0f} tokens a second, "
            f"{rates[quantize] * size / bandwidth:.2f} of a copy's {bandwidth / 1e9:.0f} GB/s, peak {peak:.1f} GiB"
        )
        del model, llama
    assert rates[None] > 0.6 * bandwidth / (2 * weights)
    assert rates["int8"] > rates[None]


def copy_bandwidth() -> float:
    """Bytes that a large copy reads and writes in a second."""
    one = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(one)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other.copy_(one)
    start.record()
    for _ in range(10):
        other.copy_(one)
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * one.numel() / (start.elapsed_time(end) / 1e3)


# Several processes

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def launched(folder: Path, arguments: list[str], timeout: float = 240, **environment: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


@two_gpus
@pytest.mark.parametrize("more", [[], ["--fsdp"], ["--fsdp", "--max_grad_norm", "1"]], ids=["DDP", "FSDP2", "clipped"])
def test_two_cards_equal_one(more, tmp_path):
    """By NCCL, in bfloat16."""
    base = [str(ROOT / "run_llama.py"), "--option", "finetune", "--use_gpu", "--epochs", "1", "--batch_size", "16"]
    for name, launch in (("one", [sys.executable]), ("two", [*LAUNCH, "--nproc_per_node=2"])):
        done = launched(tmp_path, [*launch, *base, "--run_dir", name, *(more if name == "two" else [])])
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name / "best.pt", weights_only=True)["model"] for name in ("one", "two"))
    for name in one:
        assert (one[name] - two[name]).norm() < 2e-2 * one[name].norm() + 1e-3, name


BROKEN = """
import os, sys, torch, torch.distributed as dist
from minillama.training.distributed import process_group
device = torch.device("cpu" if os.environ.get("ON_CPU") else f"cuda:{os.environ['LOCAL_RANK']}")
try:
    with process_group(device, False) as processes:
        processes.wait()
        if processes.rank == 1:
            raise ValueError("rank one broke")
        x = torch.ones(1, device=device)
        dist.all_reduce(x)
        x.item()
except ValueError as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not ON_CPU and CARDS < 2, reason="needs two GPUs")
def test_a_process_that_fails_ends_the_run_with_its_message(tmp_path):
    """While the other one waits for it in a collective."""
    (tmp_path / "broken.py").write_text(BROKEN, encoding="utf-8")
    where = {"ON_CPU": "1"} if ON_CPU else {}
    done = launched(tmp_path, [*LAUNCH, "--nproc_per_node=2", "broken.py"], 90, **where)
    assert done.returncode != 0 and "rank one broke" in done.stderr


@needs_gpu
def test_one_process_under_torchrun_finds_its_card(tmp_path):
    command = ["--prompt", "Once", "--temperature", "0", "--max_new_tokens", "3", "--use_gpu"]
    done = launched(tmp_path, [*LAUNCH, "--nproc_per_node=1", str(ROOT / "run_llama.py"), *command])
    assert done.returncode == 0 and "device      cuda:0" in done.stderr, done.stderr


def test_text_on_the_card_is_that_of_the_cpu():
    model = tiny_llama(**KINDS["grouped"])
    prompt = torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(3))
    wanted = generate(model, prompt, 20, temperature=0.0)
    fast = InferenceLlama(model.to(DEVICE))
    assert generate(fast, prompt.to(DEVICE), 20, temperature=0.0).cpu().equal(wanted)
