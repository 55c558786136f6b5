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
    """The mask of tokens (B, T) over all keys, with the cached keys first.

    bool (B or 1, 1, T, S), True = attend. With ALiBi it is float (B or 1, H, T, S), at least float32, added to the
    scores. None: the plain causal mask if the config is causal and nothing is cached, else attention to all keys.
    Raises ValueError if the tokens do not fit into the cache.
    """
    B, T = tokens.shape
    start, window = 0 if cache is None else cache.length, config.sliding_window
    end = start + T
    real = None if attention_mask is None else attention_mask.to(torch.bool)
    if cache is not None:
        cache.check_room(T)
        real = cache.note_padding(real, B, T)
    windowed = window is not None and end > window
    if real is None and not windowed and (start == 0 or T == 1):
        mask = None
    elif real is not None and not windowed and T == 1 and attention_mask is None:
        mask = real[:, None, None]  # (B, 1, 1, S)
    else:
        mask = position_mask(real, end, config.causal, tokens.device, window, start)
    return with_alibi(mask, start, end, config, dtype, tokens.device)


def default_mask(T: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The config's mask for a sequence of T tokens without padding or cache."""
    mask = position_mask(None, T, config.causal, device, config.sliding_window)
    return with_alibi(mask, 0, T, config, dtype, device)


def position_mask(
    attention_mask: Tensor | None,
    end: int,
    causal: bool,
    device: torch.device,
    window: int | None = None,
    start: int = 0,
) -> Tensor | None:
    """The mask for queries `start` to `end` - 1 and keys 0 to `end` - 1: bool (B or 1, 1, T, S), True = attend.

    None: every query attends to every key. attention_mask: bool (B, S), True for real tokens; or (B, T, S), True where
    a query may attend to a key. A position always attends to itself: the softmax of an empty row is NaN, which would
    reach the gradients of other rows. window: see `LlamaConfig.sliding_window`.
    """
    mask = causal_mask(start, end, device, window) if causal else None
    if attention_mask is not None:
        itself = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start).triu(start)
        real = attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask[:, None]
        mask = (real if mask is None else real & mask) | itself
    return mask


@lru_cache(maxsize=2)
def causal_mask(start: int, end: int, device: torch.device, window: int | None = None) -> Tensor:
    """The causal mask, bool (1, 1, T, S): a query attends to itself and earlier tokens, to `window` tokens in all."""
    with torch.inference_mode(False):  # a mask made under inference_mode could not be used in training
        mask = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start)
        return (mask if window is None else mask.triu(start + 1 - window))[None, None]


def with_alibi(
    mask: Tensor | None, start: int, end: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The mask, with ALiBi's biases if the config has them (see `alibi.alibi_mask`)."""
    if config.position_embedding_type != "alibi":
        return mask
    slopes = alibi_slopes(config.n_heads)
    if config.attention_type == "differential":
        slopes = 2 * alibi_slopes(config.n_heads // 2)  # the two maps of a head see the same distances
    wide = torch.promote_types(dtype, torch.float32)
    return alibi_mask(mask, slopes, start, end, config.max_seq_len, wide, device)
