"""LoRA (arXiv 2106.09685): a frozen Linear plus a trainable update of low rank, W x + scaling * B A x.

scaling is alpha / rank; rank-stabilized (rsLoRA, arXiv 2312.03732) alpha / sqrt(rank), so that a high rank learns as
fast as a low one. DoRA (arXiv 2402.09353) trains the length of each row apart from its direction: with
V = W + scaling * B A and a trained magnitude m, which starts as the row norms ||W||, the weight is m V / ||V||.

B starts at zero, so a freshly wrapped model computes what it computed before. Weights change only by explicit verbs,
never as a side effect of train() or eval(): `merge_lora_weights` ends LoRA and leaves a standard model, with the keys
it had before it was wrapped; `merge_lora_reversibly` keeps the wrapped layers, and `unmerge_lora` undoes it. Works on
any module that holds `nn.Linear`s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_PROJECTIONS = ("compute_query", "compute_key", "compute_value", "compute_output")


class LoRALayer(nn.Module):
    """Wraps a Linear: (..., in) -> (..., out). `original_layer` is frozen, `lora_A` and `lora_B` are trained, and with
    `dora` `lora_magnitude` (out,), which else is None.

    Raises ValueError if rank or alpha are not above 0.
    """

    lora_magnitude: nn.Parameter | None

    def __init__(
        self, original_layer: nn.Linear, rank: int = 4, alpha: float = 1.0, rslora: bool = False, dora: bool = False
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank is {rank}; it must be 1 or more")
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"LoRA alpha is {alpha}; it must be above 0")
        weight = original_layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.original_layer = original_layer.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, original_layer.in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(original_layer.out_features, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude = nn.Parameter(self._row_norms()) if dora else None
        self._before_merge: dict[str, Tensor] | None = None  # the parameters, kept so that unmerging is exact

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weight at present."""
        return self._before_merge is not None

    def forward(self, x: Tensor) -> Tensor:
        base = self.original_layer(x)
        if self.merged:
            return base
        update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling
        if self.lora_magnitude is not None:  # as an addition to W x, so that half precision rounds only what is added
            gain = self.lora_magnitude / self._row_norms()
            bias = self.original_layer.bias
            update = gain * update + (gain - 1) * (base if bias is None else base - bias)
        return base + update.to(base.dtype)

    def _updated_weight(self, dtype: torch.dtype) -> Tensor:
        """V = W + scaling * B A (out, in), computed in `dtype`."""
        return self.original_layer.weight.to(dtype) + self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()  # DoRA takes the norm for a constant (section 4.3): it cheapens the gradient, and costs nothing
    def _row_norms(self) -> Tensor:
        """||V|| of each output (out,), float32 or wider even under autocast; never 0, to be divided by."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return row_norms(self._updated_weight(self.lora_A.dtype))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._before_merge = None  # what is loaded replaces the weight and the update both
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into the weight, in float64, cast once. Merging a merged layer does nothing.

        lora_B is zero meanwhile, and lora_magnitude the merged rows' norms, so that a state dict saved now stands for
        the same function wherever it is loaded.
        """
        if self.merged:
            return
        self._before_merge = {name: parameter.clone() for name, parameter in self.named_parameters()}
        weight = self._updated_weight(torch.float64)
        if self.lora_magnitude is not None:
            weight *= (self.lora_magnitude.double() / row_norms(weight))[:, None]
        self.original_layer.weight.copy_(weight)
        self.lora_B.zero_()
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(self._row_norms())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores weight and update as they were before `merge`, bit for bit. Does nothing to an unmerged layer."""
        for name, kept in (self._before_merge or {}).items():
            self.get_parameter(name).copy_(kept)
        self._before_merge = None


def row_norms(weight: Tensor) -> Tensor:
    """The 2-norm of each row, never 0."""
    return weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)


def apply_lora(
    model: nn.Module,
    rank: int = 4,
    alpha: float = 1.0,
    targets: Iterable[str] = ATTENTION_PROJECTIONS,
    keep_trainable: Iterable[str] = ("classifier_head",),
    rslora: bool = False,
    dora: bool = False,
) -> nn.Module:
    """Freezes `model` and wraps, in place, every Linear whose own name is among `targets`; returns the same model.

    keep_trainable: names of submodules that have no pretrained weight to keep and go on training beside the adapters.
    rslora, dora: see `LoRALayer`.

    Raises ValueError, naming the Linears there are, if a target matches nothing or is wrapped already.
    """
    targets, keep_trainable = tuple(targets), tuple(keep_trainable)
    if next(lora_layers(model), None) is not None:
        raise ValueError("the model has LoRA layers already; merge_lora_weights or remove_lora takes them off")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own_names = {name.rpartition(".")[2] for name, _ in linears}
    if missing := [target for target in targets if target not in own_names]:
        raise ValueError(f"no Linear is named {', '.join(missing)}; the model's are {', '.join(sorted(own_names))}")
    wrapped = {
        name: LoRALayer(linear, rank, alpha, rslora, dora)
        for name, linear in linears
        if name.rpartition(".")[2] in targets
    }
    for name, parameter in model.named_parameters():
        if not any(part in keep_trainable for part in name.split(".")):
            parameter.requires_grad_(False)
    put_modules(model, wrapped)
    return model


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts each module where its dotted name says, in the place of what is there."""
    for name, module in modules.items():
        parent, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(parent), own_name, module)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Every LoRA layer of `model`, with its dotted name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALayer))


def get_lora_optimizer_params(model: nn.Module) -> list[nn.Parameter]:
    """Every lora_A, lora_B and lora_magnitude of `model`, for an optimizer."""
    return [parameter for _, parameter in lora_parameters(model)]


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every lora_A, lora_B and lora_magnitude of `model`, with its dotted name."""
    for name, layer in lora_layers(model):
        for own_name, parameter in layer.named_parameters(recurse=False):
            yield f"{name}.{own_name}", parameter


def count_lora_parameters(model: nn.Module) -> tuple[int, int, float]:
    """(LoRA parameters, all parameters, the first as a percentage of the second); a tied weight counts once.

    All means all: the course's script divides by the trainable ones instead, which makes the share look large.
    """
    lora = sum(parameter.numel() for parameter in get_lora_optimizer_params(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    return lora, total, 100.0 * lora / total if total else 0.0


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Ends LoRA: replaces every LoRALayer, in place, by a plain Linear with the merged weight and the bias it had.
    Returns the same model, whose state dict has the plain keys and loads strictly into a model that was never wrapped;
    of a LoRALayer by itself, its Linear. What was frozen stays frozen.

    Raises ValueError, and changes nothing, if a weight to be changed is also another module's.
    """
    return remove_lora(merge_lora_reversibly(model))


def merge_lora_reversibly(model: nn.Module) -> nn.Module:
    """Folds every update into its weight (see `LoRALayer.merge`); the wrapped layers stay. Returns the same model.

    Raises ValueError, and changes nothing, if a weight to be changed is also another module's, as an output that is
    tied to the embedding is: both would change.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for _, layer in lora_layers(model):
        if len(names := owners[id(layer.original_layer.weight)]) > 1:
            raise ValueError(f"{' and '.join(names)} are one weight: merging would change both; untie them first")
    for _, layer in lora_layers(model):
        layer.merge()
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Undoes `merge_lora_reversibly`, bit for bit; returns the same model."""
    for _, layer in lora_layers(model):
        layer.unmerge()
    return model


def remove_lora(model: nn.Module) -> nn.Module:
    """Puts the wrapped Linears back in place, as they are, without an update that was not merged; returns the same
    model, or of a LoRALayer by itself its Linear. The state dict then has the plain model's keys again.
    """
    if isinstance(model, LoRALayer):
        return model.original_layer
    put_modules(model, {name: layer.original_layer for name, layer in lora_layers(model)})
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter alone: {"...compute_query.lora_A": (rank, in), "...lora_B": (out, rank), ...}, a copy; with DoRA
    "...lora_magnitude": (out,), too.

    Raises ValueError while the adapter is merged, for then B is zero.
    """
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError("the adapter is merged into the weights; call unmerge_lora before saving it")
    return {name: parameter.detach().clone() for name, parameter in lora_parameters(model)}


def load_lora_state_dict(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Sets the adapter of a wrapped model. Raises ValueError, before changing anything, unless names and shapes
    match.
    """
    own = dict(lora_parameters(model))
    if wrong := sorted(set(own) ^ set(adapter)):
        raise ValueError(
            f"the adapter does not fit the model: {wrong[0]} and {len(wrong) - 1} more names are in one only"
        )
    if wrong := [name for name in sorted(own) if own[name].shape != adapter[name].shape]:
        name = wrong[0]
        raise ValueError(
            f"{name} is {tuple(adapter[name].shape)}, the model's is {tuple(own[name].shape)}; another rank?"
        )
    unmerge_lora(model)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter[name])
