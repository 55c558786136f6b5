"""Shared parts of the benchmarks of training: the peer's config, memory, operations, and the speed of the machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from llama import Llama
from minillama.training.memory import peak_memory


def their_config(llama: Llama, **more: Any) -> Any:
    """The config of transformers' Llama with the sizes of ours."""
    from transformers import LlamaConfig

    own = llama.config
    return LlamaConfig(  # type: ignore[call-arg]
        vocab_size=own.vocab_size,
        hidden_size=own.dim,
        intermediate_size=llama.layers[0].feed_forward.w1.out_features,  # type: ignore[union-attr, arg-type]
        num_hidden_layers=own.n_layers,
        num_attention_heads=own.n_heads,
        num_key_value_heads=own.kv_heads,
        max_position_embeddings=own.max_seq_len,
        use_cache=False,
        **more,
    )


def now(device: str) -> float:
    """The time in seconds, after the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """The largest memory so far, in bytes: allocated on the device, or on the CPU resident for this process.

    0 where the system does not say (Windows).
    """
    return peak_memory(torch.device(device)) or 0


def matrix_weights(llama: Llama) -> int:
    """The number of weights in matrix products, without the embedding that the output may share."""
    return sum(p.numel() for name, p in llama.named_parameters() if p.dim() == 2 and "tok_embeddings" not in name)


def matrix_product_ceiling(device: str, dtype: torch.dtype) -> float:
    """The speed of a large matrix product on this machine, in operations per second: the best of several."""
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
