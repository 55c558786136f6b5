"""AdamW (arXiv 1711.05101, Algorithm 2), as the course states it.

Convention: the gradient step comes first, then the weight decay p -= lr * weight_decay * p, with the learning rate in
it. torch.optim.AdamW decays first; and it adds eps to sqrt(v / (1 - b2^t)), where here eps is added to sqrt(v) and
the bias correction stands in the step size, as in the efficient variant of Adam (arXiv 1412.6980, end of section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    params: parameters, or groups of them, each group with settings of its own. correct_bias: undo the bias of the
    moving averages towards their start at zero. max_grad_norm: before the step, scale a group's gradients down to
    this global 2-norm; None leaves them alone.

    Raises ValueError for a setting out of its range, RuntimeError for a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        if not 0.0 <= lr < math.inf:
            raise ValueError(f"learning rate is {lr}; it must be 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas are {betas}; each must be in [0, 1)")
        if not eps >= 0.0:
            raise ValueError(f"eps is {eps}; it must be 0 or more")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight decay is {weight_decay}; it must be 0 or more")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}; it must be above 0, or None")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in parameters):
                raise RuntimeError("AdamW does not support sparse gradients; use torch.optim.SparseAdam")
            if group["max_grad_norm"] is not None:
                torch.nn.utils.clip_grad_norm_(parameters, group["max_grad_norm"])
            beta1, beta2 = group["betas"]
            for p in parameters:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)

                step_size = group["lr"]
                if group["correct_bias"]:
                    step_size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
                p.mul_(1 - group["lr"] * group["weight_decay"])  # after the gradient step
        return loss
