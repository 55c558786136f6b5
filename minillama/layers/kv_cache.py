"""The key/value cache of a causal model. Shapes as in llama.py."""

from __future__ import annotations

import torch
from torch import Tensor

from config import LlamaConfig


class KVCache:
    """The keys and values of all earlier tokens, so that only new tokens are computed.

    Each layer has two tensors (B, K, capacity, hd); `length` columns are filled. The first tokens determine dtype and
    device. A sliding window saves no memory, because `keep` may bring old positions back into it.

    Raises ValueError for a bidirectional model, where each new token changes the earlier ones.
    """

    def __init__(self, config: LlamaConfig, capacity: int | None = None) -> None:
        if not config.causal:
            raise ValueError("a bidirectional model cannot use a cache: each token changes the earlier ones")
        self.window = config.sliding_window
        self.capacity = config.max_seq_len if capacity is None else min(capacity, config.max_seq_len)
        self.length = 0
        self.keys: list[Tensor | None] = [None] * config.n_layers
        self.values: list[Tensor | None] = [None] * config.n_layers
        self.real: Tensor | None = None  # bool (B, capacity), False for padding; None: no padding

    def check_room(self, tokens: int) -> None:
        """Raises ValueError if `tokens` more tokens do not fit."""
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{self.length} tokens are cached and {tokens} more do not fit into {self.capacity}; "
                "start again with the last ones"
            )

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's keys and values of new tokens, (B, K, T, hd) each; returns views of all, (B, K, S, hd)."""
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
        """Keeps only the first `length` tokens."""
        self.length = min(self.length, length)
        if self.real is not None:
            self.real[:, self.length :] = True

    def take(self, rows: Tensor) -> None:
        """Replaces the batch by the given rows (R,), in this order; a row may occur several times."""
        for stored in (self.keys, self.values):
            for layer_id, kept in enumerate(stored):
                if kept is not None:
                    taken = kept if len(rows) == len(kept) else kept.new_empty(len(rows), *kept.shape[1:])
                    taken[:, :, : self.length] = kept[rows, :, : self.length]  # the indexed rows are a copy
                    stored[layer_id] = taken
        if self.real is not None:
            self.real = self.real[rows]

    def note_padding(self, attention_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """Stores the mask of new tokens, bool (B, T) or None; returns that of all tokens, (B, S) or None (all real)."""
        end = self.length + tokens
        if attention_mask is not None:
            if self.real is None:
                self.real = torch.ones(batch, self.capacity, dtype=torch.bool, device=attention_mask.device)
            self.real[:, self.length : end] = attention_mask
        return None if self.real is None else self.real[:, :end]
