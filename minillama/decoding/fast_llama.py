"""A Llama for inference only: the results of `Llama` from fewer and faster matrix products.

A token costs the time to read every weight, and torch's work between the products. So query, key and value are one
product here, and so are gate and up. The weights are in the layout of oneDNN's kernels, or in 8 bits. `Llama` is the
readable path; tests compare the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama, last_token_state
from minillama.decoding.sampling import LanguageModel
from minillama.layers.kernels import Product, fused_attention, product_of, single_token_attention
from minillama.layers.kv_cache import KVCache
from minillama.layers.masks import build_mask
from minillama.layers.precision import at_least_float32, autocast
from rope import rotary_rows, rotate

QUANTIZATIONS = ("int8",)


class InferenceLayer(NamedTuple):
    """A `LlamaLayer` as products and norms."""

    attention_norm: nn.Module
    query_key_value: Product  # (B, T, D) -> (B, T, (H + 2 K) hd)
    output: Product
    ffn_norm: nn.Module
    gate_up: Product  # (B, T, D) -> (B, T, 2 F)
    down: Product


class InferenceLlama:
    """`Llama.forward` in evaluation mode, without gradients.

    The constructor takes the weights out of `llama` layer by layer, to save memory; `llama` is then empty. A tied
    weight is in memory twice, as the embedding table and as the output product.

    dtype: of the products (default: that of the weights). quantize: "int8" or None. The residual stream is at least
    float32; on the CPU, so are the inputs of attention.
    """

    @torch.no_grad()
    def __init__(self, llama: Llama, dtype: torch.dtype | None = None, quantize: str | None = None) -> None:
        if quantize not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantize is {quantize!r}; it must be one of {', '.join(QUANTIZATIONS)}")
        if llama.config.attention_type != "softmax":
            raise ValueError(f"{llama.config.attention_type} attention cannot be quantized; leave out --quantize")
        self.config = llama.config

        def product(*linears: nn.Linear) -> Product:
            parts = [linear.weight.detach().to(dtype or linear.weight.dtype) for linear in linears]
            return product_of(torch.cat(parts) if len(parts) > 1 else parts[0], quantize)

        self.layers = []
        blocks, llama.layers = list(llama.layers), nn.ModuleList()
        while blocks:
            block: Any = blocks.pop(0)
            attention, feed_forward = block.attention, block.feed_forward
            self.layers.append(
                InferenceLayer(
                    block.attention_norm,
                    product(attention.compute_query, attention.compute_key, attention.compute_value),
                    product(attention.compute_output),
                    block.ffn_norm,
                    product(feed_forward.w1, feed_forward.w3),
                    product(feed_forward.w2),
                )
            )
        self.tok_embeddings, self.norm = llama.tok_embeddings, llama.norm
        self.output = product(llama.output)
        llama.output = nn.Identity()  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Llama.forward`."""
        config = self.config
        H, K = config.n_heads, config.kv_heads
        T = tokens.shape[1]
        start = 0 if cache is None else cache.length
        x = at_least_float32(self.tok_embeddings(tokens))  # (B, T, D)
        mask = build_mask(tokens, attention_mask, cache, config, x.dtype)
        table = None
        if config.position_embedding_type == "rotary":
            sizes = (config.head_dim, config.max_seq_len, config.rope_theta)
            table = rotary_rows(start, start + T, *sizes, tokens.device, config.rope_scaling)
        for layer_id, layer in enumerate(self.layers):
            heads = layer.query_key_value(layer.attention_norm(x)).unflatten(-1, (-1, config.head_dim))
            if heads.device.type == "cpu":
                heads = at_least_float32(heads)  # the CPU's attention is slow in half precision
            rotated = heads[:, :, : H + K] if table is None else rotate(heads[:, :, : H + K], table)
            rotated = rotated.transpose(1, 2)  # (B, H + K, T, hd)
            query, key, value = rotated[:, :H], rotated[:, H:], heads[:, :, H + K :].transpose(1, 2)
            if cache is not None:
                key, value = cache.append(layer_id, key, value)  # (B, K, S, hd)
            if T == 1 and cache is not None:
                mixed = single_token_attention(query, key, value, mask)  # (B, H, 1, hd)
            else:
                mixed = fused_attention(query, key, value, mask, causal=config.causal)  # (B, H, T, hd)
            x = x + layer.output(mixed.transpose(1, 2).flatten(2))
            gate, up = layer.gate_up(layer.ffn_norm(x)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        if cache is not None:
            cache.length += T
        hidden = self.norm(x)
        return self.output(hidden if targets is not None else last_token_state(hidden, attention_mask)[:, None]), hidden

    new_cache: Any = Llama.new_cache


def fast_model(llama: Llama, dtype: torch.dtype | None = None, quantize: str | None = None) -> LanguageModel:
    """The fastest form of a model for inference; do not use `llama` afterwards.

    It is an `InferenceLlama`; for differential attention, the Llama itself with products in `dtype`. Raises ValueError
    if differential attention is to be quantized.
    """
    if llama.config.attention_type == "softmax" or quantize is not None:
        return InferenceLlama(llama, dtype, quantize)
    weight = llama.tok_embeddings.weight
    llama.forward = autocast(weight.device, dtype or weight.dtype)(llama.forward)  # type: ignore
    return llama.eval()
