"""Computes reference outputs of the bundled model by a second implementation: float64 NumPy, written from the formulas.

examples:
  python tests/make_bundled_reference.py                  after the bundled model changed
  python tests/make_bundled_reference.py --prompt 1 317   where the greedy tokens are too close to call

It shares no code with the project, and reads the model's file by itself. sanity_check.py compares the model with what
is written: a safetensors file whose metadata has the SHA-256 of the model's file (model_sha256), and whose tensors are
    ids             (2, 16)     two rows of token ids
    logits_last     (2, V)      the logits at each row's last position
    hidden_states   (2, 16, D)  after the final norm
    log_probs       (2, 15)     the log-probability of each id that has one before it
    prompt, greedy  (P,), (24,) a prompt, and the likeliest tokens after it, one by one
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import safetensors.numpy

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data" / "mini-llama.safetensors"
REFERENCE = ROOT / "tests" / "conformance" / "bundled_expected.safetensors"
ROWS, LENGTH = 2, 16  # of the token ids
PROMPT = (1, 608, 553, 261, 461)  # "Once upon a time"
NEW_TOKENS = 24
MARGIN = 1e-3  # of the likeliest token's logit over the next one's; far above what float32 adds or takes away
FIXED = {"causal": True, "tie_embeddings": True}  # what is implemented here


class Model(NamedTuple):
    """The sizes and conventions, the weights in float64, and the SHA-256 of the file they come from."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    sha256: str


def read_model(path: Path) -> Model:
    """Reads a safetensors file: the length of a JSON header (8 bytes), the header, and the tensors' bytes.

    Raises ValueError for a file of another kind, and for a model of another kind.
    """
    content = path.read_bytes()
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        config = json.loads(header.pop("__metadata__")["mini-llama"])["model_args"]
        weights = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            weights[name] = widened(content[begin:end], entry["dtype"]).reshape(entry["shape"])
        conventions = {name: config[name] for name in FIXED}
        norm = config["norm"]
    except (KeyError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file that this project wrote") from error
    if conventions != FIXED or norm not in NORMS:
        allowed = f"{FIXED} and the norms {', '.join(NORMS)}"
        raise ValueError(f"{path} has {conventions} and {norm}; references are made for {allowed} only")
    return Model(config, weights, hashlib.sha256(content).hexdigest())


def widened(data: bytes, dtype: str) -> np.ndarray:
    """The numbers of a tensor in float64, unrounded. A bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def layer_norm(x: np.ndarray, model: Model, name: str) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias; the variance is the mean of the squares."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    normed = centred / np.sqrt(variance + model.config["layer_norm_eps"])
    return normed * model.weights[f"{name}.weight"] + model.weights[f"{name}.bias"]


def rms_norm(x: np.ndarray, model: Model, name: str) -> np.ndarray:
    """x / sqrt(mean of the squares + eps) * weight."""
    return (
        x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config["layer_norm_eps"]) * model.weights[f"{name}.weight"]
    )


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm}


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    """x (T, hd) of one head: features 2i and 2i + 1 turned as a point by the angle position * theta^(-2i / hd)."""
    length, width = x.shape
    out = np.empty_like(x)
    for i in range(width // 2):
        angle = np.arange(length) * theta ** (-2 * i / width)
        out[:, 2 * i] = x[:, 2 * i] * np.cos(angle) - x[:, 2 * i + 1] * np.sin(angle)
        out[:, 2 * i + 1] = x[:, 2 * i] * np.sin(angle) + x[:, 2 * i + 1] * np.cos(angle)
    return out


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attention(x: np.ndarray, model: Model, name: str) -> np.ndarray:
    """x (T, D) -> (T, D), one query head after another; H / K neighbours share a key and a value head."""
    heads, kv_heads = model.config["n_heads"], model.config["n_kv_heads"]
    width, theta = model.config["dim"] // heads, model.config["rope_theta"]
    query, key, value = (x @ model.weights[f"{name}.compute_{part}.weight"].T for part in ("query", "key", "value"))
    future = np.triu(np.ones((len(x), len(x)), dtype=bool), k=1)
    mixed = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        group = head // (heads // kv_heads)
        shared = slice(group * width, (group + 1) * width)
        scores = turned(query[:, own], theta) @ turned(key[:, shared], theta).T / np.sqrt(width)
        scores[future] = -np.inf
        mixed.append(softmax(scores) @ value[:, shared])
    return np.concatenate(mixed, axis=-1) @ model.weights[f"{name}.compute_output.weight"].T


def feed_forward(x: np.ndarray, model: Model, name: str) -> np.ndarray:
    """w2(silu(w1 x) * w3 x), where silu(z) = z / (1 + e^-z)."""
    gate = x @ model.weights[f"{name}.w1.weight"].T
    up = x @ model.weights[f"{name}.w3.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ model.weights[f"{name}.w2.weight"].T


def forward(model: Model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ids (T,) -> logits (T, V) and the hidden states (T, D) after the final norm."""
    embedding, norm = model.weights["tok_embeddings.weight"], NORMS[model.config["norm"]]
    x = embedding[ids]
    for i in range(model.config["n_layers"]):
        x = x + attention(norm(x, model, f"layers.{i}.attention_norm"), model, f"layers.{i}.attention")
        x = x + feed_forward(norm(x, model, f"layers.{i}.ffn_norm"), model, f"layers.{i}.feed_forward")
    hidden = norm(x, model, "norm")
    return hidden @ embedding.T, hidden


def greedy(model: Model, prompt: np.ndarray) -> tuple[np.ndarray, float]:
    """The NEW_TOKENS likeliest tokens after the prompt, one by one, and the smallest lead of a chosen one's logit."""
    ids, lead = list(prompt), np.inf
    for _ in range(NEW_TOKENS):
        logits = forward(model, np.array(ids))[0][-1]
        second, first = np.argsort(logits)[-2:]
        lead = min(lead, logits[first] - logits[second])
        ids.append(first)
    return np.array(ids[len(prompt) :]), float(lead)


def reference_outputs(model: Model, prompt: tuple[int, ...] = PROMPT) -> tuple[dict[str, np.ndarray], float]:
    """The tensors of the reference file, and the smallest lead of a greedy token.

    Raises ValueError if the model lacks a tensor, or is too small for the prompt or the rows.
    """
    vocabulary, context = model.config["vocab_size"], model.config["max_seq_len"]
    if not all(0 <= token < vocabulary for token in prompt):
        raise ValueError(f"--prompt {' '.join(map(str, prompt))}: ids of this model are 0 to {vocabulary - 1}")
    needed = max(LENGTH, len(prompt) + NEW_TOKENS)
    if needed > context:
        raise ValueError(f"the model's context of {context} tokens is too short for the {needed} of the reference")
    ids = np.random.default_rng(seed=0).integers(vocabulary, size=(ROWS, LENGTH))
    ids[:, 0] = 1  # the beginning mark
    try:
        results = [forward(model, row) for row in ids]
        chosen, lead = greedy(model, np.array(prompt))
    except KeyError as error:
        raise ValueError(f"the model's file lacks {error.args[0]}; it is no whole model of this project") from error
    logits, hidden = (np.stack(each) for each in zip(*results, strict=True))
    outputs = {
        "logits_last": logits[:, -1],
        "hidden_states": hidden,
        "log_probs": np.take_along_axis(np.log(softmax(logits[:, :-1])), ids[:, 1:, None], axis=-1)[..., 0],
    }
    tokens = {"ids": ids, "prompt": np.array(prompt), "greedy": chosen}
    rounded = {name: tensor.astype(np.float32) for name, tensor in outputs.items()}
    return rounded | {name: tensor.astype(np.int64) for name, tensor in tokens.items()}, lead


def write_reference(path: Path, outputs: dict[str, np.ndarray], sha256: str) -> None:
    """Writes the reference file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(safetensors.numpy.save(outputs, {"model_sha256": sha256}))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class OneLineParser(argparse.ArgumentParser):
    """Complains in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see python tests/{self.prog} --help\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = OneLineParser(
        prog="make_bundled_reference.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", type=Path, default=MODEL, metavar="FILE", help="the model (default: data/mini-llama.safetensors)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=REFERENCE,
        metavar="FILE",
        help="what to write (default: tests/conformance/bundled_expected.safetensors)",
    )
    parser.add_argument(
        "--prompt",
        type=int,
        nargs="+",
        default=PROMPT,
        metavar="ID",
        help=f'token ids that the greedy tokens follow (default: {" ".join(map(str, PROMPT))}, "Once upon a time")',
    )
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir() or options.out.is_dir():
        parser.error(f"--out {options.out}: give the name of a file, in a folder that is there")
    try:
        model = read_model(options.model)
        outputs, lead = reference_outputs(model, tuple(options.prompt))
        if not all(np.isfinite(tensor).all() for tensor in outputs.values()):
            raise ValueError(f"{options.model} gives NaN or infinity; it is damaged")
        if lead < MARGIN:
            raise ValueError(
                f"a greedy token leads the next by {lead:.1e} only, and float32 may choose the other; "
                "give another --prompt"
            )
        write_reference(options.out, outputs, model.sha256)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.out}: reference outputs of {options.model}")
    print(f"    SHA-256 {model.sha256}; each greedy token leads the next likeliest by {lead:.2g} or more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
