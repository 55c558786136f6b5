"""Regularizers for fine-tuning, which keep the prediction for a row stable.

Each is a symmetric KL divergence between the class distributions of two passes:
    SMART (arXiv 1911.03437, section 3.1)    at the embeddings x, and at the worst x~ with |x~ - x|_inf <= eps
    Bregman (the same paper, section 3.2)    of the model, and of a moving average of its weights
    R-Drop (arXiv 2106.14448)                under two dropout masks (in classification.py)
A row's value does not depend on other rows. SMART and Bregman use the same dropout mask in both passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) = sum of (p - q) (log p - log q): twice (B, classes) -> (B,)."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum of p (log p - log q): twice (B, classes) -> (B,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Smart:
    """SMART's smoothness penalty: `weight` times the divergence at the worst nearby embeddings.

    One step of gradient ascent finds them. (For two classes and quadratic KL it is exact, else approximate.) The
    published step is step * gradient, which vanishes with the noise. Here the gradient is divided by its largest entry
    in the row, so that the constants do not depend on the model's scale or the batch size.

    The published eps, step and noise are 1e-5, 1e-3 and 1e-5. An eps of 1e-5 has no effect on embeddings with a
    standard deviation of 0.07 (docs/results.md), so our default is larger.

    form "program" is that of the authors' program (namisan/mt-dnn, perturbation.py and loss.py), which differs from the
    paper. Since cceaa00 of August 2020 the move is noise + step * gradient, scaled in each token so that its largest
    entry is 1; here it is eps. With the published step and noise, the noise decides the direction, because the
    gradient vanishes with it. Both divergences of the symmetric KL take the other distribution as a constant, so their
    gradient is another one. (Before cceaa00 the gradient alone was scaled, to the step: 1e-3.)
    """

    weight: float
    eps: float = 1e-3
    step: float = 0.1  # a hundred times eps: four of five entries reach the limit
    noise: float = 1e-3  # standard deviation of the start of the ascent
    form: str = "paper"  # or "program"

    def penalty(self, model: nn.Module, shape: torch.Size, again: Callable[[], Tensor], log_probs: Tensor) -> Tensor:
        """weight * divergence (B,). shape: (B, T) of the ids. again(): another pass of the model over the same rows.

        log_probs and again() need at least float32: rounding in half precision exceeds the perturbation.
        """
        embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        weight = embedding.weight
        noise = self.noise * torch.randn(*shape, embedding.embedding_dim, dtype=weight.dtype, device=weight.device)
        noise.requires_grad_()
        with shifted(embedding, noise):
            found = symmetric_kl(again(), log_probs.detach()).sum()
        (ascent,) = torch.autograd.grad(found, noise)
        if self.form == "paper":
            worst = (noise + self.step * scaled(ascent, (1, 2))).clamp(-self.eps, self.eps).detach()
        else:
            worst = self.eps * scaled(noise + self.step * ascent, (2,)).detach()
        with shifted(embedding, worst):
            there = again()
        if self.form == "paper":
            return self.weight * symmetric_kl(there, log_probs)
        return self.weight * (kl(there.detach(), log_probs) + kl(log_probs.detach(), there))


def scaled(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x, divided by its largest absolute entry over the axes."""
    return x / x.abs().amax(axes, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@contextmanager
def shifted(embedding: nn.Embedding, by: Tensor) -> Iterator[None]:
    """A context in which `by` is added to the embedding's output (B, T, D)."""
    hook = embedding.register_forward_hook(lambda module, inputs, output: output + by)
    try:
        yield
    finally:
        hook.remove()


class MovingAverage:
    """A moving average of a model's trained weights, and the Bregman penalty, which keeps the model near it.

    The average starts at the initial weights; each step makes it beta * average + (1 - beta) * weights. beta None: as
    published, 0.99 in the first tenth of the steps, then 0.999.
    """

    def __init__(self, weight: float, beta: float | None = None) -> None:
        self.weight, self.beta = weight, beta

    def start(self, model: nn.Module) -> None:
        """Copies `model`; frozen weights are shared."""
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, frozen)
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, steps: int) -> None:
        """Updates the average after optimizer step `step`, from 1 to `steps`."""
        beta = self.beta if self.beta is not None else 0.99 if step <= 0.1 * steps else 0.999
        weights = dict(model.named_parameters())
        for name, average in self.state().items():
            average.lerp_(weights[name], 1 - beta)

    def state(self) -> dict[str, Tensor]:
        """The averages, by the names of the weights."""
        return {name: self.model.get_parameter(name).detach() for name in self.trained}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, average in self.state().items():
            average.copy_(state[name])

    def penalty(self, model: nn.Module, run: Callable[[nn.Module], Tensor], log_probs: Tensor) -> Tensor:
        """weight * divergence (B,). run(model): a pass of that model over the rows."""
        self.model.train(model.training)
        with torch.no_grad():
            average = run(self.model)
        return self.weight * symmetric_kl(average, log_probs)


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the random generators for a pass on this device."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def replayed(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """A context in which random draws repeat from `state`; afterwards the generators continue as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
