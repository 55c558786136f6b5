"""AdamW (arXiv 1711.05101, Algorithm 2) as the course states it; Muon (arXiv 2502.16982); parameter groups.

Convention: the gradient step comes first, then the weight decay p -= lr * weight_decay * p. torch.optim.AdamW decays
first. It also adds eps to sqrt(v / (1 - b2^t)); here eps is added to sqrt(v), and the bias correction is in the step
size, as in the efficient variant of Adam (arXiv 1412.6980, end of section 2).

`one_by_one` is the readable form of AdamW. `in_one_pass` computes the same with one kernel for all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    params: parameters, or groups with their own settings. correct_bias: compensate for moving averages that start at
    zero. max_grad_norm: clip each group's gradients to this global 2-norm before the step. fused: use `in_one_pass`
    instead of `one_by_one`. Raises ValueError for a setting out of range, RuntimeError for a sparse gradient.
    """

    fused = True  # a class attribute too: torch drops instance attributes when it copies or pickles an optimizer

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        max_grad_norm: float | None = None,
        fused: bool = True,
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
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults | dict(correct_bias=correct_bias, max_grad_norm=max_grad_norm))
        self.fused = fused

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient; returns what the closure returns."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in parameters):
                raise RuntimeError("AdamW does not support sparse gradients; use torch.optim.SparseAdam")
            if group["max_grad_norm"] is not None:
                torch.nn.utils.clip_grad_norm_(parameters, group["max_grad_norm"])
            self.update(parameters, group)
        return loss

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Updates the parameters of a group, all with gradients."""
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
        (in_one_pass if self.fused else one_by_one)(parameters, self.state, group)


def one_by_one(parameters: list[nn.Parameter], states: dict[Tensor, Any], group: dict[str, Any]) -> None:
    """The update, parameter by parameter."""
    beta1, beta2 = group["betas"]
    for p in parameters:
        assert p.grad is not None
        m, v, t = (states[p][name] for name in ("exp_avg", "exp_avg_sq", "step"))
        m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)

        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
        p.mul_(1 - group["lr"] * group["weight_decay"])  # after the gradient step


def in_one_pass(parameters: list[nn.Parameter], states: dict[Tensor, Any], group: dict[str, Any]) -> None:
    """The update of `one_by_one` by torch's fused AdamW kernel, with arguments that make its formula ours.

    The kernel computes p * (1 - lr' wd') - lr' / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps'). With
    keep = 1 - lr wd, that is our formula for lr' = lr keep, wd' = wd / keep and eps' = eps / sqrt(1 - b2^t). An
    infinite t turns bias correction off.
    """
    beta1, beta2 = group["betas"]
    keep = 1 - group["lr"] * group["weight_decay"]
    same_layout = all(p.grad.stride() == p.stride() for p in parameters if p.grad is not None)
    if not keep > 0 or not same_layout:  # the kernel reads all tensors in memory order
        return one_by_one(parameters, states, group)
    # One call needs one dtype, one device and one eps, which depends on the step.
    groups: dict[tuple[int, torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((states[p]["step"], p.dtype, p.device), []).append(p)
    for (step, _, device), members in groups.items():
        t = step if group["correct_bias"] else math.inf
        torch._fused_adamw_(
            [local(p) for p in members],
            [local(p.grad) for p in members],
            [local(states[p]["exp_avg"]) for p in members],
            [local(states[p]["exp_avg_sq"]) for p in members],
            [],
            [torch.full((), float(t), device=device)] * len(members),  # a copy from the CPU would wait for a GPU
            lr=group["lr"] * keep,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"] / keep,
            eps=group["eps"] / math.sqrt(1 - beta2**t),
            amsgrad=False,
            maximize=False,
        )


class Muon(AdamW):
    """Muon (arXiv 2502.16982, Algorithm 1 with section 2.2) for groups with `hidden`; AdamW for the other groups.

    A hidden matrix W (m, n) has a momentum M = momentum * M + G and moves by lr * 0.2 sqrt(max(m, n)) * O, where O is
    `orthogonalized` (momentum * M + G), Nesterov's form. With the factor, the step is as large as AdamW's usually is,
    so both take the same learning rates. dtype: of the products that make O; the paper uses bfloat16.
    """

    def __init__(
        self, params: Iterable[Any], momentum: float = 0.95, dtype: torch.dtype = torch.float32, **more: Any
    ) -> None:
        super().__init__(params, **more)
        self.momentum, self.dtype = momentum, dtype

    def update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        if not group.get("hidden"):
            return super().update(parameters, group)
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in parameters:
            shapes.setdefault(tuple(p.shape), []).append(p)
        for shape, members in shapes.items():
            directions = []
            for p in members:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].mul_(self.momentum).add_(p.grad)
                directions.append(whole(p.grad + self.momentum * state["momentum"]))
            steps = orthogonalized(torch.stack(directions).to(self.dtype))  # matrices of one shape go together
            size = group["lr"] * 0.2 * math.sqrt(max(shape))
            for p, step in zip(members, steps, strict=True):
                p.sub_(like(step.to(p.dtype), p), alpha=size)
                p.mul_(1 - group["lr"] * group["weight_decay"])


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly: (..., m, n) -> (..., m, n), in the dtype of the input.

    For U S V^T it is U f(S / |S|) V^T, where f applies 3.4445 s - 4.7750 s^3 + 2.0315 s^5 `steps` times. These
    Newton-Schulz steps bring singular values near 1, most between 0.7 and 1.2, and need only matrix products.
    """
    x = (matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices).contiguous()  # the smaller square below
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7).to(x.dtype)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def whole(tensor: Any) -> Tensor:
    """All of a sharded tensor, which every process then holds; any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, p: Any) -> Tensor:
    """A tensor that every process holds, sharded as `p` is."""
    if not hasattr(p, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


def local(tensor: Any) -> Tensor:
    """The local shard of a sharded tensor, enough for an elementwise update; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    lr_multiplier: Callable[[str], float] = lambda name: 1.0,
    hidden: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: matrices with weight decay, vectors (biases, weights of norms) without.

    Frozen parameters are left out. lr_multiplier(name): the factor of a parameter's learning rate. hidden: put the
    matrices of the layers in groups of their own, for `Muon`.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, p in named_parameters:
        if p.requires_grad:
            is_hidden = hidden and p.dim() == 2 and "layers" in name.split(".")
            groups.setdefault((p.dim() < 2, lr_multiplier(name), is_hidden), []).append(p)
    return [
        {"params": params, "weight_decay": 0.0 if is_vector else weight_decay, "lr_multiplier": multiplier}
        | ({"hidden": True} if is_hidden else {})
        for (is_vector, multiplier, is_hidden), params in sorted(groups.items(), key=lambda group: group[0][0])
    ]


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every group: lr times the multiplier of the group, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_multiplier", 1.0)
