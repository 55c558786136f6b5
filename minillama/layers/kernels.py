"""Faster ways to compute `Attention.compute_query_key_value_scores`. Shapes as in llama.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_AT_ONCE = 4_000_000  # 8 MB in half precision


def kernel_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask for torch's kernels: bool, or float in the dtype of the queries."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool, dropout: float = 0.0
) -> Tensor:
    """torch's fused kernel: query (B, H, T, hd), key and value (B, H or K, S, hd) -> (B, H, T, hd). causal: if mask is
    None, whether attention is causal.
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=kernel_mask(mask, query.dtype),
        dropout_p=dropout,
        is_causal=causal and mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attention_in_pieces(
    compute: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """compute(query, key, value, mask) for a few rows at a time, so that their scores fit the processor's cache."""
    B, H, T, _ = query.shape
    at_once = max(1, SCORES_AT_ONCE // (H * T * key.shape[-2]))
    if mask is not None:
        mask = mask.expand(B, -1, -1, -1)
    return torch.cat(
        [
            compute(query[rows], key[rows], value[rows], None if mask is None else mask[rows])
            for rows in (slice(start, start + at_once) for start in range(0, B, at_once))
        ]
    )


def single_token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention for one new token: query (B, H, 1, hd), key and value (B, K, S, hd) -> (B, H, 1, hd). The heads of a
    group are rows of one product, so that each key is read once. mask: see `masks.build_mask`.
    """
    B, K = key.shape[:2]
    grouped = query.reshape(B, K, -1, query.shape[-1])  # (B, K, H / K, hd)
    if mask is not None and mask.shape[1] > 1:  # a mask for each head
        mask = mask.reshape(len(mask), K, -1, mask.shape[-1])  # (B or 1, K, H / K, S)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=kernel_mask(mask, query.dtype))
    return mixed.reshape(*query.shape[:-1], -1)
