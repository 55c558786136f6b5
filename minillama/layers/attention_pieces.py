"""Attention as matrix products over a few rows and query positions at a time, with its gradient. Shapes as in llama.py.

The scores of a piece fit into the processor's cache. Causal attention skips the keys after the last query of a piece.
The query heads of a group are rows of one product, so keys and values are not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES_AT_ONCE = 128
SCORES_AT_ONCE = 1 << 21  # 4 MB in half precision


def attention_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Attention: query (B, H, T, hd), key (B, K, S, hd), value (B, K, S, vd) -> (B, H, T, vd).

    mask: (B or 1, H or 1, T, S); bool, True = attend, or float, added to the scores. causal: whether attention is
    causal if `mask` is None; then S = T. dropout: the probability to drop a weight.
    """
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
        mask = mask.expand(len(query), -1, -1, -1)
    return AttentionInPieces.apply(query, key, value, mask, causal and mask is None, dropout)


class AttentionInPieces(torch.autograd.Function):
    """The function behind `attention_in_pieces`. It keeps the weights of all pieces for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        mixed = empty_heads(query, value.shape[-1])  # (B, H, T, vd)
        weights, factors = [], []
        for rows, blocks in pieces(query, key, causal):
            q, k, v = scaled(query[rows]), by_key_head(key[rows]), by_key_head(value[rows])
            for t, s in blocks:
                scores = grouped(q[:, :, t], k) @ k[:, s].transpose(1, 2)  # (b K, H / K t, s)
                each_head = scores.view(*q[:, :, t].shape[:-1], -1)  # (b, H, t, s)
                if mask is not None:
                    each_head += mask[rows, :, t, s]
                elif causal:
                    each_head[..., -each_head.shape[2] :] += later_keys(each_head)
                weights.append(scores.softmax(-1))  # torch sums in float32
                kept = weights[-1]
                if dropout:
                    factors.append(torch.empty_like(kept).bernoulli_(1 - dropout).div_(1 - dropout))
                    kept = kept * factors[-1]
                mixed[rows, :, t] = (kept @ v[:, s]).view(*each_head.shape[:-1], -1)
        ctx.causal, ctx.dropout = causal, dropout
        ctx.save_for_backward(query, key, value, *weights, *factors)
        return mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_mixed: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        weights = iter(saved)
        factors = iter(saved[len(saved) // 2 :] if ctx.dropout else [])
        of_query, of_key, of_value = (empty_heads(x, x.shape[-1]) for x in (query, key, value))
        for rows, blocks in pieces(query, key, ctx.causal):
            q, k, v = scaled(query[rows]), by_key_head(key[rows]), by_key_head(value[rows])
            sums: list[Tensor] = []  # the gradients of k and v
            for t, s in blocks:
                probabilities, factor = next(weights), next(factors, None)
                of_block = grouped(of_mixed[rows, :, t], k)  # (b K, H / K t, vd)
                kept, of_kept = probabilities, of_block @ v[:, s].transpose(1, 2)
                if factor is not None:
                    kept, of_kept = kept * factor, of_kept * factor
                of_scores = torch._softmax_backward_data(of_kept, probabilities, -1, probabilities.dtype)
                of_query[rows, :, t] = (of_scores @ k[:, s]).view(*q[:, :, t].shape)
                parts = [of_scores.transpose(1, 2) @ grouped(q[:, :, t], k), kept.transpose(1, 2) @ of_block]
                if sums:
                    for one, part in zip(sums, parts, strict=True):
                        one[:, s] += part
                else:  # the first block attends to all keys
                    sums = parts
            of_key[rows], of_value[rows] = sums[0].view_as(key[rows]), sums[1].view_as(value[rows])
        return scaled(of_query), of_key, of_value, None, None, None


def pieces(query: Tensor, key: Tensor, causal: bool) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Groups of rows, each with its blocks of query positions and the keys that a block may attend to.

    The last block comes first, because it attends to all keys.
    """
    B, H, T, _ = query.shape
    S = key.shape[2]
    starts = range(0, T, QUERIES_AT_ONCE)[::-1]
    ends = [min(start + QUERIES_AT_ONCE, T) for start in starts]
    blocks = [(slice(start, end), slice(end if causal else S)) for start, end in zip(starts, ends, strict=True)]
    at_once = max(1, SCORES_AT_ONCE // (H * min(T, QUERIES_AT_ONCE) * S))
    for start in range(0, B, at_once):
        yield slice(start, start + at_once), blocks


def scaled(query: Tensor) -> Tensor:
    """query / sqrt(hd). The division comes before the product, which may overflow in float16."""
    return query / math.sqrt(query.shape[-1])


def by_key_head(x: Tensor) -> Tensor:
    """Keys or values (b, K, S, d) -> (b K, S, d)."""
    return x.reshape(-1, *x.shape[2:])


def grouped(x: Tensor, keys: Tensor) -> Tensor:
    """Query heads (b, H, t, d) -> (b K, H / K t, d), as many as there are `keys` (b K, S, hd)."""
    return x.reshape(len(keys), -1, x.shape[-1])


def later_keys(scores: Tensor) -> Tensor:
    """The causal mask of t queries over the keys at their positions, (t, t): -inf for later keys, else 0."""
    t = scores.shape[2]
    return scores.new_full((t, t), -math.inf).triu(1)


def empty_heads(x: Tensor, width: int) -> Tensor:
    """An uninitialised (B, H, T, width), x (B, H, T, d), in the memory order (B, T, H, width) of the projections."""
    B, H, T, _ = x.shape
    return x.new_empty(B, T, H, width).transpose(1, 2)
