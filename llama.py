"""The Llama decoder: pre-norm blocks of rotary grouped-query attention and SwiGLU, with tied embeddings. For models of
one's own, ALiBi in the place of rotary positions, a sliding window, and differential attention.

Shapes, one meaning per letter throughout:
    B  rows of the batch        D   model width (dim)             H  query heads
    T  tokens of a row          hd  width of one head, D / H      K  key/value heads, K <= H
    V  vocabulary               F   width of the feed-forward layer
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

import generation
from checkpoint import Checkpoint, read_checkpoint
from config import LlamaConfig, feed_forward_size
from kv_cache import KVCache, visible_positions, visible_to, with_alibi
from rope import apply_rotary_emb


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32, biased variance."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def by_formula(self, x: Tensor) -> Tensor:
        """The readable path; `forward` is the same by torch's kernel."""
        wide = at_least_float32(x)
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight + self.bias).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def by_formula(self, x: Tensor) -> Tensor:
        """The readable path; `forward` is the same by torch's kernel."""
        wide = at_least_float32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


SCORES_AT_ONCE = 4_000_000  # 8 MB in half precision
NORM_CLASSES = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def narrowed(x: Tensor) -> Tensor:
    """x in autocast's dtype, where autocast is on: cast once here, not once in each of the products it goes into."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def widened(x: Tensor) -> Tensor:
    """x in float32, where autocast is on: what adds up over the layers stays wide, whatever the weights are kept in."""
    return at_least_float32(x) if torch.is_autocast_enabled(x.device.type) else x


def attention_of_one(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """What a single new token, (B, H, 1, hd), takes from all keys and values, (B, K, S, hd) -> (B, H, 1, hd): the heads
    of a group are rows of one product, so that each key is read once. visible: as `visible_to` has it.
    """
    B, K = key.shape[:2]
    grouped = query.reshape(B, K, -1, query.shape[-1])  # (B, K, H / K, hd)
    if visible is not None and visible.shape[1] > 1:  # each head has its own
        visible = visible.reshape(len(visible), K, -1, visible.shape[-1])  # (B or 1, K, H / K, S)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=of_kernel(visible, query.dtype))
    return mixed.reshape(*query.shape[:-1], -1)


def of_kernel(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as torch's kernels take it: bool, or of the queries' dtype."""
    return visible if visible is None or visible.dtype == torch.bool else visible.to(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider (float64 references run through the same code)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions, or with what ALiBi adds to the scores."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.value_dim = config.head_dim
        self.compute_query = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.compute_key = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, config.kv_heads * config.head_dim, bias=False)
        self.compute_output = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.residual_dropout = nn.Dropout(config.dropout)

    def compute_query_key_value_scores(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """softmax(query key^T / sqrt(hd)) value: three times (B, H, T, hd) -> (B, H, T, hd), the readable path.

        visible: broadcast to (B, H, T, T); bool, True = attend, or a float that is added to the scores. Without it the
        config decides.
        """
        if visible is None:
            visible = self.visible_alone(query)
        # Scaled before the product, which may overflow in float16.
        scores = query / math.sqrt(query.shape[-1]) @ key.transpose(-2, -1)  # (B, H, T, T)
        if visible is not None and visible.dtype == torch.bool:
            scores = scores.masked_fill_(~visible, -math.inf)  # in place: nothing else needs the product
        elif visible is not None:
            scores = scores + visible
        # Whatever the dtype, torch's softmax adds up in float32.
        weights = F.dropout(scores.softmax(-1), self.config.dropout, self.training)
        return weights.to(value.dtype) @ value

    def visible_alone(self, query: Tensor) -> Tensor | None:
        """What the config has the queries (B, H, T, hd) of a text by itself see of its keys."""
        config, T = self.config, query.shape[-2]
        visible = visible_positions(None, T, config.causal, query.device, config.sliding_window)
        return with_alibi(visible, 0, T, config, query.dtype, query.device)

    def fused_attention(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
        """The same as `compute_query_key_value_scores`, by torch's fused kernel."""
        if visible is None and (self.config.sliding_window or self.config.position_embedding_type == "alibi"):
            visible = self.visible_alone(query)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=of_kernel(visible, query.dtype),
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=self.config.causal and visible is None,
        )

    def attention_in_pieces(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
        """`compute_query_key_value_scores`, for as many rows at a time as keep the scores in the processor's cache."""
        B, H, T, _ = query.shape
        at_once = max(1, SCORES_AT_ONCE // (H * T * key.shape[-2]))
        if visible is not None:
            visible = visible.expand(B, -1, -1, -1)
        mixed = [
            self.compute_query_key_value_scores(
                query[rows], key[rows], value[rows], None if visible is None else visible[rows]
            )
            for rows in (slice(start, start + at_once) for start in range(0, B, at_once))
        ]
        return torch.cat(mixed)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
        """The path that the config asks for, or the fastest: torch's kernel, but in half precision on the CPU, where
        that takes up to five times as long as the matrix products of pieces (docs/results.md).
        """
        kernel = self.config.attention_kernel
        if kernel == "auto":
            half_on_cpu = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
            kernel = "pieces" if half_on_cpu and query.shape[-2] <= 1024 else "fused"
        paths = {
            "manual": self.compute_query_key_value_scores,
            "pieces": self.attention_in_pieces,
            "fused": self.fused_attention,
        }
        return paths[kernel](query, key, value, visible)

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None = None,
        only: Tensor | None = None,
        cache: KVCache | None = None,
        layer_id: int = 0,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (B, 1, D) for the one position of each row that `only` (B,) names; visible as in
        `compute_query_key_value_scores`. cache: x follows the tokens in it, and goes there, as layer `layer_id`.
        """
        config = self.config
        B, T, _ = x.shape
        x = narrowed(x)
        query = self.compute_query(x).view(B, T, config.n_heads, config.head_dim)  # (B, T, H, hd)
        key = self.compute_key(x).view(B, T, config.kv_heads, config.head_dim)  # (B, T, K, hd)
        value = self.compute_value(x).view(B, T, -1, self.value_dim)  # (B, T, K, hd)
        if config.position_embedding_type == "rotary":
            start = 0 if cache is None else cache.length
            query, key = apply_rotary_emb(
                query, key, config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling, start
            )
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # (B, H or K, T, hd)
        if cache is not None:
            key, value = cache.append(layer_id, key, value)  # (B, K, S, hd)
        mixed = self.mix(query, key, value, visible, only)  # (B, H, T, hd)
        mixed = mixed.transpose(1, 2).flatten(-2)  # (B, T, D)
        return self.residual_dropout(self.compute_output(mixed))

    def mix(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, only: Tensor | None) -> Tensor:
        """What the queries (B, H, T, hd) take of the values (B, K, S, hd) by their keys: (B, H, T, hd); with `only`, or
        one query, (B, H, 1, hd).
        """
        if query.shape[-2] == 1 < key.shape[-2]:
            return attention_of_one(query, key, value, visible)
        group = query.shape[1] // key.shape[1]  # query heads that share one key/value head
        if group > 1:
            key = key.repeat_interleave(group, dim=1)  # (B, H, S, hd)
            value = value.repeat_interleave(group, dim=1)  # (B, H, S, hd)
        if only is not None:
            visible = self.visible_alone(query) if visible is None else visible
            if visible is not None:
                visible = at_positions(visible.expand(len(query), -1, -1, -1), only)  # (B, 1 or H, 1, S)
            query = at_positions(query, only)  # (B, H, 1, hd)
        return self.attend(query, key, value, visible)


class DifferentialAttention(Attention):
    """Differential attention (arXiv 2410.05258): a head weighs its values by the difference of two softmaxes,

        (softmax(Q1 K1^T / sqrt(hd)) - l softmax(Q2 K2^T / sqrt(hd))) V,   l = exp(lq1 . lk1) - exp(lq2 . lk2) + l0,

    so that what both maps see, noise, falls away; then RMSNorm within each head, times 1 - l0. l0 = 0.8 - 0.6 exp(-0.3
    depth), depth the number of the layer, from 0.

    Two query heads of the config make one head here, and two key/value heads one key/value head, with values twice as
    wide: the projections keep their sizes. Of the H query heads, the first half are the Q1, the second half the Q2;
    likewise of the keys. l's vectors belong to the layer, all its heads have them in common.

    The norm's gain starts at 0.1, where the paper says nothing and its program has 1: a norm lifts the flat mean over
    the context, which is all that attention gives at first, to full size, and a small model's embeddings drown in it
    (docs/results.md).
    """

    FIRST_GAIN = 0.1

    def __init__(self, config: LlamaConfig, depth: int) -> None:
        super().__init__(config)
        self.value_dim = 2 * config.head_dim
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(nn.init.normal_(torch.empty(config.head_dim), std=0.1)) for _ in range(4)
        )
        self.head_norm = RMSNorm(self.value_dim, eps=1e-5)
        nn.init.constant_(self.head_norm.weight, self.FIRST_GAIN)

    def balance(self) -> Tensor:
        """l, how much of the second softmax is taken off the first: a number."""
        q1, k1, q2, k2 = map(at_least_float32, (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2))
        return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + self.lambda_init

    def mix(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, only: Tensor | None) -> Tensor:
        """As `Attention.mix`, of query (B, H, T, hd), key (B, K, S, hd) and value (B, K / 2, S, 2 hd): (B, H / 2, T,
        2 hd).
        """
        value = value.repeat(1, 2, 1, 1)  # (B, K, S, 2 hd): both maps weigh the same values
        first, second = super().mix(query, key, value, visible, only).chunk(2, dim=1)
        return (1 - self.lambda_init) * self.head_norm(first - self.balance() * second)


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
        x = narrowed(x)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, T, F) inside

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.SwiGLU(x))


class LlamaLayer(nn.Module):
    """One pre-norm block: attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, layer_id: int, config: LlamaConfig) -> None:
        super().__init__()
        norm = NORM_CLASSES[config.norm]
        self.layer_id = layer_id
        differential = config.attention_type == "differential"
        self.attention = DifferentialAttention(config, layer_id) if differential else Attention(config)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.multiple_of, config.dropout)
        self.attention_norm = norm(config.dim, config.layer_norm_eps)
        self.ffn_norm = norm(config.dim, config.layer_norm_eps)

    def forward(
        self, x: Tensor, visible: Tensor | None = None, only: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (B, 1, D) for the one position of each row that `only` (B,) names."""
        mixed = self.attention(self.attention_norm(x), visible, only, cache, self.layer_id)
        x = (x if only is None else at_positions(x, only)) + mixed
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """A stack of `LlamaLayer`s between an embedding and the output projection that (by default) shares its weight."""

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
        """Makes the output projection's weight the embedding's, if the config says so."""
        if self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self) -> None:
        """N(0, 0.02); the two projections that write into the residual stream N(0, 0.02 / sqrt(2 * n_layers)).

        Each of the 2 * n_layers writes adds its variance to the stream, hence the root (GPT-2). The course and llama2.c
        scale w3 instead of w2; the loaded weights make that moot, pretraining does not.
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
    ) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> logits and hidden states (B, T, D), the latter after the final norm.

        Logits are (B, T, V) when `targets` is given (its values are not looked at), else (B, 1, V): those of each row's
        last real token. attention_mask: bool (B, T), True for real tokens, padding on either side, or, with `targets`,
        (B, T, T), True where a query may see a key; without it every token is real. cache: tokens follow those that it
        holds, and are added to it; their number may differ from call to call. Raises ValueError if they do not fit into
        it.
        """
        hidden = self.norm(self._through_layers(tokens, attention_mask, cache=cache))
        logits = self.output(hidden if targets is not None else last_real(hidden, attention_mask)[:, None])
        return logits, hidden

    def last_hidden(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The hidden state (B, D) of each row's last real token, as `forward` has it among the others.

        The last layer computes its keys and values for all positions, the rest for this one only: nobody reads more.
        """
        last = last_positions(tokens, attention_mask)
        return self.norm(self._through_layers(tokens, attention_mask, last))[:, 0]

    def _through_layers(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        only: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens (B, T) -> the residual stream (B, T, D) after the last layer; with `only` (B,), (B, 1, D)."""
        visible = visible_to(tokens, attention_mask, cache, self.config, self.tok_embeddings.weight.dtype)
        x = self.dropout(widened(self.tok_embeddings(tokens)))  # (B, T, D)
        *others, last_layer = self.layers
        for layer in others:
            x = layer(x, visible, cache=cache)
        x = last_layer(x, visible, only, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return x

    def new_cache(self, capacity: int | None = None) -> KVCache | None:
        """An empty cache for `capacity` tokens (default: the context); None where this model has no use for one."""
        return KVCache(self.config, capacity) if self.config.causal and self.config.use_cache else None

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        epsilon: float = 0.05,
        **settings: Any,
    ) -> Tensor:
        """Continues each prompt of idx (B, T): returns prompts and continuations, (B, T + new). More settings, such as
        `filters`, `attention_mask`, `eos_ids` and `generator`: see `generation.stream`.
        """
        return generation.generate(self, idx, max_new_tokens, temperature=temperature, epsilon=epsilon, **settings)


def last_positions(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where each row's last real token stands (B,); the last column where there is no mask.

    The mask decides, never the ids: a padding id may also occur as a token.
    """
    rows, columns = tokens.shape[:2]
    if attention_mask is None:
        return torch.full((rows,), columns - 1, device=tokens.device)
    return (torch.arange(columns, device=tokens.device) * attention_mask).argmax(-1)


def at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Picks one position of each row: x (B, ..., T, d), positions (B,) -> (B, ..., 1, d)."""
    index = positions.view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-2], 1, x.shape[-1])
    return x.gather(-2, index)


def last_real(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Picks each row's last real token from hidden (B, T, D) -> (B, D)."""
    return at_positions(hidden, last_positions(hidden, attention_mask))[:, 0]


class Uninitialised(TorchFunctionMode):
    """Within it, modules do not initialise their parameters. (To draw what has no memory, torch would import its
    compiler, which takes a second.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def llama_from_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32, **overrides: Any) -> Llama:
    """Builds the model of a checkpoint that was read. dtype: of the weights; None keeps the file's, and what is in it
    already is not copied. overrides: fields of the config that are to be other than the checkpoint says.
    """
    config = replace(checkpoint.config, **overrides)
    state = checkpoint.complete_state(config)
    with torch.device("meta"), Uninitialised():  # sizes without memory, for the tensors are there
        model = Llama(config)
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

    dtype: of the weights; None keeps the file's. Raises FileNotFoundError or ValueError, each with what to do, if it is
    missing, damaged or of no known format.
    """
    overrides = {name: value for name, value in (("norm", norm), ("causal", causal)) if value is not None}
    return llama_from_checkpoint(read_checkpoint(checkpoint), dtype, **overrides)
