"""Settings of training that do not depend on the task, the learning rate of each step, and the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from optimizer import AdamW, Muon, decay_groups


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

    lr: float
    dtype: torch.dtype = torch.float32  # of the matrix products; the weights themselves stay float32
    betas: tuple[float, float] = (0.9, 0.999)
    micro_batch_size: int | None = None  # most rows of a batch computed at once; gradients are accumulated
    optimizer: str = "adamw"  # or "muon"
    schedule: str = "constant"  # or "cosine", "linear"
    decay_share: float = 1.0  # of the steps, in which "linear" falls
    warmup_steps: int = 0
    min_lr: float = 0.0
    lora_plus: float = 1.0  # factor of the learning rate of every lora_B
    layer_decay: float = 1.0  # factor of the learning rate from each layer to the one below
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    patience: int | None = None  # stop after this many epochs without a better score
    save_every: int = 500  # steps; the end of an epoch is always saved

    def lr_multiplier(self, name: str, layers: int) -> float:
        """The factor of the learning rate of a parameter in a model of so many layers.

        With a `layer_decay` of d it is d in the last layer, d^2 in the one below, and so on, down to the embedding.
        Norm and head above the layers have 1. (Discriminative fine-tuning, arXiv 1801.06146, section 3.2.)
        """
        number = layer_number(name)
        below = layers - number if number is not None else (layers + 1) * ("tok_embeddings" in name)
        return self.layer_decay**below * (self.lora_plus if name.endswith(".lora_B") else 1.0)

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0 to steps - 1."""
        how = (self.schedule, self.warmup_steps, self.min_lr, self.decay_share)
        return learning_rate(step, steps, self.lr, *how)


def layer_number(name: str) -> int | None:
    """The number of the layer that has the parameter of this name; None for others."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def learning_rate(
    step: int,
    total_steps: int,
    peak: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    minimum: float = 0.0,
    decay_share: float = 1.0,
) -> float:
    """The learning rate of a step from 0 to total_steps - 1: linear warm-up, then "constant", "cosine" or "linear".

    "cosine" falls from `peak` to `minimum` at total_steps. "linear" does so along a line, in the last `decay_share` of
    the steps, and never before the warm-up ends. With a share below 1 it is warmup-stable-decay (arXiv 2404.06395).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    begin = max(warmup_steps, (1 - decay_share) * total_steps) if schedule == "linear" else warmup_steps
    progress = min(1.0, max(0.0, step - begin) / max(1, total_steps - begin))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * left


def make_optimizer(model: nn.Module, settings: Settings) -> AdamW:
    """The optimizer of the parameters that require gradients."""
    muon = settings.optimizer == "muon"
    named = list(model.named_parameters())
    layers = 1 + max((number for number in map(layer_number, dict(named)) if number is not None), default=-1)
    groups = decay_groups(named, settings.weight_decay, lambda name: settings.lr_multiplier(name, layers), hidden=muon)
    if not muon:
        return AdamW(groups, lr=settings.lr, betas=settings.betas)
    half = settings.dtype == torch.bfloat16  # fp16 has too small a range for it
    return Muon(groups, dtype=torch.bfloat16 if half else torch.float32, lr=settings.lr, betas=settings.betas)
