"""Probes of the model's parts: norm, rope, scores, attention, block and the whole model.

Each function gives (name, settings, arrays) for a setup, drawn from a source of random numbers. Sizes are small, odd
and different from each other, so that a wrong axis shows. Values are float32, so that both sides start from the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minillama.grading.kit_setups import Setup

Arrays = dict[str, np.ndarray]
Probe = tuple[str, dict[str, Any], Arrays]
Source = np.random.Generator


def conventions(setup: Setup) -> dict[str, Any]:
    """The norm and the attention of a setup."""
    return {"norm": setup.norm, "causal": setup.causal_argument}


def normal(source: Source, *shape: int, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    return (mean + std * source.standard_normal(shape)).astype(np.float32)


def with_gradients(probes: list[Probe], *names: str) -> list[Probe]:
    """The probes; the first also asks for the gradients of these arrays."""
    (name, settings, arrays), *others = probes
    return [(name, settings | {"gradients": list(names)}, arrays), *others]


def norm_weights(source: Source, dim: int, kind: str, name: str = "") -> Arrays:
    weights = {f"{name}weight": normal(source, dim, mean=1.0, std=0.4)}
    return weights | ({f"{name}bias": normal(source, dim, std=0.4)} if kind == "layernorm" else {})


def norm(setup: Setup, source: Source) -> list[Probe]:
    kind = conventions(setup)["norm"]
    probes = []
    for name, mean, std, eps in (
        ("usual values", 0.3, 1.0, 1e-5),
        ("variance of 1e-4, eps 1e-5", 0.002, 1e-2, 1e-5),
        ("variance of 1e-4, eps 3e-4", 0.002, 1e-2, 3e-4),
        ("variance of 1e-8, eps 3e-4", 1e-4, 1e-4, 3e-4),
        ("large mean", 20.0, 1.5, 1e-3),
        ("variance of 1e-6, eps 1e-3", 0.001, 1e-3, 1e-3),
    ):
        dim = 2 * int(source.integers(4, 8)) + 1
        x = normal(source, 3, int(source.integers(4, 7)), dim, mean=mean, std=std)
        arrays = {"x": x} | norm_weights(source, dim, kind)
        probes.append((name, {"norm": kind, "eps": eps, "dtype": "float32"}, arrays))
    dim = 13
    half = {"x": normal(source, 3, 5, dim, std=600.0)} | norm_weights(source, dim, kind)
    half = {name: value.astype(np.float16).astype(np.float32) for name, value in half.items()}
    settings = {"norm": kind, "eps": 1e-5, "dtype": "float16", "tolerance": 6e-3}
    probes.append(("float16 with squares beyond its range", settings, half))
    return with_gradients(probes, *half)


def rope(setup: Setup, source: Source) -> list[Probe]:
    probes = []
    for name, theta, rows, length, heads, kv_heads, hd in (
        ("usual theta", 10000.0, 2, 7, 4, 4, 4),
        ("grouped heads, another theta", 100.0, 3, int(source.integers(9, 14)), 6, 2, 10),
        ("one pair, one head", 10000.0, 1, 5, 1, 1, 2),
        ("long row", 10000.0, 1, 301, 3, 1, 4),
        ("other theta, sizes of the first probe", 300.0, 2, 7, 4, 4, 4),
    ):
        arrays = {
            "query": normal(source, rows, length, heads, hd),
            "key": normal(source, rows, length, kv_heads, hd),
        }
        settings = {"theta": theta, "head_dim": hd, "max_seq_len": length + 4}
        probes.append((name, settings, arrays))
    return with_gradients(probes, "query", "key")


def scores(setup: Setup, source: Source) -> list[Probe]:
    probes = []
    for name, rows, heads, length, hd, dropout in (
        ("one row", 1, 3, 5, 6, 0.0),
        ("batch of three", 3, 2, int(source.integers(6, 10)), 8, 0.0),
        ("dropout of 0.5 in evaluation", 2, 2, 4, 4, 0.5),
        ("twelve positions", 1, 2, 12, 10, 0.0),
    ):
        arrays = {part: normal(source, rows, heads, length, hd) for part in ("query", "key", "value")}
        settings = {"dim": heads * hd, "n_heads": heads, "n_kv_heads": heads, "max_seq_len": 32, "dropout": dropout}
        probes.append((name, conventions(setup) | settings, arrays))
    return with_gradients(probes, "query", "key", "value")


def sizes(hd: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """Fields of a LlamaConfig. The feed-forward width is odd, so it is not mistaken for the model's."""
    settings = {"dim": hd * heads, "n_heads": heads, "n_kv_heads": kv_heads, "max_seq_len": 32, "dropout": 0.0}
    settings |= {"hidden_dim": 2 * hd * heads + 1, "layer_norm_eps": 1e-5, "rope_theta": 10000.0}
    return settings | {"n_layers": 1, "vocab_size": 8} | more


def attention_weights(source: Source, settings: dict[str, Any], name: str = "") -> Arrays:
    dim = settings["dim"]
    kv_dim = dim // settings["n_heads"] * settings["n_kv_heads"]
    rows = {"query": dim, "key": kv_dim, "value": kv_dim, "output": dim}
    return {f"{name}compute_{part}.weight": normal(source, rows[part], dim, std=1.3 * dim**-0.5) for part in rows}


def layer_weights(source: Source, settings: dict[str, Any], name: str = "") -> Arrays:
    dim, hidden = settings["dim"], settings["hidden_dim"]
    weights = attention_weights(source, settings, f"{name}attention.")
    for part in ("attention_norm", "ffn_norm"):
        weights |= norm_weights(source, dim, settings["norm"], f"{name}{part}.")
    for part, shape in (("w1", (hidden, dim)), ("w2", (dim, hidden)), ("w3", (hidden, dim))):
        weights[f"{name}feed_forward.{part}.weight"] = normal(source, *shape, std=1.2 * shape[1] ** -0.5)
    return weights


def attention(setup: Setup, source: Source) -> list[Probe]:
    probes = []
    for name, hd, heads, kv_heads, rows, length, more in (
        ("as many key/value heads", 4, 7, 7, 2, 7, {}),
        ("three queries for each key/value head", 4, 6, 2, 3, int(source.integers(3, 6)) * 2 - 1, {}),
        ("dropout of 0.5 in evaluation", 4, 2, 1, 2, 4, {"dropout": 0.5}),
        ("one head", 6, 1, 1, 4, 11, {}),
        ("causal=False", 4, 2, 2, 2, 5, {"causal": False, "causal_argument": True}),
    ):
        if more.get("causal_argument") and not setup.causal_argument:
            continue
        settings = conventions(setup) | sizes(hd, heads, kv_heads, **more)
        x = normal(source, rows, length, settings["dim"])
        probes.append((name, settings, {"x": x} | attention_weights(source, settings)))
    return with_gradients(probes, "x", "compute_value.weight")


def block(setup: Setup, source: Source) -> list[Probe]:
    probes = []
    for name, hd, heads, kv_heads, rows, length, mean, layer_id in (
        ("one row", 4, 3, 3, 1, 7, 0.0, 0),
        ("batch, grouped heads, mean of 2", 6, 4, 2, 3, int(source.integers(4, 8)), 2.0, 0),
        ("the second layer", 4, 3, 3, 2, 7, 0.0, 1),
    ):
        settings = conventions(setup) | sizes(hd, heads, kv_heads, layer_id=layer_id)
        x = normal(source, rows, length, settings["dim"], mean=mean)
        probes.append((name, settings, {"x": x} | layer_weights(source, settings)))
    return with_gradients(probes, "x", "feed_forward.w1.weight")


def model_weights(source: Source, settings: dict[str, Any]) -> Arrays:
    """A whole state dict but for `output.weight`, which is the embedding's."""
    weights = {"tok_embeddings.weight": normal(source, settings["vocab_size"], settings["dim"], std=0.5)}
    for i in range(settings["n_layers"]):
        weights |= layer_weights(source, settings, f"layers.{i}.")
    return weights | norm_weights(source, settings["dim"], settings["norm"], "norm.")


def model(setup: Setup, source: Source) -> list[Probe]:
    probes: list[Probe] = []
    for name, heads, kv_heads, layers, vocabulary, rows, length, dropout in (
        ("two layers", 2, 2, 2, 19, 2, 5, 0.0),
        ("three layers, grouped heads", 6, 2, 3, 23, 3, int(source.integers(6, 10)), 0.0),
        ("dropout of 0.5 in evaluation", 2, 1, 2, 11, 2, 4, 0.5),
        ("three layers, two heads, token 0", 2, 2, 3, 13, 2, 5, 0.0),
        ("two layers, one token", 2, 2, 2, 17, 2, 1, 0.0),
    ):
        more = {"n_layers": layers, "vocab_size": vocabulary, "dropout": dropout}
        settings = conventions(setup) | sizes(4, heads, kv_heads, **more)
        tokens = source.integers(1, vocabulary, (rows, length))
        if len(probes) == 3:
            tokens[:, 1] = 0
        probes.append((name, settings, {"tokens": tokens} | model_weights(source, settings)))
    return with_gradients(probes, "tok_embeddings.weight")
