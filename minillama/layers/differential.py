"""Differential attention (arXiv 2410.05258): a head weights its values by the difference of two softmaxes,

    (softmax(Q1 K1^T / sqrt(hd)) - l softmax(Q2 K2^T / sqrt(hd))) V,   l = exp(lq1 . lk1) - exp(lq2 . lk2) + l0,

so that noise common to both maps cancels. Each head's result passes through RMSNorm and is multiplied by 1 - l0, where
l0 = 0.8 - 0.6 exp(-0.3 depth).

The projections keep their sizes: two query heads of the config form one head, and two key/value heads form one with
values twice as wide. The first half of the H query heads are Q1, the second half Q2; likewise the keys. All heads of a
layer share the vectors of l.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from config import LlamaConfig
from minillama.layers.precision import at_least_float32

# The initial gain of the norm; the authors' is 1. Untrained attention is a flat mean over the context, and the norm
# scales it to full size. With a gain of 1 it drowns out a small model's embeddings (docs/results.md).
FIRST_GAIN = 0.1
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


def add_differential_parameters(attention: Any, head_norm: Any, config: LlamaConfig, depth: int) -> None:
    """Adds the four vectors of l and the heads' norm to an `Attention`. depth: layer index from 0."""
    attention.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
    for name in LAMBDAS:
        setattr(attention, name, nn.Parameter(torch.empty(config.head_dim)))
    attention.head_norm = head_norm
    reset_differential_parameters(attention)


def reset_differential_parameters(attention: Any) -> None:
    """Draws the vectors of l from N(0, 0.1), and sets the gain of the heads' norm."""
    for name in LAMBDAS:
        nn.init.normal_(getattr(attention, name), std=0.1)
    nn.init.constant_(attention.head_norm.weight, FIRST_GAIN)


def share_values(value: Tensor) -> Tensor:
    """(B, K / 2, S, 2 hd) -> (B, K, S, 2 hd): both maps weight the same values."""
    return value.repeat(1, 2, 1, 1)


def subtract_maps(attention: Any, mixed: Tensor) -> Tensor:
    """Both maps' weighted values (B, H, T, 2 hd) -> the heads (B, H / 2, T, 2 hd)."""
    first, second = mixed.chunk(2, dim=1)
    return (1 - attention.lambda_init) * attention.head_norm(first - balance(attention) * second)


def balance(attention: Any) -> Tensor:
    """l, the share of the second softmax that is subtracted from the first: a number."""
    q1, k1, q2, k2 = (at_least_float32(getattr(attention, name)) for name in LAMBDAS)
    return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + attention.lambda_init
