"""The bundled model for a kit: its weights for the kit's conventions, and reference outputs by answers_model.py.

Shares no code with llama.py. The weights of another rotary convention compute the same as those of the bundled model.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from minillama.grading import answers_model
from minillama.grading.answers_model import NONE
from minillama.grading.kit_setups import Setup

BF16, F32, I64 = "BF16", "F32", "I64"
IDS = ((1, 610, 553, 261, 461, 268, 300, 317), (1, 610, 1200, 77, 2048, 5, 4000, 9))  # rows that begin alike
EMBEDDING = "tok_embeddings.weight"


class Model(NamedTuple):
    """The `model_args` of a checkpoint, and its weights in float32."""

    config: dict[str, Any]
    weights: dict[str, np.ndarray]


def read_model(content: bytes) -> Model:
    """The model in a .safetensors file of this project, in bfloat16."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    config = json.loads(header.pop("__metadata__")["mini-llama"])["model_args"]
    weights = {}
    for name, entry in header.items():
        assert entry["dtype"] == BF16, f"{name} is {entry['dtype']}"
        begin, end = (start + offset for offset in entry["data_offsets"])
        upper = np.frombuffer(content[begin:end], "<u2").astype(np.uint32) << 16
        weights[name] = upper.view(np.float32).reshape(entry["shape"])
    return Model(config, weights)


def write_tensors(tensors: dict[str, np.ndarray], dtypes: dict[str, str], metadata: dict[str, str]) -> bytes:
    """The bytes of a .safetensors file: a header's length, a JSON header, the tensors in the order of their names."""
    header: dict[str, Any] = {"__metadata__": metadata}
    parts, offset = [], 0
    for name in sorted(tensors):
        raw = encoded(tensors[name], dtypes[name])
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        parts.append(raw)
        offset += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))


def encoded(tensor: np.ndarray, dtype: str) -> bytes:
    """A tensor's bytes. A bfloat16 is the upper half of a float32, rounded to even."""
    if dtype == BF16:
        bits = np.ascontiguousarray(tensor, "<f4").view("<u4")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return tensor.astype({F32: "<f4", I64: "<i8"}[dtype]).tobytes()


def converted(model: Model, setup: Setup) -> Model:
    """The model for another setup. Its rotary weights compute the same; the norms of LayerNorm get biases of zero."""
    config, weights = model.config, dict(model.weights)
    width = config["dim"] // config["n_heads"]
    for name in weights:
        if name.endswith(("compute_query.weight", "compute_key.weight")):
            pairs = weights[name].reshape(-1, width // 2, 2, config["dim"])  # (heads, pair, 2, D)
            if setup.sign == "minus":  # a + ib becomes b + ia: turned the other way, it has the same products
                pairs = pairs[:, :, ::-1]
            if setup.pairing == "halves":
                pairs = pairs.swapaxes(1, 2)
            weights[name] = pairs.reshape(weights[name].shape)
    if setup.norm == "layernorm":
        norms = [name for name in weights if name.endswith("norm.weight")]
        weights |= {f"{name.removesuffix('weight')}bias": np.zeros_like(weights[name]) for name in norms}
    return Model(config | {"norm": setup.norm}, weights)


def checkpoint(model: Model) -> bytes:
    """The .safetensors file of a model, in bfloat16."""
    about = json.dumps({"format_version": 1, "kind": "llama", "model_args": model.config})
    return write_tensors(model.weights, dict.fromkeys(model.weights, BF16), {"format": "pt", "mini-llama": about})


def reference(model: Model, setup: Setup) -> bytes:
    """A .safetensors file with `ids` (B, T), and logits (B, 1, V) and hidden_states (B, T, D) for them.

    The names begin with "causal." and, where the config says which, also "bidirectional.".
    """
    rounded, ids = read_model(checkpoint(model)), np.array(IDS)  # what the file holds
    arrays = {name: tensor.astype(np.float64) for name, tensor in rounded.weights.items()} | {"tokens": ids}
    tensors, dtypes = {"ids": ids}, {"ids": I64}
    for causal in (True,) if setup.causal_argument else (True, False):
        found = answers_model.model(rounded.config | {"causal": causal, "switches": setup.switches}, arrays, NONE)
        kind = "causal" if causal else "bidirectional"
        tensors |= {f"{kind}.hidden_states": found["hidden"], f"{kind}.logits": found["logits"]}
        dtypes |= {f"{kind}.hidden_states": F32, f"{kind}.logits": F32}
    return write_tensors(tensors, dtypes, {"format": "pt"})
