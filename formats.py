"""Checkpoints of other programs, and the way to and from ours: paths in, (config, tensors by our keys) out, and back.

Three things differ. The names of the tensors: one table, `KEYS`. The layout of query and key: Meta and llama2.c keep a
head's rotary pairs side by side, as this program does, Hugging Face keeps them in split halves, see
`to_split_halves`. What a file can say of the model: what it cannot say is refused when it would be written.

docs/checkpoints.md has it all on one page.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig, RopeScaling, parameter_shapes, shown
from files import (
    atomic_file,
    raw_bytes,
    read_json,
    read_safetensors,
    read_torch,
    safetensors_names,
    weights_of,
    write_json,
    write_safetensors_file,
)
from rope import rotary_frequencies

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

LLAMA2C_MAGIC = 0x616B3432
LLAMA2C_EPS, LLAMA2C_THETA = 1e-5, 10000.0  # written into its program, not into its files
_MATRICES = tuple(row[0] for row in KEYS if "attention.compute" in row[0] or "feed_forward" in row[0])
# The order of the tensors, all layers of one name in a row. After norm, v0 has two rotary tables that nobody reads;
# where the output is not tied to the embedding, it comes last.
LLAMA2C_V0 = (
    "tok_embeddings",
    "layers.{}.attention_norm",
    *_MATRICES[:4],
    "layers.{}.ffn_norm",
    *_MATRICES[4:],
    "norm",
)
LLAMA2C_V1 = ("layers.{}.attention_norm", "layers.{}.ffn_norm", "norm", "tok_embeddings", *_MATRICES)


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


def meta_state(state: State) -> State:
    """Meta's or llama2.c's tensors by our names, without the rotary tables."""
    names = renamed(state, "meta", "ours")
    return {names[name]: tensor for name, tensor in state.items() if not ROTARY_TABLES.fullmatch(name)}


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


def read_huggingface(folder: Path) -> tuple[LlamaConfig, State]:
    """A folder with config.json and safetensors, one file or several with an index.

    Raises ValueError for a model that is no Llama, or one that computes what this program does not.
    """
    config = huggingface_config(folder / "config.json", read_json(folder / "config.json"))
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = shard_files(index)
    elif single.is_file():
        files = [single]
    else:
        raise ValueError(
            f"{folder} has no model.safetensors; fetch it, or save the model anew with transformers' save_pretrained"
        )
    state: State = {}
    for file in files:
        state |= _huggingface_tensors(file, config)
    return config, state


def _huggingface_tensors(file: Path, config: LlamaConfig) -> State:
    """One file's tensors by our names, in our layout; mapped, but for the query and key, which have to be reordered.

    These are read through a mapping of their own, let go at once: their pages would count twice.
    """
    theirs = [name for name in safetensors_names(file) if not ROTARY_TABLES.fullmatch(name)]
    names = renamed(theirs, "huggingface", "ours")
    if unknown := [name for name, ours in names.items() if name == ours]:  # no name is the same in both
        raise ValueError(f"{file} holds {shown(unknown[0])}, which is no tensor of a Hugging Face Llama")
    heads = {name: rotary_heads(ours, config) for name, ours in names.items()}
    state = {}
    for name, count in heads.items():
        if count is not None:
            tensor = weights_of(file, read_safetensors(file, [name]))[name]
            if tensor.dim() not in (1, 2) or tensor.shape[0] % (2 * count):
                raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, which is no {count} heads of pairs")
            state[names[name]] = to_pairs(tensor, count)
    others = [name for name, count in heads.items() if count is None]
    return state | {names[name]: tensor for name, tensor in weights_of(file, read_safetensors(file, others)).items()}


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


def check_rmsnorm(config: LlamaConfig, target: str) -> None:
    """Raises ValueError unless the model is of the kind that all other programs take a Llama to be."""
    if config.norm != "rmsnorm":
        raise ValueError(
            f"{target} holds RMSNorm models only, and this one has LayerNorm, which computes something else; "
            "keep it as safetensors, or pretrain one with --norm rmsnorm"
        )
    if not config.causal:
        raise ValueError(
            f"{target} holds causal models only, and this one's attention is bidirectional; keep it as safetensors, "
            "or say --attention causal if it was trained so"
        )
    if config.extras:
        raise ValueError(f"{target} holds no model with {config.extras[0]}, as this one has; keep it as safetensors")


SHARD_BYTES = 4 << 30


def write_huggingface(folder: Path, config: LlamaConfig, state: State, bos_id: int, eos_id: int) -> None:
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


def to_huggingface_config(config: LlamaConfig, dtype: str, bos_id: int, eos_id: int) -> dict[str, Any]:
    """What config.json says, in the words of transformers 4 and of 5."""
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
        "eos_token_id": eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


# llama2.c


def _llama2c_config(path: Path, sizes: tuple[int, ...], tied: bool, size: int) -> LlamaConfig:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = sizes
    try:
        if 8 * max(1, dim) * n_layers > size:  # a damaged count must not make us list millions of tensors
            raise ValueError(f"{n_layers:,} layers do not fit {size:,} bytes")
        return LlamaConfig(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            max_seq_len=max_seq_len,
            hidden_dim=hidden_dim,
            norm="rmsnorm",
            causal=True,
            tie_embeddings=tied,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the header is damaged") from error


def _llama2c_order(config: LlamaConfig, order: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, in file order."""
    shapes = parameter_shapes(config)
    for template in (*order, *([] if config.tie_embeddings else ["output"])):
        for i in range(config.n_layers if "{}" in template else 1):
            name = f"{template.format(i)}.weight"
            yield name, shapes[name]


def read_llama2c(path: Path) -> tuple[str, LlamaConfig, State] | None:
    """A llama2.c .bin file, and its version in words; None if it is none. v1 and v2 begin with a magic number; v0 does
    not, so a file is taken for one only if its size fits its header to the byte.

    Raises ValueError for a damaged file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
    if len(head) >= 4 and struct.unpack_from("<I", head)[0] == LLAMA2C_MAGIC:
        if len(head) < 256:
            raise ValueError(f"{path} is cut short inside its header; fetch or copy it again")
        _, version, *sizes, tied = struct.unpack_from("<Ii7iB", head)
        if version not in (1, 2):
            raise ValueError(f"{path} is llama2.c version {version}; this program reads versions 0, 1 and 2")
        config = _llama2c_config(path, tuple(sizes), bool(tied), size)
        order = list(_llama2c_order(config, LLAMA2C_V1))
        group = struct.unpack_from("<i", head, 37)[0] if version == 2 else None
        if group is not None and (group < 1 or any(math.prod(shape) % group for _, shape in order if len(shape) > 1)):
            raise ValueError(f"{path}: groups of {group} do not divide its matrices; the header is damaged")
        expected = 256 + sum(_llama2c_bytes(shape, group) for _, shape in order)
        if size != expected:
            raise ValueError(f"{path} has {size:,} bytes, its header asks for {expected:,}; fetch or copy it again")
        return f"llama2.c v{version}", config, _llama2c_tensors(path, 256, order, group)
    if len(head) < 28:
        return None
    *sizes, vocab_size, max_seq_len = struct.unpack_from("<7i", head)
    if min(*sizes, abs(vocab_size), max_seq_len) < 1 or max(*sizes, max_seq_len) > 1 << 20 or abs(vocab_size) > 1 << 24:
        return None
    try:
        config = _llama2c_config(path, (*sizes, abs(vocab_size), max_seq_len), vocab_size > 0, size)
    except ValueError:
        return None
    order = list(_llama2c_order(config, LLAMA2C_V0))
    order.insert(len(order) - (not config.tie_embeddings), ("", (max_seq_len, config.head_dim)))
    if size != 28 + sum(_llama2c_bytes(shape) for _, shape in order):
        return None
    return "llama2.c v0", config, _llama2c_tensors(path, 28, order)


def _llama2c_bytes(shape: tuple[int, ...], group: int | None = None) -> int:
    """Of one tensor: float32; or a matrix in int8 with a float32 a group."""
    count = math.prod(shape)
    return 4 * count if group is None or len(shape) == 1 else count + 4 * (count // group)


def _llama2c_tensors(
    path: Path, start: int, order: list[tuple[str, tuple[int, ...]]], group: int | None = None
) -> State:
    """The tensors, mapped; the int8 ones of v2 become float32 numbers in memory."""
    content = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    state: State = {}
    for name, shape in order:
        count, behind = math.prod(shape), start + _llama2c_bytes(shape, group)
        if group is None or len(shape) == 1:
            state[name] = content[start:behind].view(torch.float32).view(shape)
        else:
            integers = content[start : start + count].view(torch.int8).view(-1, group)
            # A copy, for the scales need not stand at a multiple of 4.
            scales = content[start + count : behind].clone().view(torch.float32)
            state[name] = (integers * scales[:, None]).view(shape)
        start = behind
    state.pop("", None)  # v0's rotary tables
    return state


def write_llama2c(path: str | PathLike[str], config: LlamaConfig, state: State, version: int) -> None:
    """Writes version 0, 1 (float32) or 2 (int8 in groups). Raises ValueError for what such a file cannot hold."""
    check_rmsnorm(config, "llama2.c")
    for name, value, fixed in (
        ("rope_theta", config.rope_theta, LLAMA2C_THETA),
        ("rope_scaling", config.rope_scaling, None),
        ("layer_norm_eps", config.layer_norm_eps, LLAMA2C_EPS),
    ):
        if value != fixed:
            raise ValueError(
                f"llama2.c computes {name} {fixed} only, and this model has {shown(value)}; take huggingface"
            )
    sizes = [config.dim, parameter_shapes(config)["layers.0.feed_forward.w1.weight"][0], config.n_layers]
    sizes += [config.n_heads, config.kv_heads]
    tied = config.tie_embeddings
    group = quantization_group(config.dim, sizes[1]) if version == 2 else None
    with atomic_file(path, "wb") as file:
        if version == 0:
            file.write(
                struct.pack("<7i", *sizes, config.vocab_size if tied else -config.vocab_size, config.max_seq_len)
            )
        else:
            head = struct.pack("<Ii7iB", LLAMA2C_MAGIC, version, *sizes, config.vocab_size, config.max_seq_len, tied)
            file.write((head + (b"" if group is None else struct.pack("<i", group))).ljust(256, b"\0"))
        for name, shape in _llama2c_order(config, LLAMA2C_V0 if version == 0 else LLAMA2C_V1):
            if version == 0 and name == "output.weight":
                file.write(_unread_tables(config))
            tensor = state[name].float()
            if group is None or len(shape) == 1:
                file.write(raw_bytes(tensor))
            else:
                for part in quantized(tensor, group):
                    file.write(raw_bytes(part))
        if version == 0 and tied:
            file.write(_unread_tables(config))


def _unread_tables(config: LlamaConfig) -> bytes:
    """The cosines and sines that end a v0 file."""
    frequencies = rotary_frequencies(config.head_dim, LLAMA2C_THETA)
    angles = torch.outer(torch.arange(config.max_seq_len).float(), frequencies)
    return bytes(raw_bytes(angles.cos())) + bytes(raw_bytes(angles.sin()))


def quantization_group(*widths: int) -> int:
    """How many numbers share a scale: 64, or half of it, and so on, until it divides every row."""
    group = 64
    while any(width % group for width in widths):
        group //= 2
    return group


def quantized(tensor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(int8, float32 scales): in each group of numbers, the largest is 127 or -127 (llama2.c's Q8_0)."""
    groups = tensor.reshape(-1, group)
    scales = groups.abs().amax(dim=1) / 127.0
    integers = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return integers, scales
