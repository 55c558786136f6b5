"""Slow and obvious implementations to compare with: one row, one head, one query, one key at a time, in float64."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig
from rope import apply_rotary_emb


def slopes(heads: int) -> list[float]:
    """ALiBi's, by the rule in words: for a power of two a geometric row that starts at 2^(-8/n) with that very ratio;
    else those of the power below, then the odd ones (the first, the third, ...) of the power above.
    """
    power = 2 ** math.floor(math.log2(heads))
    if power == heads:
        row = [2 ** (-8 / heads)]
        while len(row) < heads:
            row.append(row[-1] * row[0])
        return row
    return (slopes(power) + slopes(2 * power)[0::2])[:heads]


def norm(x: Tensor, state: dict[str, Tensor], name: str, kind: str, eps: float) -> Tensor:
    if kind == "layernorm":
        x = x - x.mean()
    normed = x / math.sqrt(float((x * x).mean()) + eps) * state[f"{name}.weight"]
    return normed + state[f"{name}.bias"] if kind == "layernorm" else normed


def softmax_weights(query: Tensor, keys: list[Tensor], extra: list[float]) -> list[float]:
    """Attention of one query (hd,) over its keys, with an addition for each score."""
    scores = [float(query @ key) / math.sqrt(len(query)) + more for key, more in zip(keys, extra, strict=True)]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [one / sum(exponentials) for one in exponentials]


def attention(
    x: Tensor, state: dict[str, Tensor], layer: int, config: LlamaConfig, maps: Tensor | None = None
) -> Tensor:
    """x (T, D), normed -> (T, D), for a row without padding. maps: (H, T, T), which takes the weights."""
    T, hd, H, K = len(x), config.head_dim, config.n_heads, config.kv_heads
    name = f"layers.{layer}.attention"
    query, key, value = (x @ state[f"{name}.compute_{what}.weight"].T for what in ("query", "key", "value"))
    query, key = query.view(T, H, hd), key.view(T, K, hd)
    if config.position_embedding_type == "rotary":  # whose tables are float32; tests/test_rope.py has them
        turned = apply_rotary_emb(query[None], key[None], hd, config.max_seq_len, config.rope_theta)
        query, key = turned[0][0], turned[1][0]
    differential = config.attention_type == "differential"
    heads, kv_heads = (H // 2, K // 2) if differential else (H, K)
    width = 2 * hd if differential else hd
    slope = slopes(heads) if config.position_embedding_type == "alibi" else [0.0] * heads
    value = value.view(T, kv_heads, width)
    mixed = torch.zeros(T, heads, width, dtype=x.dtype)
    for head in range(heads):
        of_keys = head // (heads // kv_heads)
        for t in range(T):
            first = 0 if config.sliding_window is None else max(0, t - config.sliding_window + 1)
            seen = range(first, t + 1 if config.causal else T)
            extra = [-slope[head] * (t - s) for s in seen]
            weights = softmax_weights(query[t, head], [key[s, of_keys] for s in seen], extra)
            if maps is not None:
                maps[head, t, list(seen)] = torch.tensor(weights, dtype=maps.dtype)
            if differential:
                q1, k1, q2, k2 = (state[f"{name}.lambda_{which}"] for which in ("q1", "k1", "q2", "k2"))
                start = 0.8 - 0.6 * math.exp(-0.3 * layer)
                balance = math.exp(float(q1 @ k1)) - math.exp(float(q2 @ k2)) + start
                second = softmax_weights(query[t, heads + head], [key[s, kv_heads + of_keys] for s in seen], extra)
                if maps is not None:
                    maps[heads + head, t, list(seen)] = torch.tensor(second, dtype=maps.dtype)
                weights = [one - balance * other for one, other in zip(weights, second, strict=True)]
            for s, weight in zip(seen, weights, strict=True):
                mixed[t, head] += weight * value[s, of_keys]
            if differential:
                mixed[t, head] = (1 - start) * norm(mixed[t, head], state, f"{name}.head_norm", "rmsnorm", 1e-5)
    return mixed.view(T, -1) @ state[f"{name}.compute_output.weight"].T


def logits(
    state: dict[str, Tensor],
    config: LlamaConfig,
    ids: Tensor,
    maps: list[Tensor] | None = None,
    states: list[Tensor] | None = None,
) -> Tensor:
    """Logits (T, V) of a Llama with these weights (float64) for one row of ids (T,).

    maps: takes each layer's weights (H, T, T). states: takes what the final norm makes of each layer's stream (T, D).
    """
    x = state["tok_embeddings.weight"][ids]
    for layer in range(config.n_layers):
        name = f"layers.{layer}"
        normed = [norm(row, state, f"{name}.attention_norm", config.norm, config.layer_norm_eps) for row in x]
        seen = torch.zeros(config.n_heads, len(ids), len(ids), dtype=x.dtype)
        x = x + attention(torch.stack(normed), state, layer, config, seen)
        if maps is not None:
            maps.append(seen)
        for t, row in enumerate(x):
            normed_row = norm(row, state, f"{name}.ffn_norm", config.norm, config.layer_norm_eps)
            gate, up = (state[f"{name}.feed_forward.{w}.weight"] @ normed_row for w in ("w1", "w3"))
            x[t] = row + state[f"{name}.feed_forward.w2.weight"] @ (gate * gate.sigmoid() * up)
        if states is not None:
            states.append(final_norm(x, state, config))
    return final_norm(x, state, config) @ state["output.weight"].T


def final_norm(x: Tensor, state: dict[str, Tensor], config: LlamaConfig) -> Tensor:
    return torch.stack([norm(row, state, "norm", config.norm, config.layer_norm_eps) for row in x])


def brute_force(model, documents, window, stride):
    """Token by token in float64: each sees what its window has before it, and no other token is ever beside it."""
    nats = count = 0
    for ids in documents:
        for t in range(1, len(ids)):
            start = 0  # of the first window that reaches this token
            while start + window < t:
                start += stride
            with torch.no_grad():
                logits = model(torch.tensor([ids[start:t]]))[0][0, -1].double()
            nats -= logits.log_softmax(-1)[ids[t]].item()
            count += 1
    return nats, count


def llama2c_arrays(seed: int = 0, untied: bool = False, n_heads: int = 4, n_kv_heads: int = 2) -> dict:
    """Sizes and random weights as llama2.c calls them; each weight with a leading layer axis."""
    dim, hidden, layers, vocab, seq = 16, 20, 2, 11, 6
    kv = dim // n_heads * n_kv_heads
    shapes = {
        "embedding": (vocab, dim),
        "att_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
    }
    if untied:
        shapes["classifier"] = (vocab, dim)
    generator = np.random.default_rng(seed)
    arrays = {name: generator.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
    return {"sizes": (dim, hidden, layers, n_heads, n_kv_heads, vocab, seq), "arrays": arrays}


def v0_bytes(sizes, arrays) -> bytes:
    *others, vocab, seq = sizes
    header = struct.pack("<7i", *others, -vocab if "classifier" in arrays else vocab, seq)
    unread_tables = np.full(seq * sizes[0] // sizes[3], np.nan, dtype="<f4")
    order = ("embedding", "att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm")
    body = b"".join(arrays[name].tobytes() for name in order) + unread_tables.tobytes()
    return header + body + (arrays["classifier"].tobytes() if "classifier" in arrays else b"")


def v1_bytes(sizes, arrays, version: int = 1) -> bytes:
    header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, "classifier" not in arrays).ljust(256, b"\0")
    order = ["att_norm", "ffn_norm", "norm", "embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    if "classifier" in arrays:
        order.append("classifier")
    return header + b"".join(arrays[name].tobytes() for name in order)
