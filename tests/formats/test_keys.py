"""Names and layout of tensors in every format, there and back."""

from __future__ import annotations

import torch

from minillama.formats.keys import KEYS, renamed, to_pairs, to_split_halves
from models import foreign_llama


def test_names_go_to_every_dialect_and_back():
    names = list(foreign_llama(n_layers=12).state_dict())
    for dialect in ("meta", "huggingface", "gguf"):
        there = renamed(names, "ours", dialect)
        assert len(set(there.values())) == len(names) and not any("{" in name for name in there.values())
        assert list(renamed(there.values(), dialect, "ours").values()) == names
    assert len({row[0] for row in KEYS}) == len(KEYS) == 12
    assert renamed(["layers.11.attention.compute_key.weight"], "ours", "huggingface") == {
        "layers.11.attention.compute_key.weight": "model.layers.11.self_attn.k_proj.weight"
    }
    assert renamed(["a.b", "alone"], "meta", "ours") == {"a.b": "a.b", "alone": "alone"}


def test_a_head_of_pairs_becomes_two_halves_and_back():
    rows = torch.arange(12.0)[:, None]  # two heads of three pairs
    halves = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert to_split_halves(rows, 2)[:, 0].tolist() == halves
    assert torch.equal(to_pairs(to_split_halves(rows, 2), 2), rows)
