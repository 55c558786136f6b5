"""Reads and writes checkpoints: files in, (config, state dict) out. Knows no module.

A format is found by content, never by a file's name, and nothing in a file is executed (`weights_only=True`):
    safetensors tensors, and in the metadata the config as JSON; our own, for models that are passed on
    torch zip   {"model": state dict, "model_args": config fields, ...}; course checkpoints, and our own
    llama2.c v1 magic 0x616b3432, 256-byte header, float32
    llama2.c v0 7 integers, float32; no magic, so it is taken for one only if the file's size fits its header exactly
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from config import LlamaConfig, feed_forward_size, shown

FORMAT_VERSION = 1
METADATA_KEY = "mini-llama"  # of our part of a safetensors file's metadata
LLAMA2C_MAGIC = 0x616B3432
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPILED_PREFIX = "_orig_mod."  # what torch.compile puts before every key

# llama2.c's order of tensors; v0 ends in two RoPE tables that nobody reads. "{}" stands for the layer: one block a
# name, all layers in a row.
LLAMA2C_MATRICES = ("query", "key", "value", "output")
LLAMA2C_V0 = (
    "tok_embeddings.weight",
    "layers.{}.attention_norm.weight",
    *(f"layers.{{}}.attention.compute_{name}.weight" for name in LLAMA2C_MATRICES),
    "layers.{}.ffn_norm.weight",
    *(f"layers.{{}}.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
    "norm.weight",
)
LLAMA2C_V1 = (
    "layers.{}.attention_norm.weight",
    "layers.{}.ffn_norm.weight",
    "norm.weight",
    "tok_embeddings.weight",
    *(f"layers.{{}}.attention.compute_{name}.weight" for name in LLAMA2C_MATRICES),
    *(f"layers.{{}}.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
)


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the state dict of a `Llama` with this config, the tied output included."""
    dim, hidden = config.dim, feed_forward_size(config.dim, config.hidden_dim, config.multiple_of)
    kv_dim = config.kv_heads * config.head_dim
    norm_parts = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for i in range(config.n_layers):
        shapes |= {
            f"layers.{i}.attention.compute_query.weight": (dim, dim),
            f"layers.{i}.attention.compute_key.weight": (kv_dim, dim),
            f"layers.{i}.attention.compute_value.weight": (kv_dim, dim),
            f"layers.{i}.attention.compute_output.weight": (dim, dim),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
        }
        shapes |= {
            f"layers.{i}.{norm}.{part}": (dim,) for norm in ("attention_norm", "ffn_norm") for part in norm_parts
        }
    shapes |= {f"norm.{part}": (dim,) for part in norm_parts}
    return shapes | {"output.weight": (config.vocab_size, dim)}


@dataclass
class Checkpoint:
    """What a file holds: the config, the tensors by the course's keys, and whatever else stood beside them."""

    path: Path
    kind: str
    config: LlamaConfig
    state: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)

    def complete_state(self, config: LlamaConfig) -> dict[str, Tensor]:
        """The state dict of a `Llama` with `config`, checked name by name and shape by shape.

        Allowed to be missing: the biases of LayerNorms (zero), and output.weight where it is tied. Allowed to be too
        many: norm biases that are zero, where the model is RMSNorm. Raises ValueError for anything else, and for NaN
        or infinity.
        """
        state = dict(self.state)
        if config.n_layers > len(state):  # a damaged count must not make us list millions of tensors
            raise ValueError(f"{self.path}: {len(state)} tensors are too few for {config.n_layers:,} layers")
        shapes = parameter_shapes(config)
        for name in shapes:
            if name not in state and name.endswith("norm.bias") and name.replace("bias", "weight") in state:
                state[name] = torch.zeros_like(state[name.replace("bias", "weight")])
        if config.tie_embeddings and "tok_embeddings.weight" in state:
            embedding = state["tok_embeddings.weight"]
            if not torch.equal(state.setdefault("output.weight", embedding), embedding):
                raise ValueError(
                    f"{self.path}: output.weight differs from tok_embeddings.weight, though model_args tie them "
                    "(tie_embeddings); one of the two is wrong"
                )
        for name in [name for name in state if name.endswith("norm.bias") and name not in shapes]:
            if state.pop(name).any():
                raise ValueError(
                    f"{self.path}: {name} is not zero, so the model is LayerNorm; leave out --norm rmsnorm"
                )

        for name, shape in shapes.items():
            if name not in state:
                raise ValueError(f"{self.path}: tensor {name} is missing; this is not a whole Llama checkpoint")
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"{self.path}: {name} has shape {tuple(state[name].shape)}, its model_args ask for {shape}; "
                    "one of the two is wrong"
                )
            if not torch.isfinite(state[name].float()).all():  # as the model will hold it
                raise ValueError(
                    f"{self.path}: {name} holds NaN or infinity, or a number beyond float32; "
                    "the file is damaged, fetch or train it anew"
                )
        if unknown := sorted(set(state) - set(shapes)):
            raise ValueError(f"{self.path}: tensor {unknown[0]} (of {len(unknown)}) belongs to no Llama of this config")
        return state


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Reads a file of any known format, onto the CPU.

    Raises FileNotFoundError if there is none, ValueError if it is damaged, of no known format, or a pickle with code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; `python fetch_data.py checkpoint` brings stories42M.pt")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; --pretrained-model-path takes a checkpoint file")
    with path.open("rb") as file:
        head = file.read(256)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; fetch or copy the checkpoint again")
    # First, for its length may begin with the byte that a pickle begins with.
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] < size:
        return _from_torch(path, _read_safetensors(path))
    if head.startswith(b"PK\x03\x04") or head.startswith(b"\x80"):
        return _from_torch(path, read_torch(path))
    if len(head) >= 4 and struct.unpack_from("<I", head)[0] == LLAMA2C_MAGIC:
        return _read_llama2c_v1(path, head, size)
    if checkpoint := _read_llama2c_v0(path, head, size):
        return checkpoint
    raise ValueError(
        f"{path} is no checkpoint this program knows, or was cut short; "
        "known are the course's torch files, our own safetensors, and llama2.c versions 0 and 1"
    )


def read_torch(path: Path) -> Any:
    """What a torch file holds: tensors and plain values, nothing that runs. Raises ValueError for all else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: unpickling it would run code, or it is damaged; "
            "a checkpoint holds tensors and plain values only"
        ) from error
    except Exception as error:  # damage surfaces anywhere in torch's reader: struct.error, AssertionError, OSError, ...
        raise ValueError(f"{path} is damaged or cut short; fetch or copy it again") from error


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor read from a file has one shape and a value for each of its places: not sparse, not nested, not
    on the device "meta".
    """
    return tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The same content as that of our torch files."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        described = json.loads(metadata.get(METADATA_KEY, "{}"))
        return {"model": safetensors.torch.load_file(path), **described}
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged or cut short; fetch or copy it again") from error


def _from_torch(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f'{path} holds no "model"; a course checkpoint is {{"model": tensors, "model_args": sizes}}')
    if not isinstance(content.get("model_args"), dict):
        raise ValueError(f'{path} holds no "model_args", so the model\'s sizes are unknown')
    version, kind = content.get("format_version", FORMAT_VERSION), content.get("kind", "llama")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {shown(version)}; this program reads {FORMAT_VERSION}")
    if kind != "llama":
        name = shown(kind).strip("'")
        raise ValueError(f"{path} is a fine-tuned {name}, not a language model; give its base model instead")
    state = {}
    for name, tensor in content["model"].items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f'{path}: "model" holds {name!r}, which is no tensor of weights')
        if not is_dense(tensor):
            raise ValueError(f'{path}: "model" holds {name!r}, which is sparse or has no data; save it dense')
        state[name.removeprefix(COMPILED_PREFIX)] = tensor
    arguments = dict(content["model_args"])
    if "tie_embeddings" not in arguments and {"output.weight", "tok_embeddings.weight"} <= set(state):
        arguments["tie_embeddings"] = torch.equal(state["output.weight"], state["tok_embeddings.weight"])
    try:
        config = LlamaConfig.from_dict(arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    extra = {name: value for name, value in content.items() if name not in ("model", "model_args")}
    origin = "mini-llama" if "format_version" in content else "course"
    return Checkpoint(path, origin, config, state, extra)


def _llama2c_config(path: Path, sizes: tuple[int, ...], tied: bool, size: int) -> LlamaConfig:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = sizes
    try:
        if n_layers > size:  # a damaged count must not make us list millions of tensors
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


def _llama2c_blocks(
    config: LlamaConfig, order: tuple[str, ...], gap: int = 0
) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(name, offset in floats, shape) of every tensor, in file order; last ("", total, ()). gap: unused floats before
    the classifier."""
    shapes = parameter_shapes(config)
    offset = 0
    for template in order:
        for name in [template.format(i) for i in range(config.n_layers if "{}" in template else 1)]:
            yield name, offset, shapes[name]
            offset += int(np.prod(shapes[name]))
    offset += gap
    if not config.tie_embeddings:
        yield "output.weight", offset, shapes["output.weight"]
        offset += config.vocab_size * config.dim
    yield "", offset, ()


def _read_llama2c(
    path: Path, config: LlamaConfig, blocks: list[tuple[str, int, tuple[int, ...]]], start: int, kind: str
) -> Checkpoint:
    floats = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=start))
    state = {name: floats[offset : offset + int(np.prod(shape))].view(shape) for name, offset, shape in blocks if name}
    return Checkpoint(path, kind, config, state)


def _read_llama2c_v1(path: Path, head: bytes, size: int) -> Checkpoint:
    if len(head) < 256:
        raise ValueError(f"{path} is cut short inside its header; fetch or copy it again")
    _, version, *sizes, tied = struct.unpack_from("<Ii7iB", head)
    if version != 1:
        raise ValueError(f"{path} is llama2.c version {version}; this program reads versions 0 and 1")
    config = _llama2c_config(path, tuple(sizes), bool(tied), size)
    blocks = list(_llama2c_blocks(config, LLAMA2C_V1))
    expected = 256 + 4 * blocks[-1][1]
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its header asks for {expected:,}; fetch or copy it again")
    return _read_llama2c(path, config, blocks, 256, "llama2.c v1")


def _read_llama2c_v0(path: Path, head: bytes, size: int) -> Checkpoint | None:
    """None if the file is no such checkpoint: with no magic number, only a size that fits the header tells."""
    if len(head) < 28:
        return None
    *sizes, vocab_size, max_seq_len = struct.unpack_from("<7i", head)
    if min(*sizes, abs(vocab_size), max_seq_len) < 1 or max(*sizes, max_seq_len) > 1 << 20 or abs(vocab_size) > 1 << 24:
        return None
    try:
        config = _llama2c_config(path, (*sizes, abs(vocab_size), max_seq_len), vocab_size > 0, size)
    except ValueError:
        return None
    blocks = list(_llama2c_blocks(config, LLAMA2C_V0, gap=max_seq_len * config.head_dim))
    if size != 28 + 4 * blocks[-1][1]:
        return None
    return _read_llama2c(path, config, blocks, 28, "llama2.c v0")


def write_checkpoint(
    path: str | PathLike[str], state: dict[str, Tensor], config: LlamaConfig, kind: str = "llama", **extra: Any
) -> None:
    """Writes {"model", "model_args", "format_version", "kind", ...} atomically; `extra` must be tensors and plain
    values.

    A whole `Llama` (kind "llama") reads back through `read_checkpoint`, with its norm and causality, whatever the
    defaults.
    """
    content = {
        "model": {name: tensor.detach().cpu() for name, tensor in state.items()},
        "model_args": config.to_dict(),
        "format_version": FORMAT_VERSION,
        "kind": kind,
        **extra,
    }
    write_torch(path, content)


def write_safetensors(
    path: str | PathLike[str], state: dict[str, Tensor], config: LlamaConfig, dtype: torch.dtype = torch.float32
) -> None:
    """Writes a whole `Llama` atomically, rounded to `dtype`; a tied output is left out, for it is the embedding."""
    tensors = {
        name: tensor.detach().cpu().to(dtype).contiguous()
        for name, tensor in state.items()
        if not (config.tie_embeddings and name == "output.weight")
    }
    described = {"format_version": FORMAT_VERSION, "kind": "llama", "model_args": config.to_dict()}
    content = safetensors.torch.save(tensors, {"format": "pt", METADATA_KEY: json.dumps(described)})
    # The library puts the metadata in an order of chance; the same model is to be the same bytes.
    behind = 8 + struct.unpack_from("<Q", content)[0]
    header = json.dumps(json.loads(content[8:behind]), sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with atomic_file(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + content[behind:])


def write_torch(path: str | PathLike[str], content: dict[str, Any]) -> None:
    """torch.save, atomically. Raises OSError if the disk is full."""
    try:
        with atomic_file(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch's writer, as it closes, covers up why it could not write with an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextmanager
def atomic_file(path: str | PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path` that takes its place when the block ends; on an error nothing is touched."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points
    encoding = None if "b" in mode else "utf-8"
    if os.path.exists(path) and not os.path.isfile(path):  # a device or a pipe is written to, never replaced
        with open(path, mode, encoding=encoding) as device:
            yield device
        return
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with open(descriptor, mode, encoding=encoding, newline=None if "b" in mode else "\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def link_or_copy(source: Path, target: str | PathLike[str]) -> None:
    """Makes the file at `source` known at `target`, too, atomically; a copy where the file system knows no links."""
    if os.path.exists(target) and os.path.samefile(source, target):
        return
    temporary = Path(f"{os.path.realpath(target)}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, os.path.realpath(target))
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(*paths: str | PathLike[str]) -> None:
    """Raises OSError, naming the path, unless a file could be written at every one of `paths`. Touches none of them."""
    for path in map(Path, paths):
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {folder}; make it first (mkdir -p {folder})")
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the name of a file to write")
        try:
            with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=folder):
                pass  # under the kind of name that atomic_file takes, which may be too long
        except OSError as error:
            raise PermissionError(f"{path} cannot be written: {error.strerror}; choose another folder") from error
