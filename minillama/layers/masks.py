"""Attention masks, built once for all layers of a forward pass. Shapes as in llama.py."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from config import LlamaConfig
from minillama.layers.alibi import alibi_mask, alibi_slopes
from minillama.layers.kv_cache import KVCache


def build_mask(
    tokens: Tensor, attention_mask: Tensor | None, cache: KVCache | None, config: LlamaConfig, dtype: torch.dtype
) -> Tensor | None:
    """The mask of tokens (B, T) over all keys, the cached ones first: bool (B or 1, 1, T, S), True = attend; with
    ALiBi a float to add to the scores, (B or 1, H, T, S), -inf for a hidden key, in dtype or float32. None where
    `config.causal` says it all, for the kernels know the plain causal mask.

    Raises ValueError if the tokens do not fit into the cache.
    """
    B, T = tokens.shape
    start, window = 0 if cache is None else cache.length, config.sliding_window
    real = None if attention_mask is None else attention_mask.to(torch.bool)
    if cache is not None:
        cache.room_for(T)
    if start == 0 and real is None and (window is None or T <= window):
        mask = None
    elif cache is not None:
        mask = cache.mask(real, B, T, tokens.device)
    else:
        mask = position_mask(real, T, config.causal, tokens.device, window)
    return with_alibi(mask, start, start + T, config, dtype, tokens.device)


def default_mask(T: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The mask that the config gives a sequence of T tokens without padding or cache."""
    mask = position_mask(None, T, config.causal, device, config.sliding_window)
    return with_alibi(mask, 0, T, config, dtype, device)


def position_mask(
    attention_mask: Tensor | None, seq_len: int, causal: bool, device: torch.device, window: int | None = None
) -> Tensor | None:
    """bool (B or 1, 1, T, T), True = attend; None where every query attends to every key.

    attention_mask: bool (B, T), True for real tokens; or (B, T, T), True where a query may attend to a key. A position
    attends to itself, so that no row of the softmax is empty (an empty row is NaN, and NaN times zero reaches the
    gradients of its neighbours). window: of a causal model, see `LlamaConfig.sliding_window`.
    """
    mask = causal_mask(seq_len, device, window) if causal else None
    if attention_mask is not None:
        itself = torch.eye(seq_len, dtype=torch.bool, device=device)
        real = attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask[:, None]
        mask = (real if mask is None else real & mask) | itself
    return mask


@lru_cache(maxsize=2)
def causal_mask(seq_len: int, device: torch.device, window: int | None = None) -> Tensor:
    """bool (1, 1, T, T), True at and below the diagonal, for `window` diagonals: a query attends to itself and the
    tokens before it, window tokens in all.
    """
    with torch.inference_mode(False):  # a mask first made under inference_mode could never serve training
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
        return (mask if window is None else mask.triu(1 - window))[None, None]


def with_alibi(
    mask: Tensor | None, start: int, end: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The mask with ALiBi's biases in it if the config asks for them, see `alibi.alibi_mask`."""
    if config.position_embedding_type != "alibi":
        return mask
    slopes = alibi_slopes(config.n_heads)
    if config.attention_type == "differential":
        slopes = 2 * alibi_slopes(config.n_heads // 2)  # the two maps of a head see the same distances
    wide = torch.promote_types(dtype, torch.float32)
    return alibi_mask(mask, slopes, start, end, config.max_seq_len, wide, device)
