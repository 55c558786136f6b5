"""Checkpoints: reads all formats into a config and a state dict, and writes ours.

The format is detected from the content, never from the name. Nothing in a file is executed (`weights_only=True`).
    safetensors    tensors, and in the metadata the config as JSON; our own
    torch zip      {"model": state dict, "model_args": config fields, ...}; the course's, llama2.c's .pt, our own
    llama2.c .bin  versions 0, 1 (float32) and 2 (int8): llama2c.py
    Meta           a folder with params.json and consolidated.NN.pth: meta.py
    Hugging Face   a folder with config.json and safetensors: huggingface.py
Tensors keep the file's dtype. They are memory-mapped, so their bytes are read when they are used.
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
from minillama.environment import HERE, file_sha256
from minillama.formats import files
from minillama.formats.huggingface import checked_stop_ids, is_meta_folder, read_huggingface
from minillama.formats.keys import is_tied
from minillama.formats.llama2c import read_llama2c
from minillama.formats.meta import is_meta, meta_state, read_meta
from minillama.formats.names import COURSE_TEMPLATE

FORMAT_VERSION = 1
METADATA_KEY = "mini-llama"  # our entry in the metadata of a safetensors file


@dataclass
class Checkpoint:
    """The content of a checkpoint: the config, the tensors by the course's keys, and other entries."""

    path: Path
    kind: str
    config: LlamaConfig
    state: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()  # ids that end a text, in addition to the tokenizer's

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the embedding; None without one."""
        embedding = self.state.get("tok_embeddings.weight")
        return None if embedding is None else embedding.dtype

    def complete_state(self, config: LlamaConfig) -> dict[str, Tensor]:
        """The state dict of a `Llama` with `config`; every name and shape is checked.

        A missing LayerNorm bias becomes zero, and a missing tied output.weight becomes the embedding. An RMSNorm model
        may have norm biases if they are zero. Raises ValueError for any other difference, and for NaN or infinity.
        """
        state, path = dict(self.state), self.path
        if config.n_layers > len(state):  # a damaged count could mean a list of millions of names
            raise ValueError(f"{path}: {len(state)} tensors are too few for {config.n_layers:,} layers")
        shapes = parameter_shapes(config)
        for name in (name for name in shapes if name.endswith("norm.weight")):
            bias = name.replace("weight", "bias")
            if bias in shapes and name in state:
                state.setdefault(bias, torch.zeros_like(state[name]))
            elif bias not in shapes and bias in state and state.pop(bias).any():
                raise ValueError(f"{path}: {bias} is not zero, so the model is LayerNorm; leave out --norm rmsnorm")
        if config.tie_embeddings and "tok_embeddings.weight" in state:
            embedding = state["tok_embeddings.weight"]
            if not torch.equal(state.setdefault("output.weight", embedding), embedding):
                raise ValueError(f"{path}: tie_embeddings is set, but output.weight differs from tok_embeddings.weight")

        unknown = sorted(set(state) - set(shapes))
        for name, shape in shapes.items():
            if name not in state:
                instead = f", and there is {unknown[0]}" if unknown else ""
                raise ValueError(f"{path}: tensor {name} is missing{instead}; this is not a whole Llama checkpoint")
            if tuple(state[name].shape) != shape:
                both = f"has shape {tuple(state[name].shape)}, its model_args ask for {shape}"
                raise ValueError(f"{path}: {name} {both}; one of the two is wrong")
            if not fits_float32(state[name]):
                raise ValueError(f"{path}: {name} holds NaN or infinity, or a number beyond float32; fetch it again")
            files.release_pages(state[name])
        if unknown:
            raise ValueError(f"{path}: tensor {unknown[0]} (of {len(unknown)}) belongs to no Llama of this config")
        return state


def fits_float32(tensor: Tensor) -> bool:
    """Whether every number is finite in float32; makes no copy."""
    if tensor.numel() == 0:
        return True
    largest = torch.finfo(torch.float32).max
    low, high = (float(end) for end in torch.aminmax(tensor))  # NaN if any number is
    return -largest <= low and high <= largest


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Reads a file or folder of any known format, onto the CPU. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; `python fetch_data.py checkpoint` brings stories42M.pt")
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder; --pretrained-model-path takes a checkpoint")
    with path.open("rb") as file:
        head = file.read(256)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty; fetch or copy the checkpoint again")
    if files.is_safetensors(head, size):  # before is_torch, because its first byte may be that of a pickle
        return _from_content(path, _described_safetensors(path))
    if files.is_torch(head):
        return _from_content(path, files.read_torch(path, mapped=True))
    if found := read_llama2c(path):
        return Checkpoint(path, *found)
    if head.startswith(b"GGUF"):
        raise ValueError(f"{path} is GGUF, which this program only writes; give the original checkpoint")
    raise ValueError(
        f"{path} is not a checkpoint this program knows, or was cut short; it reads torch files (the course's, "
        "llama2.c's, ours), our safetensors, llama2.c's .bin, and folders in Meta's or Hugging Face's format"
    )


def _read_folder(folder: Path) -> Checkpoint:
    is_huggingface = (folder / "config.json").is_file()
    if (folder / "params.json").is_file() and (is_meta_folder(folder) or not is_huggingface):
        return Checkpoint(folder, "Meta", *read_meta(folder))
    if is_huggingface:
        config, state, stop_ids = read_huggingface(folder)
        return Checkpoint(folder, "Hugging Face", config, state, stop_ids=stop_ids)
    raise ValueError(f"{folder} is a folder without Meta's params.json or Hugging Face's config.json")


def _described_safetensors(path: Path) -> dict[str, Any]:
    """The content of our safetensors, in the structure of our torch files."""
    try:
        described = json.loads(files.safetensors_metadata(path).get(METADATA_KEY, "{}"))
        return {"model": files.read_safetensors(path), **described}
    except (TypeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short; fetch or copy it again") from error


def _from_content(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f'{path} has no "model"; a course checkpoint is {{"model": tensors, "model_args": sizes}}')
    if not isinstance(content.get("model_args"), dict):
        raise ValueError(f'{path} has no "model_args", so the model\'s sizes are unknown')
    _check_version(path, content)
    if (kind := content.get("kind", "llama")) != "llama":
        name = shown(kind).strip("'")
        raise ValueError(
            f"{path} is a fine-tuned {name}, not a language model; give its base model instead, or "
            f"--option classify --finetuned {path} and a sentence"
        )
    state = files.weights_of(path, content["model"])
    arguments = dict(content["model_args"])
    origin = "mini-llama" if "format_version" in content else "course"
    if is_meta(state):
        origin, state = "llama2.c", meta_state(state)
        arguments = {"norm": "rmsnorm", "causal": True} | arguments
    if "tie_embeddings" not in arguments:
        arguments["tie_embeddings"] = is_tied(state)
    config = _config_from(path, arguments)
    extra = {name: value for name, value in content.items() if name not in ("model", "model_args")}
    stop_ids = checked_stop_ids(path, "stop_ids", content.get("stop_ids"), config.vocab_size)
    return Checkpoint(path, origin, config, state, extra, stop_ids)


def _check_version(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError for another format version. Files of the course and llama2.c have none."""
    version = content.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {shown(version)}; this program reads {FORMAT_VERSION}")


def _config_from(path: Path, arguments: dict[str, Any]) -> LlamaConfig:
    try:
        return LlamaConfig.from_dict(arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def folder_vocabulary(folder: Path) -> int | None:
    """The vocabulary size in a folder's config; None without one."""
    file = folder / "config.json"
    if not file.is_file() or is_meta_folder(folder):
        file = folder / "params.json"
    size = files.read_json(file).get("vocab_size") if file.is_file() else None
    return size if type(size) is int and size > 0 else None


@dataclass
class FineTuned:
    """The content of a fine-tuned classifier's file, as written by finetune, lora, wise_ft, or convert --to adapter."""

    path: Path
    config: LlamaConfig
    state: dict[str, Tensor]  # of the whole classifier, by its own names
    head: str  # "linear" or "prompt"
    label_names: list[str]
    labels: dict[str, str | None]  # the class of each label in the data files, None for labels left out
    template: str  # of the prompt head
    words: list[str]  # one for each class, in the prompt
    options: dict[str, Any]  # of the run that made it

    def has_base(self, state: dict[str, Tensor]) -> bool:
        """Whether all weights of a base model, its state dict, are in the classifier unchanged, as LoRA leaves them."""
        own = {name.replace(".original_layer.", ".").removeprefix("llama."): t for name, t in self.state.items()}
        return all(name in own and torch.equal(own[name].float(), tensor.float()) for name, tensor in state.items())


def read_fine_tuned(path: str | PathLike[str], base: str | None = None) -> FineTuned:
    """Reads the file of a fine-tuned classifier. Raises FileNotFoundError or ValueError.

    base: where the base model of an adapter is, if not where it was.
    """
    path = Path(path)
    wanted = "give the folder of a run, its best.pt, or the finetune-...pt or lora-...pt that it wrote"
    if path.is_dir():
        path /= "best.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {wanted}")
    with path.open("rb") as file:
        content = files.read_torch(path) if files.is_torch(file.read(4)) else None
    kind = content.get("kind") if isinstance(content, dict) else None
    if not isinstance(content, dict) or kind not in ("classifier", "adapter"):
        raise ValueError(f"{path} is not a fine-tuned classifier; {wanted}")
    if kind == "adapter" and "label_names" not in content:
        raise ValueError(f"{path} is an adapter of a language model, not a fine-tuned classifier; {wanted}")
    _check_version(path, content)
    tables: list[Any] = [content.get(name, {}) for name in ("model", "model_args", "options")]
    head: Any = content.get("head", "linear")
    if not all(isinstance(table, dict) for table in tables) or head not in ("linear", "prompt"):
        raise ValueError(f"{path}: one of model, model_args, options and head is damaged; {wanted}")
    tensors, arguments, options = tables
    names: Any = content.get("label_names")
    template, words = options.get("template", COURSE_TEMPLATE), options.get("label_words") or names
    if not isinstance(template, str) or template.count("{sentence}") != 1:
        raise ValueError(f"{path} has the template {shown(template)}; it must have {{sentence}} once")
    if not _are_names(names) or not _are_names(words) or len(words) != len(names):
        raise ValueError(f"{path} does not have one label name and one label word for each class; train it again")
    labels = content.get("labels", {str(n): name for n, name in enumerate(names)})
    classes = dict.fromkeys(name for name in labels.values() if name is not None) if isinstance(labels, dict) else {}
    if list(classes) != names or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path}: its labels are not those of its label_names; train it again")
    state = files.weights_of(path, tensors)
    for name, tensor in state.items():
        if not fits_float32(tensor):
            raise ValueError(f"{path}: {name} holds NaN or infinity; train it again")
    if kind == "adapter":
        state = _with_base(path, state, options, base)
    return FineTuned(path, _config_from(path, arguments), state, head, names, labels, template, words, options)


def _with_base(path: Path, state: dict[str, Tensor], options: dict[str, Any], base: str | None) -> dict[str, Tensor]:
    """The tensors of a classifier by its own names, from its adapter and its base model."""
    named = base or options.get("pretrained_model_path")
    places = [folder / named for folder in (Path(), HERE)] if isinstance(named, str) else []
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{path} is an adapter, and its base model {shown(named)} is missing; name it with --pretrained-model-path"
        )
    if file_sha256(found) != options.get("base_sha256"):
        raise ValueError(
            f"{path} is an adapter of another model than {found}; name its base with --pretrained-model-path"
        )
    checkpoint = read_checkpoint(found)
    whole = {f"llama.{name}": tensor for name, tensor in checkpoint.complete_state(checkpoint.config).items()}
    own = {name if name.startswith("classifier_head.") else f"llama.{name}": tensor for name, tensor in state.items()}
    return whole | own


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(name, str) and name for name in value)


def write_checkpoint(
    path: str | PathLike[str], state: dict[str, Tensor], config: LlamaConfig, kind: str = "llama", **extra: Any
) -> None:
    """Writes {"model", "model_args", "format_version", "kind", ...} atomically. extra: more tensors or plain values."""
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    described = {"model_args": config.to_dict(), "format_version": FORMAT_VERSION, "kind": kind}
    files.write_torch(path, {"model": tensors, **described, **extra})


def write_safetensors(
    path: str | PathLike[str],
    state: dict[str, Tensor],
    config: LlamaConfig,
    dtype: torch.dtype | None = None,
    stop_ids: Sequence[int] = (),
) -> None:
    """Writes a whole `Llama` atomically, in `dtype`, without a tied output. stop_ids: see `Checkpoint`."""
    tensors = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in state.items()
        if not (config.tie_embeddings and name == "output.weight")
    }
    described = {"format_version": FORMAT_VERSION, "kind": "llama", "model_args": config.to_dict()}
    if stop_ids:
        described["stop_ids"] = list(stop_ids)
    files.write_safetensors_file(path, tensors, {"format": "pt", METADATA_KEY: json.dumps(described)})
