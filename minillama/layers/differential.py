"""Differential attention (arXiv 2410.05258): a head weighs its values by the difference of two softmaxes,

    (softmax(Q1 K1^T / sqrt(hd)) - l softmax(Q2 K2^T / sqrt(hd))) V,   l = exp(lq1 . lk1) - exp(lq2 . lk2) + l0,

so that noise that both maps see cancels; then RMSNorm within each head, times 1 - l0, l0 = 0.8 - 0.6 exp(-0.3 depth).

Two query heads of the config make one head here, and two key/value heads one key/value head whose values are twice as
wide, so the projections keep their sizes. Of the H query heads the first half are Q1 and the second half Q2; likewise
the keys. The vectors of l belong to the layer; all its heads share them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import LlamaConfig
from minillama.layers.precision import at_least_float32

# The paper says nothing of the norm's first gain, and its program has 1. The norm lifts the flat mean over the context,
# all that attention gives at first, to full size, and a small model's embeddings drown in it (docs/results.md).
FIRST_GAIN = 0.1


class HeadNorm(nn.Module):
    """RMSNorm within each head: (..., 2 hd) -> (..., 2 hd)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.full((width,), FIRST_GAIN))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


def add_differential_parameters(attention: Any, config: LlamaConfig, depth: int) -> None:
    """Gives an `Attention` the four vectors of l, N(0, 0.1), and its norm. depth: the number of the layer, from 0."""
    attention.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        setattr(attention, name, nn.Parameter(nn.init.normal_(torch.empty(config.head_dim), std=0.1)))
    attention.head_norm = HeadNorm(2 * config.head_dim)


def share_values(value: Tensor) -> Tensor:
    """(B, K / 2, S, 2 hd) -> (B, K, S, 2 hd): both maps weigh the same values."""
    return value.repeat(1, 2, 1, 1)


def subtract_maps(attention: Any, mixed: Tensor) -> Tensor:
    """Both maps' weighted values (B, H, T, 2 hd) -> the heads (B, H / 2, T, 2 hd)."""
    first, second = mixed.chunk(2, dim=1)
    return (1 - attention.lambda_init) * attention.head_norm(first - balance(attention) * second)


def balance(attention: Any) -> Tensor:
    """l, the share of the second softmax that is subtracted from the first: a number."""
    vectors = (attention.lambda_q1, attention.lambda_k1, attention.lambda_q2, attention.lambda_k2)
    q1, k1, q2, k2 = map(at_least_float32, vectors)
    return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + attention.lambda_init
