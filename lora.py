"""LoRA (arXiv 2106.09685): a frozen Linear plus a trainable update of low rank, W x + scaling * B A x.

scaling is alpha / rank. In rsLoRA (rank-stabilized, arXiv 2312.03732) it is alpha / sqrt(rank), so that a high rank
learns as fast as a low one. DoRA (arXiv 2402.09353) trains the norm of each row separately from its direction. Its
weight is m V / ||V||, with V = W + scaling * B A and a trained magnitude m, initially the row norms ||W||.

B starts at zero, so a newly wrapped model computes the same as before. Weights change only by explicit calls, never by
train() or eval(). `merge_lora_weights` ends LoRA and restores a standard model with the original keys.
`merge_lora_reversibly` keeps the wrapped layers, and `unmerge_lora` undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_PROJECTIONS = ("compute_query", "compute_key", "compute_value", "compute_output")


class LoRALayer(nn.Module):
    """A wrapped Linear: (..., in) -> (..., out). `original_layer` is frozen; `lora_A`, `lora_B` and with `dora` also
    `lora_magnitude` (out,) are trained. Raises ValueError unless rank and alpha are above 0.
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
        self._before_merge: dict[str, Tensor] | None = None  # copies of the parameters, for an exact unmerge

    @property
    def merged(self) -> bool:
        """Whether the weight contains the update."""
        return self._before_merge is not None

    def forward(self, x: Tensor) -> Tensor:
        base = self.original_layer(x)
        if self.merged:
            return base
        update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scaling
        if self.lora_magnitude is not None:  # in a form in which half precision rounds only the last addition
            gain = self.lora_magnitude / self._row_norms()
            bias = self.original_layer.bias
            update = gain * update + (gain - 1) * (base if bias is None else base - bias)
        return base + update.to(base.dtype)

    def _updated_weight(self, dtype: torch.dtype) -> Tensor:
        """V = W + scaling * B A (out, in), computed in `dtype`."""
        return self.original_layer.weight.to(dtype) + self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()  # DoRA treats the norm as a constant, for a cheaper gradient (section 4.3)
    def _row_norms(self) -> Tensor:
        """||V|| of each output (out,), never 0; in float32 or wider, even under autocast."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return row_norms(self._updated_weight(self.lora_A.dtype))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._before_merge = None  # the loaded values replace weight and update
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the weight, computed in float64. Merging a merged layer does nothing.

        Until `unmerge`, lora_B is zero and lora_magnitude holds the norms of the merged rows. So the state dict of a
        merged layer computes the same after loading.
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
        """Restores weight and update from before `merge`, bit for bit. Does nothing to an unmerged layer."""
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
    """Freezes `model` and wraps, in place, every Linear whose last name is in `targets`; returns the same model.

    keep_trainable: names of submodules without pretrained weights, trained together with the adapters. Raises
    ValueError, with the names of all Linears, if a target matches none, or if the model is already wrapped.
    """
    targets, keep_trainable = tuple(targets), tuple(keep_trainable)
    if next(lora_layers(model), None) is not None:
        raise ValueError("the model already has LoRA layers; remove them with merge_lora_weights or remove_lora")
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
    for name, layer in wrapped.items():
        model.set_submodule(name, layer)
    return model


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
    """(LoRA parameters, all parameters, percentage); a tied weight counts once.

    The course's script divides by the number of trainable parameters instead, so its percentage is larger.
    """
    lora = sum(parameter.numel() for parameter in get_lora_optimizer_params(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    return lora, total, 100.0 * lora / total if total else 0.0


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Ends LoRA: replaces every LoRALayer, in place, by a plain Linear with the merged weight.

    Returns the same model, or the Linear if `model` is itself a LoRALayer. The state dict loads strictly into a model
    that was never wrapped. Frozen parameters stay frozen. Raises ValueError as `merge_lora_reversibly` does.
    """
    return remove_lora(merge_lora_reversibly(model))


def merge_lora_reversibly(model: nn.Module) -> nn.Module:
    """Merges every update into its weight (`LoRALayer.merge`) and keeps the wrapped layers. Returns the same model.

    Raises ValueError, and changes nothing, if another module shares such a weight, for example a tied embedding.
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
    """Replaces every LoRALayer by its Linear and drops unmerged updates; returns what `merge_lora_weights` does."""
    if isinstance(model, LoRALayer):
        return model.original_layer
    for name, layer in list(lora_layers(model)):
        model.set_submodule(name, layer.original_layer)
    return model


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter: {"...lora_A": (rank, in), "...lora_B": (out, rank)}, for DoRA also "...lora_magnitude".

    Raises ValueError while the adapter is merged, because B is then zero.
    """
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError("the adapter is merged into the weights; call unmerge_lora before saving it")
    return {name: parameter.detach().clone() for name, parameter in lora_parameters(model)}


def load_lora_state_dict(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Sets the adapter of a wrapped model. Raises ValueError, and changes nothing, unless names and shapes match."""
    own = dict(lora_parameters(model))
    if wrong := sorted(set(own) ^ set(adapter)):
        raise ValueError(f"the adapter does not fit the model: {len(wrong)} names differ, such as {wrong[0]}")
    for name in sorted(own):
        theirs, ours = tuple(adapter[name].shape), tuple(own[name].shape)
        if theirs != ours:
            raise ValueError(f"{name} has shape {theirs}, but {ours} in the model; do their ranks differ?")
    unmerge_lora(model)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(adapter[name])
