"""Probes of generation, AdamW, the classifiers and LoRA: (name, settings, arrays), as in probes_model.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from minillama.grading.kit_setups import Setup
from minillama.grading.probes_model import Probe, Source, conventions, model_weights, normal, sizes, with_gradients

DRAWS = 100_000  # rows, whose first new token counts; a frequency then has a standard deviation of 0.0016 at most

FIRST_MISSING = "a parameter without its first gradient"


def generate(setup: Setup, source: Source) -> list[Probe]:
    probes: list[Probe] = []
    rule = setup.sampling

    def sampled(number: float | None) -> dict[str, Any]:
        return conventions(setup) | {"sampling": rule} | ({} if number is None else {rule: number})

    for name, rows, length, new, context in (
        ("greedy, one row", 1, 4, 5, 16),
        ("greedy beyond the context", 4, int(source.integers(4, 7)), 12, 8),
        ("greedy, prompt beyond the context", 3, 11, 6, 7),
        ("greedy, many tokens within the context", 5, 11, 12, 32),
    ):
        vocabulary = 29
        arrays = {
            "table": normal(source, vocabulary, vocabulary),
            "first": normal(source, vocabulary, vocabulary),
            "prompt": source.integers(0, vocabulary, (rows, length)),
        }
        settings = {"temperature": 0.0, "max_new_tokens": new, "max_seq_len": context}
        probes.append((name, sampled(None if rule == "temperature" else 0.3) | settings, arrays))
    falling = np.array([2.9, 2.3, 1.8, 1.2, 0.6, -0.1, -0.8, -2.0, -3.0])
    equal = np.zeros(4)
    draws: tuple[tuple[str, np.ndarray, float, dict[str, float]], ...] = (
        ("draws, temperature 1.6", falling, 1.6, {"epsilon": 0.06, "top_p": 0.8, "min_p": 0.3}),
        ("draws, temperature 0.7", falling + 0.4, 0.7, {"epsilon": 0.12, "top_p": 0.85, "min_p": 0.12}),
        ("draws, temperature 1.3, low logits", falling - 2.0, 1.3, {"epsilon": 0.13, "top_p": 0.55, "min_p": 0.15}),
        ("draws of similar tokens", 0.4 * falling, 1.2, {"top_p": 0.4, "min_p": 0.2}),
        ("draws of tokens exactly at epsilon", equal, 1.0, {"epsilon": 0.25}),
    )
    for name, logits, temperature, numbers in draws:
        if rule not in ("temperature", *numbers):
            continue
        order = source.permutation(len(logits))
        table = np.tile(logits[order], (len(logits), 1)).astype(np.float32)
        prompt = source.integers(0, len(logits), (1, 3))
        settings = {"temperature": temperature, "max_new_tokens": 2, "max_seq_len": 16}
        settings |= {"draws": DRAWS, "tolerance": 0.025, "at_epsilon": len(logits) == 4}
        arrays = {"table": table, "first": np.zeros_like(table), "prompt": prompt}
        probes.append((name, sampled(numbers.get(rule)) | settings, arrays))
    # The likeliest token of the first row is the least likely of the second; both are below this epsilon.
    numbers = {"epsilon": 0.9, "top_p": 0.7, "min_p": 0.3}
    order = source.permutation(len(falling))
    logits = np.stack((1.3 * falling[order], 1.3 * falling[::-1][order]))
    table = np.tile(logits, (4, 1)).astype(np.float32)  # for the last tokens 0 to 7
    prompt = np.concatenate((source.integers(0, 8, (2, 2)), [[2], [5]]), axis=1)
    settings = {"temperature": 1.0, "max_new_tokens": 2, "max_seq_len": 16, "draws": DRAWS, "tolerance": 0.025}
    arrays = {"table": np.concatenate((table, table[:1])), "prompt": prompt}
    arrays["first"] = np.zeros_like(arrays["table"])
    probes.append(("draws, two rows of different likeliest tokens", sampled(numbers.get(rule)) | settings, arrays))
    return probes


def adamw(setup: Setup, source: Source) -> list[Probe]:
    plain = {"lr": 0.03, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.0}
    plain |= {"correct_bias": True, "max_grad_norm": None}
    two: list[dict[str, Any]] = [
        {"count": 2},
        {"count": 2, "lr": 0.08, "betas": [0.7, 0.95], "weight_decay": 0.9, "eps": 0.02},
    ]
    probes = []
    rows: tuple[tuple[str, dict[str, Any], list[dict[str, Any]], int, tuple[int, ...], list[int]], ...] = (
        ("one group", plain | {"eps": 0.03}, [{"count": 3}], 10, (3, 5), []),
        ("two groups, large weight decay", plain | {"weight_decay": 3.0}, two, 10, (4, 3), []),
        ("without correction of the bias", plain | {"correct_bias": False, "weight_decay": 1.0}, two, 10, (5,), []),
        ("clipped gradients", plain | {"max_grad_norm": 2.0, "eps": 1e-3}, two, 10, (2, 3), []),
        ("a parameter without gradient", plain | {"weight_decay": 2.0}, [{"count": 3}], 3, (3, 2), [1]),
        (FIRST_MISSING, plain | {"weight_decay": 1.5}, [{"count": 3}], 5, (4,), []),
    )
    for name, defaults, groups, steps, shape, without in rows:
        if defaults["max_grad_norm"] is not None and setup.edition == "2024":
            continue
        count = sum(group["count"] for group in groups)
        gradients = normal(source, steps, count, *shape, std=0.5)
        if defaults["max_grad_norm"] is not None:  # a long step among short ones: a constant factor would not show
            factors = np.where(np.arange(steps) % 4 == 1, 5.0, 0.5) * source.uniform(0.7, 1.3, steps)
            gradients *= factors.reshape(-1, *[1] * (gradients.ndim - 1)).astype(np.float32)
        late = [1] if name == FIRST_MISSING else []  # parameters whose first gradient is None
        settings = {"defaults": defaults, "groups": groups, "without_gradient": without, "late": late}
        probes.append((name, settings, {"parameters": normal(source, count, *shape), "gradients": gradients}))
    return probes


def small_llama(setup: Setup, source: Source, **more: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and weights of a Llama of two layers. All its Linears of attention are square."""
    settings = conventions(setup) | sizes(4, 3, 3, n_layers=2, vocab_size=31, multiple_of=8, **more)
    return settings, model_weights(source, settings)


def zero_shot(setup: Setup, source: Source) -> list[Probe]:
    probes = []
    length = int(source.integers(5, 9))
    for name, rows, labels in (("two labels", 2, 2), ("five labels", int(source.integers(3, 6)), 5)):
        settings, weights = small_llama(setup, source)
        ids = [int(i) for i in source.permutation(np.arange(4, 31))[:labels]]  # 0 to 3 are special
        tokens = source.integers(4, 31, (rows, length))
        probes.append((name, settings | {"label_ids": ids}, weights | {"tokens": tokens}))
    return probes


def classifier(setup: Setup, source: Source) -> list[Probe]:
    probes = []
    for name, option, rows, labels, dropout, training in (
        ("finetune", "finetune", 3, 5, 0.0, False),
        ("pretrain", "pretrain", 2, 2, 0.0, False),
        ("dropout of 0.3 in evaluation", "finetune", 2, 3, 0.3, False),
        ("dropout of 0.3 in training", "finetune", 4, 3, 0.3, True),
    ):
        settings, weights = small_llama(setup, source)
        settings |= {"option": option, "num_labels": labels, "hidden_dropout_prob": dropout, "training": training}
        arrays = weights | {
            "tokens": source.integers(0, 31, (rows, int(source.integers(4, 8)))),
            "classifier_head.weight": normal(source, labels, settings["dim"], std=0.6),
            "classifier_head.bias": normal(source, labels),
        }
        probes.append((name, settings, arrays))
    return with_gradients(probes, "tok_embeddings.weight", "classifier_head.weight")


def lora(setup: Setup, source: Source) -> list[Probe]:
    probes: list[Probe] = []
    for name, dim, rank, alpha in (("a layer of rank 2", 7, 2, 3.0), ("a layer of rank 3", 9, 3, 1.0)):
        arrays = {
            "x": normal(source, 2, 4, dim),
            "weight": normal(source, dim, dim),
            "lora_A": normal(source, rank, dim),
            "lora_B": normal(source, dim, rank),
        }
        probes.append((name, {"rank": rank, "alpha": alpha}, arrays))
    settings, weights = small_llama(setup, source)
    dim = settings["dim"]
    for i in range(settings["n_layers"]):
        for part in ("query", "key", "value", "output"):
            name = f"layers.{i}.attention.compute_{part}"
            weights[f"{name}.lora_A"] = normal(source, 2, dim, std=0.5)
            weights[f"{name}.lora_B"] = normal(source, dim, 2, std=0.5)
    tokens = source.integers(0, 31, (2, 6))
    probes.append(("a model, then merged", settings | {"rank": 2, "alpha": 3.0}, weights | {"tokens": tokens}))
    return with_gradients(probes, "x", "lora_A", "lora_B")
