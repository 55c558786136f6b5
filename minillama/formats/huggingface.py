"""Hugging Face's folders: reads them into a config and tensors by our keys, and writes them.

Reading fails if the folder's model computes something else than ours. Writing fails for a model that such a folder
cannot describe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import LlamaConfig, RopeScaling, check_rmsnorm, parameter_shapes, shown
from minillama.formats import files
from minillama.formats.keys import State, is_rotary_table, renamed, rotary_heads, to_pairs, to_split_halves


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder has weights in Meta's files."""
    return any(folder.glob("consolidated.*.pth"))


def read_huggingface(folder: Path) -> tuple[LlamaConfig, State, tuple[int, ...]]:
    """The config, tensors and stop ids of a folder. Raises ValueError if the computation differs from ours."""
    config = huggingface_config(folder / "config.json")
    stops = folder / "generation_config.json"
    stops = stops if stops.is_file() else folder / "config.json"
    stop_ids = checked_stop_ids(stops, "eos_token_id", files.read_json(stops).get("eos_token_id"), config.vocab_size)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # before the index, as in transformers: the index is from an older model, saved in shards
        paths = [single]
    elif index.is_file():
        paths = _shard_paths(index)
    else:
        raise ValueError(f"{folder} has no model.safetensors; fetch it, or save the model with save_pretrained")
    state: State = {}
    for path in paths:
        found = _huggingface_tensors(path, config)
        if twice := state.keys() & found.keys():
            raise ValueError(f"{path} holds {min(twice)}, and so does another file of {folder}; save it again")
        state |= found
    return config, state, stop_ids


def checked_stop_ids(path: Path, name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Stop ids from a file's value: an id, a list of ids, or None. Raises ValueError for anything else."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        wanted = f"an id from 0 to {vocab_size - 1}, or a list of such ids"
        raise ValueError(f"{path}: {name} is {shown(value)}; it must be {wanted}: correct the file")
    return tuple(dict.fromkeys(ids))


def _huggingface_tensors(file: Path, config: LlamaConfig) -> State:
    """One file's tensors by our names, in our layout; memory-mapped except query and key, which are reordered.

    Each query and key has its own mapping, closed after the copy, so that its pages do not stay in memory.
    """
    names = files.unwrapped(file, files.safetensors_names(file))
    names = {key: name for key, name in names.items() if not is_rotary_table(name)}
    ours = renamed(names.values(), "huggingface", "ours")
    if unknown := [key for key, name in names.items() if name == ours[name]]:  # all known names differ from ours
        raise ValueError(f"{file} holds {shown(unknown[0])}, which is not a tensor of a Hugging Face Llama")
    heads = {key: rotary_heads(ours[name], config) for key, name in names.items()}
    state = {}
    for key, count in heads.items():
        if count is not None:
            (tensor,) = files.weights_of(file, files.read_safetensors(file, [key])).values()
            if tensor.dim() not in (1, 2) or tensor.shape[0] % (2 * count):
                raise ValueError(f"{file}: {key} has shape {tuple(tensor.shape)}, which is not {count} heads of pairs")
            state[ours[names[key]]] = to_pairs(tensor, count)
    others = [key for key, count in heads.items() if count is None]
    found = files.weights_of(file, files.read_safetensors(file, others))
    return state | {ours[name]: tensor for name, tensor in found.items()}


def _shard_paths(index: Path) -> list[Path]:
    """The files that an index lists. Raises ValueError for a file outside the index's folder."""
    names = files.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{index} has no "weight_map" from tensors to files; fetch it again')
    paths = [index.parent / name for name in sorted(set(names.values()))]
    for path in paths:
        if not re.fullmatch(r"[\w.-]+\.safetensors", path.name) or path.parent != index.parent:
            raise ValueError(f"{index} lists the file {shown(str(path))}; only .safetensors beside it are read")
        if not path.is_file():
            raise ValueError(f"{index.parent} has no {path.name}, which its index lists; fetch it")
    return paths


# Allowed values of fields of config.json. Other fields do not change the computation.
HUGGINGFACE_ALLOWED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}


def huggingface_config(path: Path) -> LlamaConfig:
    """The config in a config.json. Raises ValueError if the model's computation differs from ours."""
    content = files.read_json(path)
    for name, allowed in HUGGINGFACE_ALLOWED.items():
        value = content.get(name, allowed[0] if name != "model_type" else None)
        if value not in allowed:
            raise ValueError(f"{path}: {name} is {shown(value)}; this program computes {shown(allowed[0])} only")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {shown(rope)}; it must be a table")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: rope_type is {shown(kind)}; this program computes default and llama3 only")
    try:
        scaling = None
        if kind == "llama3":
            parts = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = RopeScaling(*(rope[part] for part in parts))
        config = LlamaConfig(
            vocab_size=content["vocab_size"],
            dim=content["hidden_size"],
            n_layers=content["num_hidden_layers"],
            n_heads=content["num_attention_heads"],
            n_kv_heads=content.get("num_key_value_heads"),
            max_seq_len=content.get("max_position_embeddings", 2048),
            layer_norm_eps=content.get("rms_norm_eps", 1e-6),
            hidden_dim=content["intermediate_size"],
            norm="rmsnorm",
            causal=True,
            rope_theta=rope.get("rope_theta", content.get("rope_theta", 10000.0)),
            rope_scaling=scaling,
            tie_embeddings=content.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; this is not a whole Llama") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if content.get("head_dim") not in (None, config.head_dim):
        only = f"hidden_size / heads = {config.head_dim}"
        raise ValueError(f"{path}: head_dim is {shown(content['head_dim'])}; this program computes {only} only")
    return config


SHARD_BYTES = 4 << 30


def write_huggingface(
    folder: Path, config: LlamaConfig, state: State, bos_id: int, eos_id: int | Sequence[int]
) -> None:
    """Writes a folder for transformers, in shards of 4 GiB. Raises ValueError for a model it cannot describe."""
    check_rmsnorm(config, "a Hugging Face Llama")
    names = renamed(state, "ours", "huggingface")
    tensors = {names[name]: (name, tensor) for name, tensor in state.items()}
    if config.tie_embeddings:
        tensors.pop("lm_head.weight", None)
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, tensor) in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        content = {}
        for name in shard:
            ours, tensor = tensors[name]
            heads = rotary_heads(ours, config)
            content[name] = tensor if heads is None else to_split_halves(tensor, heads)
            weight_map[name] = file
        files.write_safetensors_file(folder / file, content, {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for _, tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)
    dtype = str(state["tok_embeddings.weight"].dtype).removeprefix("torch.")
    files.write_json(folder / "config.json", _config_json(config, dtype, bos_id, eos_id))


def _config_json(config: LlamaConfig, dtype: str, bos_id: int, eos_id: int | Sequence[int]) -> dict[str, Any]:
    """The content of config.json, with the field names of transformers 4 and 5."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling._asdict() | {"rope_type": "llama3"}
        rope["original_max_position_embeddings"] = rope.pop("original_context")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": parameter_shapes(config)["layers.0.feed_forward.w1.weight"][0],
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling is not None else None,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id if isinstance(eos_id, int) else list(eos_id) if len(eos_id) > 1 else eos_id[0],
        "dtype": dtype,
        "torch_dtype": dtype,
    }
