"""Checkpoints of other programs, and the way to and from ours: paths in, (config, tensors by our keys) out, and back.

Three things differ. The names of the tensors: one table, `KEYS`. The layout of query and key: Meta and llama2.c keep a
head's rotary pairs side by side, as this program does, Hugging Face keeps them in split halves, see
`to_split_halves`. What a file can say of the model: what it cannot say is refused when it would be written.

docs/checkpoints.md has it all on one page.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import LlamaConfig, RopeScaling, check_rmsnorm, parameter_shapes, shown
from files import (
    read_json,
    read_safetensors,
    read_torch,
    safetensors_names,
    unwrapped,
    weights_of,
    write_json,
    write_safetensors_file,
)

State = dict[str, Tensor]

# One row a tensor: ours, Meta's (and llama2.c's .pt), Hugging Face's, GGUF's. ".weight" follows in each, and the number
# of the layer stands for "{}".
DIALECTS = ("ours", "meta", "huggingface", "gguf")
LAYER = ("layers.{}.", "layers.{}.", "model.layers.{}.", "blk.{}.")
KEYS_OF_A_LAYER = (
    ("attention_norm", "attention_norm", "input_layernorm", "attn_norm"),
    ("attention.compute_query", "attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.compute_key", "attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.compute_value", "attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.compute_output", "attention.wo", "self_attn.o_proj", "attn_output"),
    ("ffn_norm", "ffn_norm", "post_attention_layernorm", "ffn_norm"),
    ("feed_forward.w1", "feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "feed_forward.w3", "mlp.up_proj", "ffn_up"),
)
KEYS: tuple[tuple[str, ...], ...] = (
    ("tok_embeddings", "tok_embeddings", "model.embed_tokens", "token_embd"),
    *(tuple(map("".join, zip(LAYER, row, strict=True))) for row in KEYS_OF_A_LAYER),
    ("norm", "norm", "model.norm", "output_norm"),
    ("output", "output", "lm_head", "output"),
)
# Tables that some files hold beside the weights, and that a model computes for itself.
ROTARY_TABLES = re.compile(r"rope\.freqs|freqs_(cis|cos|sin)|.*\.rotary_emb\.inv_freq")


def is_rotary_table(name: str) -> bool:
    """Whether a tensor is one of `ROTARY_TABLES`."""
    return ROTARY_TABLES.fullmatch(name) is not None


def renamed(names: Iterable[str], source: str, target: str) -> dict[str, str]:
    """Each name of one dialect with its name in another; one that the dialect does not know keeps its own."""
    column, row = DIALECTS.index(target), {row[DIALECTS.index(source)]: row for row in KEYS}
    result = {}
    for name in names:
        stem, dot, part = name.rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", stem)
        general = stem if number is None else f"{stem[: number.start()]}{{}}{stem[number.end() :]}"
        known = row.get(general)
        own = "" if number is None else number[0]
        result[name] = name if known is None else f"{known[column].format(own)}{dot}{part}"
    return result


def to_split_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of a query or key weight (heads * hd, ...) within each head, from interleaved pairs (0, 1),
    (2, 3), ... to Hugging Face's (0, hd/2), (1, hd/2 + 1), ...
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_split_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """The number of heads of a query or key tensor, by our name; None for every other tensor."""
    if ".compute_query." in name:
        return config.n_heads
    return config.kv_heads if ".compute_key." in name else None


# Meta


def is_meta(names: Iterable[str]) -> bool:
    """Whether tensors are named as Meta's and llama2.c's own are."""
    return any(name.endswith(".attention.wq.weight") for name in names)


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder has weights in Meta's files."""
    return any(folder.glob("consolidated.*.pth"))


def meta_state(state: State) -> State:
    """Meta's or llama2.c's tensors by our names, without the rotary tables."""
    names = renamed(state, "meta", "ours")
    return {names[name]: tensor for name, tensor in state.items() if not is_rotary_table(name)}


def read_meta(folder: Path) -> tuple[LlamaConfig, State]:
    """A folder as Meta publishes it: params.json, and consolidated.00.pth and its followers, the parts of a model that
    was sharded over as many devices.

    Raises ValueError for parts that do not belong together.
    """
    parts = sorted(folder.glob("consolidated.*.pth"))
    if not parts or [part.name for part in parts] != [f"consolidated.{i:02}.pth" for i in range(len(parts))]:
        raise ValueError(f"{folder} lacks one of its consolidated.NN.pth, which count from 00; fetch it again")
    shards = []
    for part in parts:
        content = read_torch(part, mapped=True)
        if not isinstance(content, dict):
            raise ValueError(f"{part} holds {shown(content)}; it must be a table of tensors")
        shards.append(meta_state(weights_of(part, content)))
    for part, shard in zip(parts, shards, strict=True):
        if shard.keys() != shards[0].keys():
            raise ValueError(f"{part} and {parts[0].name} hold different tensors; they are parts of two models")
    params = read_json(folder / "params.json")
    state: State = {}
    for name in list(shards[0]):
        try:
            state[name] = merged(name, [shard.pop(name) for shard in shards], params.get("dim"))
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{folder}: the parts of {name} do not fit together; fetch it again") from error
    return meta_config(folder / "params.json", params, state), state


def merged(name: str, parts: list[Tensor], dim: object) -> Tensor:
    """The tensor whose parts were on several devices: w1, w3, query, key, value and output in blocks of rows, w2 and
    compute_output in blocks of columns, the embedding in columns (Llama 2) or rows (Llama 3), norms whole in each.
    """
    if len(parts) == 1 or parts[0].dim() == 1:
        return parts[0]
    by_columns = name.endswith(("w2.weight", "compute_output.weight"))
    if name == "tok_embeddings.weight":
        by_columns = parts[0].shape[1] != dim
    return torch.cat(parts, dim=1 if by_columns else 0)


def meta_config(path: Path, params: dict[str, Any], state: State) -> LlamaConfig:
    """The config of params.json; what it leaves out is derived as Meta's program does, or known of the release: the
    context, of which it says nothing.
    """
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps"}
    known |= {"rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len"}
    known |= {"max_batch_size"}
    if unknown := sorted(set(params) - known):
        raise ValueError(f"{path} has {unknown[0]}, which belongs to no Llama 1 to 3 that this program knows")
    try:
        dim, vocab_size = params["dim"], params.get("vocab_size", -1)
        if vocab_size == -1:  # Llama 1 and 2 leave it to the tokenizer
            vocab_size = state["tok_embeddings.weight"].shape[0]
        theta = params.get("rope_theta", 10000.0)
        context = params.get("max_seq_len")
        scaling = None
        if params.get("use_scaled_rope"):
            # Llama 3.1; the small models of 3.2 are stretched further, though their files do not say so.
            factor = params.get("rope_scaling_factor", 32.0 if dim < 4096 else 8.0)
            scaling = RopeScaling(factor, high_freq_factor=params.get("rope_high_freq_factor", 4.0))
            context = context or 131072
        context = context or (8192 if theta > 10000.0 else 2048 if params.get("norm_eps") == 1e-6 else 4096)
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
            max_seq_len=context,
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


def is_tied(state: State) -> bool:
    """Whether the output projection is the embedding: left out, or there with the same numbers."""
    output, embedding = state.get("output.weight"), state.get("tok_embeddings.weight")
    if output is None or embedding is None:
        return output is None
    return output.dtype == embedding.dtype and torch.equal(output, embedding)


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
    """What config.json says, in the words of transformers 4 and of 5. eos_id: one, or all at which a text ends."""
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
