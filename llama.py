"""The Llama decoder: pre-norm blocks of grouped-query attention with rotary positions, and SwiGLU.

Shapes, with the same letters in all files:
    B  rows of the batch                     D   model width (dim)         H  query heads
    T  query positions                       hd  width of one head, D / H  K  key/value heads, K <= H
    S  key positions, with the cached ones   V   vocabulary
"""

from __future__ import annotations

import math
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from config import DEFAULT_EPSILON, LlamaConfig, feed_forward_size
from minillama.formats.checkpoint import Checkpoint, read_checkpoint
from minillama.layers import kernels
from minillama.layers.attention_pieces import attention_in_pieces
from minillama.layers.differential import (
    add_differential_parameters,
    reset_differential_parameters,
    share_values,
    subtract_maps,
)
from minillama.layers.kv_cache import KVCache
from minillama.layers.masks import build_mask, default_mask
from minillama.layers.precision import at_least_float32, downcast_under_autocast, upcast_under_autocast
from minillama.layers.token_losses import token_losses
from rope import apply_rotary_emb, rotate_in_real_numbers


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32, biased variance."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0)
        nn.init.constant_(self.bias, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


NORM_CLASSES = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions.

    Beyond the write-up, a config may ask for ALiBi or a sliding window, both part of the mask (layers/masks.py). It may
    also ask for differential heads (layers/differential.py). Their initial weights depend on the layer index, `depth`.
    """

    def __init__(self, config: LlamaConfig, depth: int = 0) -> None:
        super().__init__()
        self.config = config
        self.differential = config.attention_type == "differential"
        self.value_dim = 2 * config.head_dim if self.differential else config.head_dim
        self.compute_query = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.compute_key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.compute_output = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.residual_dropout = nn.Dropout(config.dropout)
        self.rotary_table: Tensor | None = None  # cosines and sines for the whole context, in compiled code
        if self.differential:
            add_differential_parameters(self, RMSNorm(2 * config.head_dim), config, depth)

    def reset_parameters(self) -> None:
        """Draws the parameters that belong to no submodule."""
        if self.differential:
            reset_differential_parameters(self)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        only: Tensor | None = None,
        cache: KVCache | None = None,
        layer_id: int = 0,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). only (B,): one position in each row to compute alone -> (B, 1, D).

        mask: see `compute_query_key_value_scores`. cache: the earlier tokens, to which layer `layer_id` appends x.
        """
        config = self.config
        B, T, _ = x.shape
        x = downcast_under_autocast(x)
        query = self.compute_query(x).view(B, T, config.n_heads, config.head_dim)  # (B, T, H, hd)
        key = self.compute_key(x).view(B, T, config.kv_heads, config.head_dim)  # (B, T, K, hd)
        value = self.compute_value(x).view(B, T, -1, self.value_dim)  # (B, T, K, hd)
        if config.position_embedding_type == "rotary":
            start = 0 if cache is None else cache.length
            if self.rotary_table is not None:
                rows = self.rotary_table[start : start + T]
                query, key = rotate_in_real_numbers(query, rows), rotate_in_real_numbers(key, rows)
            else:
                query, key = apply_rotary_emb(
                    query, key, config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling, start
                )
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, H or K, T, hd)
        if cache is not None:
            key, value = cache.append(layer_id, key, value)  # (B, K, S, hd)
        if self.differential:
            value = share_values(value)
        if T == 1 < key.shape[2]:
            mixed = kernels.single_token_attention(query, key, value, mask)  # (B, H, 1, hd)
        else:
            if only is not None:
                mask = default_mask(T, config, query.dtype, query.device) if mask is None else mask
                mask = None if mask is None else gather_positions(mask.expand(B, -1, -1, -1), only)
                query = gather_positions(query, only)
            mixed = self.attend(query, key, value, mask)  # (B, H, T or 1, hd)
        if self.differential:
            mixed = subtract_maps(self, mixed)
        return self.residual_dropout(self.compute_output(mixed.transpose(1, 2).flatten(-2)))  # (B, T or 1, D)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The attention of `compute_query_key_value_scores`, computed by the config's kernel.

        Query (B, H, T, hd), key and value (B, K, S, hd) -> (B, H, T, hd). "auto" is torch's fused kernel. In half
        precision on the CPU it is "pieces", matrix products of a few rows at a time, up to five times as fast
        (docs/performance.md).
        """
        config, kernel = self.config, self.config.attention_kernel
        if kernel == "auto":
            half_on_cpu = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
            kernel = "pieces" if half_on_cpu and query.shape[-2] <= 1024 else "fused"
        if kernel == "pieces" and torch.compiler.is_compiling():
            kernel = "fused"  # a loop over pieces would be compiled anew for each number of tokens
        if mask is None and (config.sliding_window or config.position_embedding_type == "alibi"):
            mask = default_mask(query.shape[-2], config, query.dtype, query.device)
        dropout = config.dropout if self.training else 0.0
        if kernel == "pieces":
            return attention_in_pieces(query, key, value, mask, causal=config.causal, dropout=dropout)
        if kernel == "manual":
            key, value = (kernels.repeated(tensor, query.shape[1]) for tensor in (key, value))  # (B, H, S, hd)
            return self.compute_query_key_value_scores(query, key, value, mask)
        return kernels.fused_attention(query, key, value, mask, causal=config.causal, dropout=dropout)

    def compute_query_key_value_scores(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """softmax(query key^T / sqrt(hd) + mask) value, the readable path: three (B, H, T, hd) -> (B, H, T, hd).

        mask: broadcast to (B, H, T, T); bool, True = attend, or float, added to the scores. None: the config's mask.
        """
        if mask is None:
            mask = default_mask(query.shape[-2], self.config, query.dtype, query.device)
        # The division comes first, because the product may overflow in float16.
        scores = query / math.sqrt(query.shape[-1]) @ key.transpose(-2, -1)  # (B, H, T, T)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill_(~mask, -math.inf)  # in place, to save memory
        elif mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1)  # torch sums in float32
        weights = F.dropout(weights, self.config.dropout, self.training)
        return weights.to(value.dtype) @ value


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x); w1 is the gate, w3 the up and w2 the down projection."""

    def __init__(self, dim: int, hidden_dim: int | None, multiple_of: int, dropout: float) -> None:
        super().__init__()
        hidden = feed_forward_size(dim, hidden_dim, multiple_of)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)

    def SwiGLU(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D), before dropout."""
        x = downcast_under_autocast(x)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.SwiGLU(x))


class LlamaLayer(nn.Module):
    """One pre-norm block: attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, layer_id: int, config: LlamaConfig) -> None:
        super().__init__()
        norm = NORM_CLASSES[config.norm]
        self.layer_id = layer_id
        self.attention = Attention(config, layer_id)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.multiple_of, config.dropout)
        self.attention_norm = norm(config.dim, config.layer_norm_eps)
        self.ffn_norm = norm(config.dim, config.layer_norm_eps)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, only: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). only (B,): one position in each row to compute alone -> (B, 1, D)."""
        mixed = self.attention(self.attention_norm(x), mask, only, cache, self.layer_id)
        x = (x if only is None else gather_positions(x, only)) + mixed
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Embedding, layers, norm and output projection, which by default shares the weight of the embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(layer_id, config) for layer_id in range(config.n_layers))
        self.norm = NORM_CLASSES[config.norm](config.dim, config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Shares the embedding's weight with the output projection, if the config says so."""
        if self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def reset_parameters(self) -> None:
        """Draws the same weights as the constructor, in the same order, for a model built on the device "meta"."""

        def reset(module: Any) -> None:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

        for child in self.children():
            child.apply(reset)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws weights from N(0, 0.02), and from N(0, 0.02 / sqrt(2 * n_layers)) for projections into the residual.

        Each of these 2 * n_layers projections adds its variance to the residual stream, hence the square root (GPT-2).
        The course and llama2.c scale w3 instead of w2. The difference matters only in pretraining.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("compute_output.weight", "w2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        losses: bool = False,
    ) -> tuple[Any, Tensor]:
        """tokens (B, T) -> logits, and hidden states (B, T, D) after the final norm.

        Logits are (B, T, V) with `targets` (their values do not matter), else (B, 1, V) for each row's last real token.
        attention_mask: bool (B, T), True for real tokens, with padding on either side. With `targets` it may be
        (B, T, T), True where a query may attend to a key. cache: the earlier tokens, to which any number of `tokens`
        is appended. Raises ValueError if they do not fit. losses: instead of logits, the cross-entropy of each target
        and whether it has the largest logit, both (B, T), in less time and memory (see `token_losses`).
        """
        hidden = self.norm(self.residual_stream(tokens, attention_mask, cache=cache))
        if losses:
            assert targets is not None
            return token_losses(hidden, self.output.weight, targets), hidden
        logits = self.output(hidden if targets is not None else last_token_state(hidden, attention_mask)[:, None])
        return logits, hidden

    def last_hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The hidden state (B, D) of each row's last real token, equal to that of `forward`, but faster.

        The last layer computes keys and values for all positions, and everything else only for this one.
        """
        return self.norm(self.residual_stream(tokens, attention_mask, last_positions(tokens, attention_mask)))[:, 0]

    def residual_stream(
        self, tokens: Tensor, attention_mask: Tensor | None, only: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """tokens (B, T) -> the residual stream after the last layer, (B, T, D). only: see `LlamaLayer.forward`."""
        mask = build_mask(tokens, attention_mask, cache, self.config, self.tok_embeddings.weight.dtype)
        x = self.dropout(upcast_under_autocast(self.tok_embeddings(tokens)))  # (B, T, D)
        *earlier, last = self.layers
        for layer in earlier:
            x = layer(x, mask, cache=cache)
        x = last(x, mask, only, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return x

    def new_cache(self, capacity: int | None = None) -> KVCache | None:
        """An empty cache for `capacity` tokens (default: the context); None for a model that cannot use one."""
        return KVCache(self.config, capacity) if self.config.causal and self.config.use_cache else None

    @torch.no_grad()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, epsilon: float = DEFAULT_EPSILON, **more: Any
    ) -> Tensor:
        """Continues each prompt of idx (B, T): prompts and continuations, (B, T + new). Temperature 0 is greedy.

        more: tokenizer, stop, top_k, top_p, min_p, typical_p, eta, repetition_penalty, eos_ids, attention_mask, ...
        (see `minillama.decoding.sampling.generate`).
        """
        from minillama.decoding.sampling import generate

        return generate(self, idx, max_new_tokens, temperature=temperature, epsilon=epsilon, **more)


def last_positions(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The position of each row's last real token (B,); without a mask, the last column.

    Only the mask marks padding, because the padding id may also be a real token.
    """
    rows, columns = tokens.shape[:2]
    if attention_mask is None:
        return torch.full((rows,), columns - 1, device=tokens.device)
    return (torch.arange(columns, device=tokens.device) * attention_mask).argmax(-1)


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """One position of each row: x (B, ..., T, d), positions (B,) -> (B, ..., 1, d)."""
    index = positions.view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-2], 1, x.shape[-1])
    return x.gather(-2, index)


def last_token_state(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The state of each row's last real token: hidden (B, T, D) -> (B, D)."""
    return gather_positions(hidden, last_positions(hidden, attention_mask))[:, 0]


class SkipParameterInit(TorchFunctionMode):
    """A context in which modules skip the initialisation of parameters.

    On the device "meta", initialisation imports torch's compiler, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def llama_without_weights(config: LlamaConfig) -> Llama:
    """A `Llama` on the device "meta": it has shapes, but takes no memory."""
    with torch.device("meta"), SkipParameterInit():
        return Llama(config)


def llama_from_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32, **overrides: Any) -> Llama:
    """The model of a checkpoint. dtype: see `load_pretrained`. overrides: fields that replace those of its config."""
    config = replace(checkpoint.config, **overrides)
    state = checkpoint.complete_state(config)
    model = llama_without_weights(config)
    model.load_state_dict({name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    return model.eval()


def load_pretrained(
    checkpoint: str | PathLike[str],
    norm: str | None = None,
    causal: bool | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Llama:
    """Reads a checkpoint of any known format into a `Llama` in evaluation mode, on the CPU.

    dtype: of the weights; None keeps the file's dtype and makes no copy. Raises FileNotFoundError or ValueError, with
    advice, if the file is missing, damaged or of an unknown format.
    """
    overrides = {name: value for name, value in (("norm", norm), ("causal", causal)) if value is not None}
    return llama_from_checkpoint(read_checkpoint(checkpoint), dtype, **overrides)
