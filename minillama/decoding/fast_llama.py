"""A Llama for running only: what `Llama` computes, from fewer products, whose weights lie as the kernels read them.

What a token costs is the reading of every weight, and of what torch does between the products. So query, key and value
are one product here, and so are gate and up; the weights go into the layout of oneDNN's kernels, or into 8 bits; and no
module is called. `Llama` is the readable path; tests hold this one against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama, last_token_state
from minillama.decoding.sampling import LanguageModel
from minillama.layers.kernels import kernel_mask, single_token_attention
from minillama.layers.kv_cache import KVCache
from minillama.layers.masks import build_mask
from minillama.layers.precision import at_least_float32, autocast
from rope import rotary_rows, rotate

Product = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)
QUANTIZATIONS = ("int8",)
FEW_ROWS = 4  # up to which int8 weights are multiplied as they are; for more it pays to widen them first
INT8_WIDTH = 16  # torch's kernel for them reads past the end of rows that are no multiple of it


def dense_product(weight: Tensor) -> Product:
    """x W^T, W (out, in), in W's dtype."""
    return lambda x: F.linear(x.to(weight.dtype), weight)


def packed_product(weight: Tensor) -> Product:
    """x W^T on the CPU with W in the blocked layout of oneDNN, by the kernels that torch.compile uses. For few rows it
    takes half the time of torch's own product in float32 and in bfloat16 (docs/results.md).
    """
    width, dtype = weight.shape[1], weight.dtype
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # a layout for some rows
    linear = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if x.numel() > width:
            return linear(x, packed, None, "none", [], "")
        # The kernel for four rows reads the weights a fifth faster than that for one.
        return linear(x.view(1, width).expand(4, -1), packed, None, "none", [], "")[:1].view(*x.shape[:-1], -1)

    return product


def int8_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) as whole numbers from -127 to 127, int8, and a scale for each output, (out,), whose products they
    are: the row's largest weight / 127, in bfloat16 before the weights are divided by it.
    """
    wide = weight.float()
    scale = (wide.abs().amax(1).clamp(min=1e-30) / 127).to(torch.bfloat16)
    return (wide / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def int8_product(weight: Tensor) -> Product:
    """x W^T with W in 8 bits and x in bfloat16; the sums are float32."""
    whole, scale = int8_weights(weight)
    has_kernel = weight.device.type == "cpu" and weight.shape[1] % INT8_WIDTH == 0

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        if has_kernel and len(rows) <= FEW_ROWS:
            out = torch._weight_int8pack_mm(rows, whole, scale)
        else:
            out = F.linear(rows, whole.to(torch.bfloat16)) * scale
        return out.view(*x.shape[:-1], -1)

    return product


def product_of(weight: Tensor, quantize: str | None) -> Product:
    """The fastest there is for a weight, where it is."""
    if quantize == "int8":
        return int8_product(weight)
    return packed_product(weight) if packs(weight) else dense_product(weight)


def packs(weight: Tensor) -> bool:
    """Whether this torch, on this processor, has a layout of oneDNN's for the weight."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or weight.dtype == torch.float32


class InferenceLayer(NamedTuple):
    """A `LlamaLayer` as products and norms alone."""

    attention_norm: nn.Module
    query_key_value: Product  # (B, T, D) -> (B, T, (H + 2 K) hd)
    output: Product
    ffn_norm: nn.Module
    gate_up: Product  # (B, T, D) -> (B, T, 2 F)
    down: Product


class InferenceLlama:
    """Computes what `Llama.forward` does, in evaluation mode, without gradients.

    Takes the weights over layer by layer, so that they are held once: the Llama that is given is empty afterwards. (An
    output tied to the embedding is held twice, as the table that is looked up and as the product needs it.)

    dtype: of the products (default: the weights'). quantize: "int8", or None. What adds up over the layers and, on the
    CPU, what attention reads are float32 either way, or float64 if the weights are.
    """

    @torch.no_grad()
    def __init__(self, llama: Llama, dtype: torch.dtype | None = None, quantize: str | None = None) -> None:
        if quantize not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantize is {quantize!r}; it must be one of {', '.join(QUANTIZATIONS)}")
        if llama.config.attention_type != "softmax":
            raise ValueError(
                f"a model with {llama.config.attention_type} attention has no copy for running only, so none in 8 "
                "bits; leave out --quantize"
            )
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
        visible = build_mask(tokens, attention_mask, cache, config, x.dtype)
        table = None  # ALiBi is in what is visible
        if config.position_embedding_type == "rotary":
            table = rotary_rows(
                start,
                start + T,
                config.head_dim,
                config.max_seq_len,
                config.rope_theta,
                tokens.device,
                config.rope_scaling,
            )
        for layer_id, layer in enumerate(self.layers):
            heads = layer.query_key_value(layer.attention_norm(x)).unflatten(-1, (-1, config.head_dim))
            if heads.device.type == "cpu":
                heads = at_least_float32(heads)  # the kernels for attention in half precision are slow there
            turned = heads[:, :, : H + K] if table is None else rotate(heads[:, :, : H + K], table)
            turned = turned.transpose(1, 2)  # (B, H + K, T, hd)
            query, key, value = turned[:, :H], turned[:, H:], heads[:, :, H + K :].transpose(1, 2)
            if cache is not None:
                key, value = cache.append(layer_id, key, value)  # (B, K, S, hd)
            if T == 1 and cache is not None:
                mixed = single_token_attention(query, key, value, visible)  # (B, H, 1, hd)
            else:
                mixed = F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    attn_mask=kernel_mask(visible, query.dtype),
                    is_causal=config.causal and visible is None,
                    enable_gqa=True,
                )  # (B, H, T, hd)
            x = x + layer.output(mixed.transpose(1, 2).flatten(2))
            gate, up = layer.gate_up(layer.ffn_norm(x)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        if cache is not None:
            cache.length += T
        hidden = self.norm(x)
        return self.output(hidden if targets is not None else last_token_state(hidden, attention_mask)[:, None]), hidden

    def new_cache(self, capacity: int | None = None) -> KVCache | None:
        """See `Llama.new_cache`."""
        return KVCache(self.config, capacity) if self.config.causal and self.config.use_cache else None


def fast_model(llama: Llama, dtype: torch.dtype | None = None, quantize: str | None = None) -> LanguageModel:
    """The fastest there is to run a model with: an `InferenceLlama`, or for what that does not compute, differential
    attention, the Llama itself, its products in dtype (default: the weights'). Either way the one that is given is used
    up. Raises ValueError for `quantize` where only the Llama will do.
    """
    if llama.config.attention_type == "softmax" or quantize is not None:
        return InferenceLlama(llama, dtype, quantize)
    weight = llama.tok_embeddings.weight
    llama.forward = autocast(weight.device, dtype or weight.dtype)(llama.forward)  # type: ignore
    return llama.eval()
