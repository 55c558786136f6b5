"""llama2.c's .bin files, versions 0 to 2, read and written."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig, check_rmsnorm, parameter_shapes, shown
from minillama.formats.files import atomic_file, raw_bytes
from minillama.formats.keys import State
from rope import rotary_frequencies

LLAMA2C_MAGIC = 0x616B3432
LLAMA2C_HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
LLAMA2C_EPS, LLAMA2C_THETA = 1e-5, 10000.0  # constants of llama2.c; its files do not have them
ATTENTION = tuple(f"layers.{{}}.attention.compute_{part}" for part in ("query", "key", "value", "output"))
FEED_FORWARD = tuple(f"layers.{{}}.feed_forward.{part}" for part in ("w1", "w2", "w3"))
# The order of the tensors; all layers of one name follow each other. v0 has two unused rotary tables after norm. An
# untied output comes last.
LLAMA2C_V0 = ("tok_embeddings", "layers.{}.attention_norm", *ATTENTION, "layers.{}.ffn_norm", *FEED_FORWARD, "norm")
LLAMA2C_V1 = ("layers.{}.attention_norm", "layers.{}.ffn_norm", "norm", "tok_embeddings", *ATTENTION, *FEED_FORWARD)


def _llama2c_config(path: Path, sizes: tuple[int, ...], tied: bool, size: int) -> LlamaConfig:
    fields: dict[str, Any] = dict(zip(LLAMA2C_HEADER, sizes, strict=True))
    try:
        if 8 * max(1, fields["dim"]) * fields["n_layers"] > size:  # a damaged count could mean millions of tensors
            raise ValueError(f"{fields['n_layers']:,} layers do not fit {size:,} bytes")
        return LlamaConfig(**fields, norm="rmsnorm", causal=True, tie_embeddings=tied)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the header is damaged") from error


def _llama2c_order(config: LlamaConfig, order: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor, in file order."""
    shapes = parameter_shapes(config)
    for template in (*order, *([] if config.tie_embeddings else ["output"])):
        for i in range(config.n_layers if "{}" in template else 1):
            name = f"{template.format(i)}.weight"
            yield name, shapes[name]


def read_llama2c(path: Path) -> tuple[str, LlamaConfig, State] | None:
    """The version in words, the config and the tensors of a llama2.c .bin file; None for any other file.

    v1 and v2 begin with a magic number. A v0 file is recognised by a size that fits its header to the byte. Raises
    ValueError for a damaged file.
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
    """Size of a tensor in bytes: float32, or for a matrix with `group`, int8 and one float32 scale per group."""
    count = math.prod(shape)
    return 4 * count if group is None or len(shape) == 1 else count + 4 * (count // group)


def _llama2c_tensors(
    path: Path, start: int, order: list[tuple[str, tuple[int, ...]]], group: int | None = None
) -> State:
    """The tensors, memory-mapped; v2's int8 matrices become float32 in memory."""
    content = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    state: State = {}
    for name, shape in order:
        count, behind = math.prod(shape), start + _llama2c_bytes(shape, group)
        if group is None or len(shape) == 1:
            state[name] = content[start:behind].view(torch.float32).view(shape)
        else:
            integers = content[start : start + count].view(torch.int8).view(-1, group)
            scales = content[start + count : behind].clone().view(torch.float32)  # the copy is aligned to 4 bytes
            state[name] = (integers * scales[:, None]).view(shape)
        start = behind
    state.pop("", None)  # v0's rotary tables
    return state


def write_llama2c(path: str | PathLike[str], config: LlamaConfig, state: State, version: int) -> None:
    """Writes version 0, 1 (float32) or 2 (int8). Raises ValueError for a model that the format does not support."""
    check_rmsnorm(config, "llama2.c")
    fixed = {"rope_theta": LLAMA2C_THETA, "rope_scaling": None, "layer_norm_eps": LLAMA2C_EPS}
    for name, wanted in fixed.items():
        if (value := getattr(config, name)) != wanted:
            only = f"only {name} {wanted}, and this model has {shown(value)}"
            raise ValueError(f"llama2.c supports {only}; convert to huggingface")
    hidden = parameter_shapes(config)["layers.0.feed_forward.w1.weight"][0]
    sizes = [config.dim, hidden, config.n_layers, config.n_heads, config.kv_heads]
    tied = config.tie_embeddings
    group = math.gcd(64, config.dim, hidden) if version == 2 else None  # numbers per scale; it divides every row
    with atomic_file(path, "wb") as file:
        if version == 0:
            signed = config.vocab_size if tied else -config.vocab_size
            file.write(struct.pack("<7i", *sizes, signed, config.max_seq_len))
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
                file.writelines(map(raw_bytes, _quantized(tensor, group)))
        if version == 0 and tied:
            file.write(_unread_tables(config))


def _unread_tables(config: LlamaConfig) -> bytes:
    """The cosines and sines of a v0 file."""
    frequencies = rotary_frequencies(config.head_dim, LLAMA2C_THETA)
    angles = torch.outer(torch.arange(config.max_seq_len).float(), frequencies)
    return bytes(raw_bytes(angles.cos())) + bytes(raw_bytes(angles.sin()))


def _quantized(tensor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(int8, float32 scales): the largest number of each group becomes 127 or -127 (llama2.c's Q8_0)."""
    groups = tensor.reshape(-1, group)
    scales = groups.abs().amax(dim=1) / 127.0
    integers = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return integers, scales
