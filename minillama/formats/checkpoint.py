"""Checkpoints: files in, (config, state dict) out, and back. Knows no module.

A format is found by content, never by a file's name, and nothing in a file is executed (`weights_only=True`):
    safetensors    tensors, and in the metadata the config as JSON; our own, for models that are passed on
    torch zip      {"model": state dict, "model_args": config fields, ...}; course checkpoints, llama2.c's .pt, our own
    llama2.c .bin  versions 0, 1 (float32) and 2 (int8)
    Meta           a folder with params.json and consolidated.NN.pth
    Hugging Face   a folder with config.json and safetensors
The last three are in formats.py. Tensors keep the file's dtype, and are mapped where they stand in it as they are used:
their bytes are read when they are needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import LlamaConfig, parameter_shapes, shown
from minillama.formats.files import (
    is_safetensors,
    is_torch,
    read_json,
    read_safetensors,
    read_torch,
    safetensors_metadata,
    weights_of,
    write_safetensors_file,
    write_torch,
)
from minillama.formats.huggingface import checked_stop_ids, is_meta_folder, read_huggingface
from minillama.formats.keys import is_tied
from minillama.formats.llama2c import read_llama2c
from minillama.formats.meta import is_meta, meta_state, read_meta
from minillama.formats.names import COURSE_TEMPLATE

FORMAT_VERSION = 1
METADATA_KEY = "mini-llama"  # of our part of a safetensors file's metadata


@dataclass
class Checkpoint:
    """The content of a file: the config, the tensors by the course's keys, and whatever else stood beside them."""

    path: Path
    kind: str
    config: LlamaConfig
    state: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()  # at which a text ends, beside those of the tokenizer

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights in the file, as the embedding has it; None where there is no embedding."""
        embedding = self.state.get("tok_embeddings.weight")
        return None if embedding is None else embedding.dtype

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
        unneeded = [name for name in state if name.endswith("norm.bias") and name.replace("bias", "weight") in shapes]
        for name in (name for name in unneeded if name not in shapes):
            if state.pop(name).any():
                raise ValueError(
                    f"{self.path}: {name} is not zero, so the model is LayerNorm; leave out --norm rmsnorm"
                )

        for name, shape in shapes.items():
            if name not in state:
                instead = next((f", and there is {other}" for other in sorted(set(state) - set(shapes))), "")
                raise ValueError(
                    f"{self.path}: tensor {name} is missing{instead}; this is not a whole Llama checkpoint under the "
                    "course's names"
                )
            if tuple(state[name].shape) != shape:
                raise ValueError(
                    f"{self.path}: {name} has shape {tuple(state[name].shape)}, its model_args ask for {shape}; "
                    "one of the two is wrong"
                )
            if not fits_float32(state[name]):
                raise ValueError(
                    f"{self.path}: {name} holds NaN or infinity, or a number beyond float32; "
                    "the file is damaged, fetch or train it anew"
                )
        if unknown := sorted(set(state) - set(shapes)):
            raise ValueError(f"{self.path}: tensor {unknown[0]} (of {len(unknown)}) belongs to no Llama of this config")
        return state


def fits_float32(tensor: Tensor) -> bool:
    """Whether every number is finite, in float32 too. Makes no copy."""
    if tensor.numel() == 0:
        return True
    largest = torch.finfo(torch.float32).max
    low, high = (float(end) for end in torch.aminmax(tensor))  # a NaN anywhere comes out as NaN
    return -largest <= low and high <= largest


def check_there(path: Path) -> None:
    """Raises FileNotFoundError if there is nothing at the path."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; `python fetch_data.py checkpoint` brings stories42M.pt")


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Reads a file or folder of any known format, onto the CPU.

    Raises FileNotFoundError if there is none, ValueError if it is damaged, of no known format, or a pickle with code.
    """
    path = Path(path)
    check_there(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder; --pretrained-model-path takes a checkpoint")
    with path.open("rb") as file:
        head = file.read(256)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; fetch or copy the checkpoint again")
    if is_safetensors(head, size):  # first, for its length may begin with a byte that a pickle begins with
        return _from_content(path, _described_safetensors(path))
    if is_torch(head):
        return _from_content(path, read_torch(path, mapped=True))
    if found := read_llama2c(path):
        return Checkpoint(path, *found)
    if head.startswith(b"GGUF"):
        raise ValueError(f"{path} is GGUF, which this program writes and does not read; give what it was made from")
    raise ValueError(
        f"{path} is no checkpoint this program knows, or was cut short; known are torch files (the course's, "
        "llama2.c's, ours), our safetensors, llama2.c's .bin, and folders of Meta's or Hugging Face's"
    )


def _read_folder(folder: Path) -> Checkpoint:
    is_huggingface = (folder / "config.json").is_file()
    if (folder / "params.json").is_file() and (is_meta_folder(folder) or not is_huggingface):
        return Checkpoint(folder, "Meta", *read_meta(folder))
    if is_huggingface:
        config, state, stop_ids = read_huggingface(folder)
        return Checkpoint(folder, "Hugging Face", config, state, stop_ids=stop_ids)
    raise ValueError(
        f"{folder} is a folder without Meta's params.json or Hugging Face's config.json; "
        "give a folder that has one, or a checkpoint file"
    )


def _described_safetensors(path: Path) -> dict[str, Any]:
    """The content in the form that our torch files have."""
    try:
        described = json.loads(safetensors_metadata(path).get(METADATA_KEY, "{}"))
        return {"model": read_safetensors(path), **described}
    except (TypeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short; fetch or copy it again") from error


def _from_content(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f'{path} holds no "model"; a course checkpoint is {{"model": tensors, "model_args": sizes}}')
    if not isinstance(content.get("model_args"), dict):
        raise ValueError(f'{path} holds no "model_args", so the model\'s sizes are unknown')
    version, kind = content.get("format_version", FORMAT_VERSION), content.get("kind", "llama")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {shown(version)}; this program reads {FORMAT_VERSION}")
    if kind != "llama":
        name = shown(kind).strip("'")
        raise ValueError(
            f"{path} is a fine-tuned {name}, not a language model; give its base model instead, or "
            f"--option classify --finetuned {path} and a sentence"
        )
    state = weights_of(path, content["model"])
    arguments = dict(content["model_args"])
    origin = "mini-llama" if "format_version" in content else "course"
    if is_meta(state):
        origin, state = "llama2.c", meta_state(state)
        arguments = {"norm": "rmsnorm", "causal": True} | arguments
    if "tie_embeddings" not in arguments:
        arguments["tie_embeddings"] = is_tied(state)
    try:
        config = LlamaConfig.from_dict(arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    extra = {name: value for name, value in content.items() if name not in ("model", "model_args")}
    stop_ids = checked_stop_ids(path, "stop_ids", content.get("stop_ids"), config.vocab_size)
    return Checkpoint(path, origin, config, state, extra, stop_ids)


def folder_vocabulary(folder: Path) -> int | None:
    """How many ids the model in a folder has, by its config alone; None where that does not tell."""
    file = folder / "config.json"
    if not file.is_file() or is_meta_folder(folder):
        file = folder / "params.json"
    size = read_json(file).get("vocab_size") if file.is_file() else None
    return size if type(size) is int and size > 0 else None


@dataclass
class FineTuned:
    """The file of a fine-tuned classifier: what finetune, lora and wise_ft write."""

    path: Path
    config: LlamaConfig  # of the model in it
    state: dict[str, Tensor]  # of the whole classifier, by its own names
    head: str  # "linear" or "prompt"
    label_names: list[str]
    labels: dict[str, str | None]  # the class of each label in the data files, None for those left out
    template: str  # of the prompt, and what stands for the classes in it; the prompt head's
    words: list[str]
    options: dict[str, Any]  # of the run that made it


def read_fine_tuned(path: str | PathLike[str]) -> FineTuned:
    """Raises FileNotFoundError if there is no such file, ValueError if it is damaged or anything else."""
    path = Path(path)
    wanted = "give the best.pt of a run, or the finetune-...pt or lora-...pt that it wrote"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {wanted}")
    if not path.is_file():
        raise ValueError(f"{path} is no file; {wanted}")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds a model without a classifier; {wanted}")
    with path.open("rb") as file:
        if not is_torch(file.read(4)):
            raise ValueError(f"{path} is no checkpoint; {wanted}")
    content = read_torch(path)
    if not isinstance(content, dict) or content.get("kind") != "classifier":
        raise ValueError(f"{path} holds no fine-tuned classifier; {wanted}")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {shown(content.get('format_version'))}; this program reads 1")
    state, arguments, options, names = (content.get(n, {}) for n in ("model", "model_args", "options", "label_names"))
    head = content.get("head", "linear")  # the first versions had no other
    whole = isinstance(state, dict) and isinstance(arguments, dict) and isinstance(options, dict)
    if not whole or not is_label_names(names) or head not in ("linear", "prompt"):
        raise ValueError(f"{path} does not say all of model, model_args, head, label_names and options; {wanted}")
    labels = content.get("labels", {str(n): name for n, name in enumerate(names)})  # nor other labels
    classes = dict.fromkeys(name for name in labels.values() if name is not None) if isinstance(labels, dict) else {}
    if list(classes) != names or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: its labels are not those of its label_names; train it anew")
    template, words = options.get("template", COURSE_TEMPLATE), options.get("label_words") or names
    if not isinstance(template, str) or template.count("{sentence}") != 1:
        raise ValueError(f"{path} says of template {shown(template)}; it must have {{sentence}} once")
    if not is_label_names(words) or len(words) != len(names):
        raise ValueError(f"{path} says of label_words {shown(words)}; there must be one for each class")
    try:
        config = LlamaConfig.from_dict(arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    state = weights_of(path, state)
    for name, tensor in state.items():
        if not fits_float32(tensor):
            raise ValueError(f"{path}: {name} holds NaN or infinity; train it anew")
    return FineTuned(path, config, state, head, names, labels, template, words, options)


def is_label_names(value: Any) -> bool:
    """Whether a value from a file can be the names of a classifier's classes."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(name, str) and name for name in value)


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
    path: str | PathLike[str],
    state: dict[str, Tensor],
    config: LlamaConfig,
    dtype: torch.dtype | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes a whole `Llama` atomically, rounded to `dtype`, with the ids at which a text ends; a tied output is left
    out, for it is the embedding.
    """
    tensors = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in state.items()
        if not (config.tie_embeddings and name == "output.weight")
    }
    described = {"format_version": FORMAT_VERSION, "kind": "llama", "model_args": config.to_dict()}
    if stop_ids:
        described["stop_ids"] = list(stop_ids)
    write_safetensors_file(path, tensors, {"format": "pt", METADATA_KEY: json.dumps(described)})
