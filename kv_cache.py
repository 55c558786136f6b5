"""The cache of keys and values, and which of them each query may see. Shapes as in llama.py; S: keys in all."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from alibi import alibi_mask, alibi_slopes
from config import LlamaConfig


@lru_cache(maxsize=2)
def causal_mask(seq_len: int, device: torch.device, window: int | None = None) -> Tensor:
    """bool (1, 1, T, T), True at and below the diagonal, for `window` diagonals: a query sees itself and what came
    before, window tokens in all.
    """
    with torch.inference_mode(False):  # a mask first made under inference_mode could never serve training
        mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
        return (mask if window is None else mask.triu(1 - window))[None, None]


def visible_positions(
    attention_mask: Tensor | None, seq_len: int, causal: bool, device: torch.device, window: int | None = None
) -> Tensor | None:
    """Which key each query may see: bool (B or 1, 1, T, T), True = attend; None where every query sees every key.

    attention_mask: bool (B, T), True for real tokens; or (B, T, T), True where a query may see a key. A position sees
    itself, so that no row of the softmax is empty (an empty one is NaN, and NaN times zero reaches its neighbours'
    gradients). window: of a causal model, see `LlamaConfig.sliding_window`.
    """
    visible = None
    if causal:
        visible = causal_mask(seq_len, device, window)
    if attention_mask is not None:
        itself = torch.eye(seq_len, dtype=torch.bool, device=device)
        real = attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask[:, None]
        visible = (real if visible is None else real & visible) | itself
    return visible


class KVCache:
    """The keys and values of what a model has read so far, so that the next tokens alone have to be computed.

    (B, K, capacity, hd) of each in every layer, the first `length` columns filled; K key/value heads, each stored once.
    Memory is taken when the first tokens come, of their dtype and on their device. With a sliding window, too, all are
    kept: this saves no memory, but what is forgotten by `keep` may bring them back into sight.

    Raises ValueError for a bidirectional model, in which what was read changes with what follows.
    """

    def __init__(self, config: LlamaConfig, capacity: int | None = None) -> None:
        if not config.causal:
            raise ValueError("a bidirectional model has no use for a cache: each token changes those before it")
        self.window = config.sliding_window
        self.capacity = config.max_seq_len if capacity is None else min(capacity, config.max_seq_len)
        self.length = 0
        self.keys: list[Tensor | None] = [None] * config.n_layers
        self.values: list[Tensor | None] = [None] * config.n_layers
        self.real: Tensor | None = None  # bool (B, capacity): the columns that are no padding; None: all

    def room_for(self, tokens: int) -> None:
        """Raises ValueError if so many more do not fit."""
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{self.length} tokens are cached and {tokens} more do not fit into {self.capacity}; "
                "start anew with the last ones"
            )

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores what a layer computed for T new tokens, (B, K, T, hd) each; returns views of all, (B, K, S, hd)."""
        both = []
        for stored, new in ((self.keys, key), (self.values, value)):
            kept = stored[layer_id]
            if kept is None:
                kept = stored[layer_id] = new.new_empty(*new.shape[:2], self.capacity, new.shape[-1])
            end = self.length + new.shape[2]
            kept[:, :, self.length : end] = new
            both.append(kept[:, :, :end])
        return both[0], both[1]

    def keep(self, length: int) -> None:
        """Forgets what came after the first `length` tokens."""
        self.length = min(self.length, length)
        if self.real is not None:
            self.real[:, self.length :] = True

    def take(self, rows: Tensor) -> None:
        """Makes the rows (R,) of the batch its rows, in that order, some perhaps several times."""
        for stored in (self.keys, self.values):
            for layer_id, kept in enumerate(stored):
                if kept is not None:
                    taken = kept.new_empty(len(rows), *kept.shape[1:])
                    taken[:, :, : self.length] = kept[rows, :, : self.length]
                    stored[layer_id] = taken
        if self.real is not None:
            self.real = self.real[rows]

    def visible(self, attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """Which of all keys each of the new queries may see: bool (B or 1, 1, T, S), or None where that is all of them.

        attention_mask: bool (B, T), of the new tokens. Call it once before their layers.
        """
        end = self.length + tokens
        if attention_mask is not None or self.real is not None:
            if self.real is None:
                self.real = torch.ones(batch, self.capacity, dtype=torch.bool, device=device)
            if attention_mask is not None:
                self.real[:, self.length : end] = attention_mask
        narrow = self.window is not None and end > self.window
        if tokens == 1 and attention_mask is None and not narrow:
            return None if self.real is None else self.real[:, None, None, :end]
        positions = torch.arange(end, device=device)
        queries = positions[self.length :, None]
        seen = (positions <= queries)[None, None]
        if self.window is not None:
            seen = seen & (positions > queries - self.window)
        if self.real is not None:  # a padding position sees itself, as in `visible_positions`
            seen = (self.real[:, None, None, :end] & seen) | (positions == queries)
        return seen


def visible_to(
    tokens: Tensor, attention_mask: Tensor | None, cache: KVCache | None, config: LlamaConfig, dtype: torch.dtype
) -> Tensor | None:
    """Which keys each of tokens (B, T) may see: bool (B or 1, 1, T, S); with ALiBi, what is added to the scores, (B or
    1, H, T, S), -inf for what is not seen, in dtype or float32; None where `config.causal` says all of it, for the
    kernels know the plain causal mask. Raises ValueError if the tokens do not fit into the cache.
    """
    B, T = tokens.shape
    start, window = 0 if cache is None else cache.length, config.sliding_window
    mask = None if attention_mask is None else attention_mask.to(torch.bool)
    if cache is not None:
        cache.room_for(T)
    if start == 0 and mask is None and (window is None or T <= window):
        visible = None
    elif cache is not None:
        visible = cache.visible(mask, B, T, tokens.device)
    else:
        visible = visible_positions(mask, T, config.causal, tokens.device, window)
    return with_alibi(visible, start, start + T, config, dtype, tokens.device)


def with_alibi(
    visible: Tensor | None, start: int, end: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """The mask with ALiBi in it, if the config says so, see `alibi_mask`."""
    if config.position_embedding_type != "alibi":
        return visible
    slopes = alibi_slopes(config.n_heads)
    if config.attention_type == "differential":
        slopes = 2 * alibi_slopes(config.n_heads // 2)  # the two maps of a head see the same distances
    wide = torch.promote_types(dtype, torch.float32)
    return alibi_mask(visible, slopes, start, end, config.max_seq_len, wide, device)
