"""Hugging Face's folders: paths in, (config, tensors by our keys) out, and back.

A folder that computes what this program does not is refused, and so is a
model that a folder cannot describe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import LlamaConfig, RopeScaling, check_rmsnorm, parameter_shapes, shown
from minillama.formats.files import (
    read_json,
    read_safetensors,
    safetensors_names,
    unwrapped,
    weights_of,
    write_json,
    write_safetensors_file,
)
from minillama.formats.keys import ROTARY_TABLES, State, renamed, rotary_heads, to_pairs, to_split_halves


def is_rotary_table(name: str) -> bool:
    """Whether a tensor is one of `ROTARY_TABLES`."""
    return ROTARY_TABLES.fullmatch(name) is not None


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder has weights in Meta's files."""
    return any(folder.glob("consolidated.*.pth"))


# Hugging Face


def read_huggingface(folder: Path) -> tuple[LlamaConfig, State, tuple[int, ...]]:
    """A folder with config.json and safetensors, one file or several with an index; and the ids at which a text ends.

    Raises ValueError for a model that is no Llama, or one that computes what this program does not.
    """
    content = read_json(folder / "config.json")
    config = huggingface_config(folder / "config.json", content)
    stop_ids = huggingface_stop_ids(folder, content, config.vocab_size)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # first, as in transformers: an index beside it is left over from a model saved in shards
        files = [single]
    elif index.is_file():
        files = shard_files(index)
    else:
        raise ValueError(
            f"{folder} has no model.safetensors; fetch it, or save the model anew with transformers' save_pretrained"
        )
    state: State = {}
    for file in files:
        found = _huggingface_tensors(file, config)
        if twice := state.keys() & found.keys():
            raise ValueError(f"{file} holds {min(twice)} again, which another file of {folder} has; save it anew")
        state |= found
    return config, state, stop_ids


def huggingface_stop_ids(folder: Path, content: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, where that is missing of config.json, whose `content` is given."""
    path = folder / "generation_config.json"
    path, content = (path, read_json(path)) if path.is_file() else (folder / "config.json", content)
    return checked_stop_ids(path, "eos_token_id", content.get("eos_token_id"), vocab_size)


def checked_stop_ids(path: Path, name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids at which a text ends, of a value that a file has: an id, a list of ids, or none. Raises ValueError for
    anything else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ValueError(
            f"{path}: {name} is {shown(value)}; it must be an id from 0 to {vocab_size - 1}, or a list of such ids: "
            "mend the file"
        )
    return tuple(dict.fromkeys(ids))


def _huggingface_tensors(file: Path, config: LlamaConfig) -> State:
    """One file's tensors by our names, in our layout; mapped, but for the query and key, which have to be reordered.

    These are read through a mapping of their own, let go at once: their pages would count twice.
    """
    plain = {k: name for k, name in unwrapped(file, safetensors_names(file)).items() if not is_rotary_table(name)}
    by_plain = renamed(plain.values(), "huggingface", "ours")
    names = {key: by_plain[name] for key, name in plain.items()}
    if unknown := [key for key, name in plain.items() if name == by_plain[name]]:  # no name is the same in both
        raise ValueError(f"{file} holds {shown(unknown[0])}, which is no tensor of a Hugging Face Llama")
    heads = {name: rotary_heads(ours, config) for name, ours in names.items()}
    state = {}
    for name, count in heads.items():
        if count is not None:
            (tensor,) = weights_of(file, read_safetensors(file, [name])).values()
            if tensor.dim() not in (1, 2) or tensor.shape[0] % (2 * count):
                raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, which is no {count} heads of pairs")
            state[names[name]] = to_pairs(tensor, count)
    others = [name for name, count in heads.items() if count is None]
    found = weights_of(file, read_safetensors(file, others))
    return state | {by_plain[name]: tensor for name, tensor in found.items()}


def shard_files(index: Path) -> list[Path]:
    """The files that an index names, each in the index's own folder. Raises ValueError for one that is elsewhere."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{index} has no "weight_map" from tensors to files; fetch it again')
    files = []
    for name in sorted(set(names.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{index} names the file {shown(name)}; only .safetensors beside it are read")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent} lacks {name}, which its index names; fetch it")
        files.append(index.parent / name)
    return files


# What their config may say and ours computes; a field that is not here changes nothing, or not what a Llama computes.
HUGGINGFACE_MUST_BE: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}


def huggingface_config(path: Path, content: dict[str, Any]) -> LlamaConfig:
    """The config of a config.json. Raises ValueError, with the reason, for what this program does not compute."""
    for name, allowed in HUGGINGFACE_MUST_BE.items():
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
            scaling = RopeScaling(
                rope["factor"],
                rope["low_freq_factor"],
                rope["high_freq_factor"],
                rope["original_max_position_embeddings"],
            )
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
        raise ValueError(
            f"{path}: head_dim is {shown(content['head_dim'])}; this program computes hidden_size / heads = "
            f"{config.head_dim} only"
        )
    return config


SHARD_BYTES = 4 << 30


def write_huggingface(
    folder: Path, config: LlamaConfig, state: State, bos_id: int, eos_id: int | Sequence[int]
) -> None:
    """Writes config.json and the safetensors that transformers' `AutoModelForCausalLM` loads. Of a model above 4 GiB,
    several files and an index. Raises ValueError for what a Llama folder cannot hold.
    """
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
        write_safetensors_file(folder / file, content, {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for _, tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    dtype = str(state["tok_embeddings.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", to_huggingface_config(config, dtype, bos_id, eos_id))


def to_huggingface_config(config: LlamaConfig, dtype: str, bos_id: int, eos_id: int | Sequence[int]) -> dict[str, Any]:
    """The content of config.json, in the words of transformers 4 and of 5. eos_id: one, or all at which a text ends."""
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
