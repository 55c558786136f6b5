"""The cross-entropy of tokens, computed without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minillama.layers.precision import at_least_float32, downcast_under_autocast

# Tokens whose logits are in memory at once: few enough for the processor's cache, or enough to fill a GPU.
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 2048}


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the logits hidden W^T: hidden (B, T, D), W (V, D), targets (B, T) -> losses and hits (B, T).

    losses: in nats, at least float32. hits: bool, True where no logit is larger than the target's. A negative target is
    ignored: its loss is 0 and its hit False. The logits are computed once more for the gradient.
    """
    losses, hits = TokenLosses.apply(hidden.flatten(0, 1), weight, targets.flatten())
    return losses.view_as(targets), hits.view_as(targets)


class TokenLosses(torch.autograd.Function):
    """The function behind `token_losses`, for hidden (N, D) and targets (N,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = downcast_under_autocast(hidden), downcast_under_autocast(weight)
        losses = torch.empty_like(targets, dtype=torch.promote_types(hidden.dtype, torch.float32))  # (N,)
        hits = torch.empty_like(targets, dtype=torch.bool)
        for piece in pieces(targets):
            logits = at_least_float32(hidden[piece] @ weight.T)  # (n, V)
            of_target = logits.gather(1, targets[piece, None].clamp(min=0))[:, 0]
            largest = logits.amax(-1)
            losses[piece] = logits.sub_(largest[:, None]).exp_().sum(-1).log_() + largest - of_target
            hits[piece] = of_target == largest
        ctx.save_for_backward(hidden, weight, targets, losses)
        ctx.mark_non_differentiable(hits)
        counts = targets >= 0
        return torch.where(counts, losses, 0.0), hits & counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a loss by the logits is their softmax, minus 1 at the target."""
        hidden, weight, targets, losses = ctx.saved_tensors
        of_losses = torch.where(targets >= 0, of_losses, 0.0)[:, None]  # (N, 1)
        at_target = torch.expm1(-losses).to(hidden.dtype)  # the target's probability minus 1
        of_hidden = torch.empty_like(hidden, dtype=ctx.dtypes[0])
        of_weight = torch.zeros_like(weight, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        for piece in pieces(targets):
            of_logits = (hidden[piece] @ weight.T).softmax(-1)  # (n, V)
            of_logits.scatter_(1, targets[piece, None].clamp(min=0), at_target[piece, None])
            of_hidden[piece] = (of_logits @ weight) * of_losses[piece]
            if of_weight is not None:
                of_weight += of_logits.T @ (hidden[piece] * of_losses[piece]).to(weight.dtype)
        return of_hidden, of_weight, None


def pieces(targets: Tensor) -> Iterator[slice]:
    """Slices of the tokens whose logits are computed at once."""
    at_once = TOKENS_AT_ONCE["cpu" if targets.device.type == "cpu" else "cuda"]
    for start in range(0, len(targets), at_once):
        yield slice(start, start + at_once)
