"""Meta's folders, the format of Llama 1 to 3.2: params.json, and one consolidated.NN.pth per shard."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import LlamaConfig, RopeScaling, shown
from minillama.formats.files import read_json, read_torch, weights_of
from minillama.formats.keys import State, is_rotary_table, is_tied, renamed


def is_meta(names: Iterable[str]) -> bool:
    """Whether tensors have the names of Meta's and llama2.c's checkpoints."""
    return any(name.endswith(".attention.wq.weight") for name in names)


def meta_state(state: State) -> State:
    """Meta's or llama2.c's tensors by our names, without the rotary tables."""
    names = renamed(state, "meta", "ours")
    return {names[name]: tensor for name, tensor in state.items() if not is_rotary_table(name)}


def read_meta(folder: Path) -> tuple[LlamaConfig, State]:
    """The config and the merged tensors of a folder. Raises ValueError for shards that do not belong together."""
    parts = sorted(folder.glob("consolidated.*.pth"))
    if not parts or [part.name for part in parts] != [f"consolidated.{i:02}.pth" for i in range(len(parts))]:
        raise ValueError(f"{folder} lacks a consolidated.NN.pth (they are numbered from 00); fetch it again")
    shards = []
    for part in parts:
        content = read_torch(part, mapped=True)
        if not isinstance(content, dict):
            raise ValueError(f"{part} holds {shown(content)}; it must be a table of tensors")
        shards.append(meta_state(weights_of(part, content)))
        if shards[-1].keys() != shards[0].keys():
            raise ValueError(f"{part} and {parts[0].name} hold different tensors; they are parts of two models")
    params = read_json(folder / "params.json")
    state: State = {}
    for name in list(shards[0]):
        try:
            state[name] = _merged(name, [shard.pop(name) for shard in shards], params.get("dim"))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{folder}: the parts of {name} do not fit together; fetch it again") from error
    return meta_config(folder / "params.json", params, state), state


def _merged(name: str, parts: list[Tensor], dim: object) -> Tensor:
    """A tensor from its shards.

    w1, w3, query, key, value and output are split by rows, w2 and compute_output by columns. The embedding is split by
    columns (Llama 2) or rows (Llama 3). Each shard has the whole norms.
    """
    if len(parts) == 1 or parts[0].dim() == 1:
        return parts[0]
    by_columns = name.endswith(("w2.weight", "compute_output.weight"))
    if name == "tok_embeddings.weight":
        by_columns = parts[0].shape[1] != dim
    return torch.cat(parts, dim=1 if by_columns else 0)


def meta_config(path: Path, params: dict[str, Any], state: State) -> LlamaConfig:
    """The config of params.json. Missing fields are as in Meta's program, a missing context as in the release."""
    known = "dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta max_seq_len "
    known += "use_scaled_rope rope_scaling_factor rope_high_freq_factor max_batch_size"
    if unknown := sorted(set(params) - set(known.split())):
        raise ValueError(f"{path} has {unknown[0]}, which no Llama 1 to 3 has that this program knows")
    try:
        dim, vocab_size = params["dim"], params.get("vocab_size", -1)
        if vocab_size == -1:  # Llama 1 and 2 leave it to the tokenizer
            vocab_size = state["tok_embeddings.weight"].shape[0]
        theta = params.get("rope_theta", 10000.0)
        context = 8192 if theta > 10000.0 else 2048 if params.get("norm_eps") == 1e-6 else 4096
        scaling = None
        if params.get("use_scaled_rope"):  # Llama 3.1 and 3.2; the small 3.2 models' factor is not in their files
            factor = params.get("rope_scaling_factor", 32.0 if dim < 4096 else 8.0)
            scaling = RopeScaling(factor, high_freq_factor=params.get("rope_high_freq_factor", 4.0))
            context = 131072
        hidden = int(2 * 4 * dim / 3)
        if params.get("ffn_dim_multiplier") is not None:
            hidden = int(params["ffn_dim_multiplier"] * hidden)
        multiple_of = params.get("multiple_of", 256)
        return LlamaConfig(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params.get("n_kv_heads"),
            max_seq_len=params.get("max_seq_len") or context,
            layer_norm_eps=params.get("norm_eps", 1e-5),
            hidden_dim=multiple_of * math.ceil(hidden / multiple_of),
            norm="rmsnorm",
            causal=True,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=is_tied(state),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; this is not a whole Llama") from error
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from error
