"""Names and layouts of tensors in the checkpoints of other programs, converted to and from ours.

`KEYS` is the table of names. The layout of query and key differs too. Meta and llama2.c keep a head's rotary pairs
side by side, as this program does. Hugging Face keeps them in split halves, see `to_split_halves`. docs/checkpoints.md
describes all formats.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from config import LlamaConfig

State = dict[str, Tensor]
# One row per tensor: ours, Meta's (and llama2.c's .pt), Hugging Face's, GGUF's, without ".weight". "{}" is the layer.
DIALECTS = ("ours", "meta", "huggingface", "gguf")
LAYER = ("layers.{}.", "layers.{}.", "model.layers.{}.", "blk.{}.")
KEYS_OF_A_LAYER = (
    ("attention_norm", "attention_norm", "input_layernorm", "attn_norm"),
    ("attention.compute_query", "attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.compute_key", "attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.compute_value", "attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.compute_output", "attention.wo", "self_attn.o_proj", "attn_output"),
    ("ffn_norm", "ffn_norm", "post_attention_layernorm", "ffn_norm"),
    ("feed_forward.w1", "feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "feed_forward.w3", "mlp.up_proj", "ffn_up"),
)
KEYS: tuple[tuple[str, ...], ...] = (
    ("tok_embeddings", "tok_embeddings", "model.embed_tokens", "token_embd"),
    *(tuple(map("".join, zip(LAYER, row, strict=True))) for row in KEYS_OF_A_LAYER),
    ("norm", "norm", "model.norm", "output_norm"),
    ("output", "output", "lm_head", "output"),
)
ROTARY_TABLES = re.compile(r"rope\.freqs|freqs_(cis|cos|sin)|.*\.rotary_emb\.inv_freq")


def is_rotary_table(name: str) -> bool:
    """Whether a tensor is a rotary table. Some files have them, but the model computes its own."""
    return ROTARY_TABLES.fullmatch(name) is not None


def renamed(names: Iterable[str], source: str, target: str) -> dict[str, str]:
    """A mapping from names of one dialect to another; an unknown name is mapped to itself."""
    column, row = DIALECTS.index(target), {row[DIALECTS.index(source)]: row for row in KEYS}
    result = {}
    for name in names:
        stem, dot, part = name.rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", stem)
        known = row.get(stem if number is None else f"{stem[: number.start()]}{{}}{stem[number.end() :]}")
        result[name] = f"{known[column].format(number and number[0])}{dot}{part}" if known else name
    return result


def to_split_halves(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of a query or key weight (heads * hd, ...) to Hugging Face's layout.

    Within each head, the rotary pairs move from rows (0, 1), (2, 3), ... to (0, hd/2), (1, hd/2 + 1), ...
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_split_halves`."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def rotary_heads(name: str, config: LlamaConfig) -> int | None:
    """The number of heads of a query or key tensor, by our name; None for other tensors."""
    if ".compute_query." in name:
        return config.n_heads
    return config.kv_heads if ".compute_key." in name else None


def is_tied(state: State) -> bool:
    """Whether the output projection is the embedding: missing, or with the same numbers."""
    output, embedding = state.get("output.weight"), state.get("tok_embeddings.weight")
    if output is None or embedding is None:
        return output is None
    return output.dtype == embedding.dtype and torch.equal(output, embedding)
