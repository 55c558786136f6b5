"""Models and inputs that the tests of several modules use."""

from __future__ import annotations

from dataclasses import replace

import torch

from llama import (
    Llama,
)


def random_ids(batch: int, seq_len: int, vocab_size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str, pad_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one batch, and the mask of its real tokens."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, columns], mask[i, columns] = row, True
    return ids, mask


def with_kernel(model: Llama, kernel: str) -> Llama:
    """The same weights in a model that uses this attention kernel."""
    other = Llama(replace(model.config, attention_kernel=kernel)).to(model.tok_embeddings.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def read_in_parts(model, ids, mask, parts):
    """Logits (B, T, V) of the tokens, read through a cache in parts of these lengths."""
    cache, at, found = model.new_cache(), 0, []
    for size in parts:
        part = slice(at, at + size)
        found.append(model(ids[:, part], ids[:, part], None if mask is None else mask[:, part], cache=cache)[0])
        at += size
    assert cache.length == at == ids.shape[1]
    return torch.cat(found, dim=1)
