"""The key/value cache of a causal model. Shapes as in llama.py."""

from __future__ import annotations

import torch
from torch import Tensor

from config import LlamaConfig


class KVCache:
    """The keys and values of all tokens a model has read, so that only new tokens have to be computed.

    (B, K, capacity, hd) each in every layer, the first `length` columns filled; each key/value head is stored once.
    Memory is allocated when the first tokens come, in their dtype and on their device. With a sliding window all
    positions are kept, too: this saves no memory, but `keep` may bring old ones back into the window.

    Raises ValueError for a bidirectional model, where each new token changes the earlier ones.
    """

    def __init__(self, config: LlamaConfig, capacity: int | None = None) -> None:
        if not config.causal:
            raise ValueError("a bidirectional model has no use for a cache: each token changes those before it")
        self.window = config.sliding_window
        self.capacity = config.max_seq_len if capacity is None else min(capacity, config.max_seq_len)
        self.length = 0
        self.keys: list[Tensor | None] = [None] * config.n_layers
        self.values: list[Tensor | None] = [None] * config.n_layers
        self.real: Tensor | None = None  # bool (B, capacity): the columns that are not padding; None: all

    def room_for(self, tokens: int) -> None:
        """Raises ValueError if so many more tokens do not fit."""
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{self.length} tokens are cached and {tokens} more do not fit into {self.capacity}; "
                "start anew with the last ones"
            )

    def append(self, layer_id: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's keys and values of T new tokens, (B, K, T, hd) each; returns views of all, (B, K, S, hd)."""
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
        """Forgets the tokens after the first `length`."""
        self.length = min(self.length, length)
        if self.real is not None:
            self.real[:, self.length :] = True

    def take(self, rows: Tensor) -> None:
        """Replaces the rows of the batch by its rows (R,), in that order; a row may occur several times."""
        for stored in (self.keys, self.values):
            for layer_id, kept in enumerate(stored):
                if kept is not None:
                    taken = kept.new_empty(len(rows), *kept.shape[1:])
                    taken[:, :, : self.length] = kept[rows, :, : self.length]
                    stored[layer_id] = taken
        if self.real is not None:
            self.real = self.real[rows]

    def mask(self, attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """The keys that each new query may attend to: bool (B or 1, 1, T, S), or None where it is all of them.

        attention_mask: bool (B, T), of the new tokens. Call it once, before their layers.
        """
        end = self.length + tokens
        if attention_mask is not None or self.real is not None:
            if self.real is None:
                self.real = torch.ones(batch, self.capacity, dtype=torch.bool, device=device)
            if attention_mask is not None:
                self.real[:, self.length : end] = attention_mask
        windowed = self.window is not None and end > self.window
        if tokens == 1 and attention_mask is None and not windowed:
            return None if self.real is None else self.real[:, None, None, :end]
        positions = torch.arange(end, device=device)
        queries = positions[self.length :, None]
        seen = (positions <= queries)[None, None]
        if self.window is not None:
            seen = seen & (positions > queries - self.window)
        if self.real is not None:  # a padding position attends to itself, as in `masks.position_mask`
            seen = (self.real[:, None, None, :end] & seen) | (positions == queries)
        return seen
