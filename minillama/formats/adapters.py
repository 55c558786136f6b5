"""LoRA adapters without their base model: ours, from the file of a fine-tuned model, and peft's folders.

peft names tensors after Hugging Face's layers and computes the same as lora.py, including rsLoRA and DoRA. In query and
key, the rows of B and the magnitudes are in split halves, like the rows of Hugging Face's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from config import LlamaConfig, parameter_shapes, shown
from lora import apply_lora, load_lora_state_dict, lora_layers, remove_lora, unmerge_lora
from minillama.environment import file_sha256
from minillama.formats import files
from minillama.formats.checkpoint import FineTuned, fits_float32, write_checkpoint
from minillama.formats.keys import renamed, rotary_heads, to_pairs, to_split_halves

PEFT_PREFIX = "base_model.model."
# Endings of an adapter's tensors: ours and peft's.
ENDINGS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}


@dataclass
class Adapter:
    """A LoRA adapter: tensors by our names, such as "layers.0.attention.compute_query.lora_A", and their scale."""

    state: dict[str, Tensor]
    rank: int
    alpha: float
    head: dict[str, Tensor]  # of a classifier trained with it
    rslora: bool = False
    pooling: str = "last_token"  # which state the head reads, as for --pooling

    def __post_init__(self) -> None:
        for name, tensor in self.state.items():
            fits = tensor.dim() == 2 and tensor.shape[0 if name.endswith("lora_A") else 1] == self.rank
            if not (tensor.dim() == 1 if name.endswith("lora_magnitude") else fits):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which does not fit rank {self.rank}")
            if not fits_float32(tensor):
                raise ValueError(f"{name} holds NaN or infinity; the adapter is damaged")

    @property
    def dora(self) -> bool:
        """Whether the adapter has trained magnitudes."""
        return any(name.endswith("lora_magnitude") for name in self.state)

    def apply(self, model: nn.Module) -> None:
        """Replaces the adapter but no base Linear. Raises ValueError, and keeps the old one, if it does not fit."""
        before = dict(lora_layers(unmerge_lora(model)))
        targets = sorted({name.split(".")[-2] for name in self.state})
        try:
            apply_lora(remove_lora(model), self.rank, self.alpha, targets, (), rslora=self.rslora, dora=self.dora)
            load_lora_state_dict(model, self.state)
        except ValueError:
            remove_lora(model)
            for name, layer in before.items():
                model.set_submodule(name, layer)
            raise


def read_adapter(path: Path, config: LlamaConfig) -> Adapter:
    """The adapter in a peft folder or a file of `--option lora`. Raises FileNotFoundError or ValueError."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter; --adapter takes a peft folder, or a file of --option lora")
    if path.is_dir():
        return _read_peft(path, config)
    content = files.read_torch(path)
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is not a file of --option lora; --adapter takes one, or a peft folder")
    return adapter_of(path, files.weights_of(path, content["model"]), options)


def adapter_of(path: Path, state: dict[str, Tensor], options: dict[str, Any]) -> Adapter:
    """The adapter in the tensors of a file of `--option lora`. Raises ValueError if the options describe none."""
    adapter = {name.removeprefix("llama."): t for name, t in state.items() if name.rpartition(".")[2] in ENDINGS}
    rank, alpha, rslora = options.get("lora_rank"), options.get("lora_alpha"), options.get("rslora", False)
    if not adapter or type(rank) is not int or not _is_alpha(alpha) or type(rslora) is not bool:
        raise ValueError(f"{path} holds a model without LoRA; --adapter takes a file of --option lora")
    head = {name: tensor for name, tensor in state.items() if name.startswith("classifier_head.")}
    return Adapter(adapter, rank, float(alpha), head, rslora, str(options.get("pooling", "last_token")))


def write_adapter(
    path: str | PathLike[str],
    adapter: Adapter,
    config: LlamaConfig,
    base: str | None = None,
    classifier: FineTuned | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes adapter, classifier head and settings as a file of `--option lora` without the base model.

    classifier: the one that has the adapter; then the file can be read as a classifier while `base`, its base model, is
    there. dtype: of the tensors (default: as they are).
    """
    options = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha, "rslora": adapter.rslora, "dora": adapter.dora}
    described: dict[str, Any] = {}
    if classifier is not None:
        described = {name: getattr(classifier, name) for name in ("head", "label_names", "labels")}
        place = {"pretrained_model_path": base, "base_sha256": None if base is None else file_sha256(base)}
        options = classifier.options | options | place
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in (adapter.state | adapter.head).items()}
    write_checkpoint(path, tensors, config, kind="adapter", options=options, **described)


def _is_alpha(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and 0 < value < 1e30  # type: ignore[operator]


# Settings that adapter_config.json must not turn on.
PEFT_OFF = (
    *("fan_in_fan_out", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    *("trainable_token_indices", "layer_replication", "alora_invocation_tokens", "target_parameters"),
)
PEFT_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None, True),
    "use_rslora": (False, None, True),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base model
    **dict.fromkeys(PEFT_OFF, (None, False, [], {})),
}


def _read_peft(folder: Path, config: LlamaConfig) -> Adapter:
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (path, weights):
        if not needed.is_file():
            raise FileNotFoundError(f"{folder} has no {needed.name}; --adapter takes a folder that peft saved")
    settings = files.read_json(path)
    for name, allowed in PEFT_ALLOWED.items():
        if (value := settings.get(name, allowed[0] if name != "peft_type" else None)) not in allowed:
            raise ValueError(f"{path}: {name} is {shown(value)}; this program applies {shown(allowed[0])} only")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not _is_alpha(alpha):
        raise ValueError(f"{path}: r is {shown(rank)} and lora_alpha {shown(alpha)}; both must be numbers above 0")
    state = {}
    theirs = files.weights_of(weights, files.read_safetensors(weights))
    ours = renamed([_without_peft_affixes(name, weights) for name in theirs], "huggingface", "ours")
    matrices = {name.removesuffix(".weight") for name, shape in parameter_shapes(config).items() if len(shape) == 2}
    layers = matrices - {"tok_embeddings"}
    for (name, tensor), target in zip(theirs.items(), ours.values(), strict=True):
        layer, _, ending = target.rpartition(".")
        if layer not in layers:
            raise ValueError(f"{weights} holds {shown(name)}, which is not a LoRA matrix of a Llama of this size")
        if layer == "output" and config.tie_embeddings:
            raise ValueError(f"{weights} changes the output, which this model ties to the embedding; untie the base")
        heads = rotary_heads(f"{layer}.", config)
        if heads is not None and ending != "lora_A":
            rows = tensor.shape[0] if tensor.dim() else 0
            if rows != heads * config.head_dim:
                raise ValueError(f"{weights}: {name} has {rows} rows, the model {heads * config.head_dim}")
            tensor = to_pairs(tensor, heads)
        state[target] = tensor
    adapter = Adapter(state, rank, float(alpha), {}, bool(settings.get("use_rslora")))
    if adapter.dora != bool(settings.get("use_dora")):
        found = "has" if adapter.dora else "has no"
        raise ValueError(f"{path}: use_dora is {settings.get('use_dora')}, but {weights.name} {found} magnitudes")
    return adapter


def _without_peft_affixes(name: str, weights: Path) -> str:
    """Renames peft's "base_model.model.LAYER.lora_A.weight" to "LAYER.lora_A"."""
    for ours, theirs in ENDINGS.items():
        if name.startswith(PEFT_PREFIX) and name.endswith(f".{theirs}"):
            return name.removeprefix(PEFT_PREFIX).removesuffix(theirs) + ours
    raise ValueError(f"{weights} holds {shown(name)}; an adapter's tensors are named {PEFT_PREFIX}...lora_A.weight")


def write_peft(folder: Path, adapter: Adapter, config: LlamaConfig, base: str) -> None:
    """Writes a peft folder for a Hugging Face base. A classifier head goes into a separate file, which peft ignores."""
    tensors = {}
    names = renamed(adapter.state, "ours", "huggingface")
    for name, tensor in adapter.state.items():
        layer, _, ending = names[name].rpartition(".")
        heads = rotary_heads(name, config) if ending != "lora_A" else None
        tensors[f"{PEFT_PREFIX}{layer}.{ENDINGS[ending]}"] = to_split_halves(tensor, heads) if heads else tensor
    targets = sorted({name.split(".")[-2] for name in names.values()})
    files.write_safetensors_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    if adapter.head:
        metadata = {"format": "pt", "pooling": adapter.pooling}
        files.write_safetensors_file(folder / "classifier_head.safetensors", adapter.head, metadata)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    files.write_json(folder / "adapter_config.json", settings)
