"""A Llama for inference only: the results of `Llama` from fewer and faster matrix products.

A token costs the time to read every weight, and torch's work between the products. So query, key and value are one
product here, and so are gate and up. The weights are in the layout of oneDNN's kernels, or in 8 bits. One token for
one row on the CPU is computed by numba_step.py, twice as fast. One token for any rows on CUDA is computed by a graph of
cuda_decoder.py. `Llama` is the readable path; tests compare all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama, last_token_state
from minillama.decoding import cuda_decoder
from minillama.decoding.compiled_decoder import CompiledDecoder, Matrix, NotCompiled, covers, missing
from minillama.decoding.cuda_decoder import Append, CudaDecoder, NotCaptured
from minillama.decoding.sampling import LanguageModel
from minillama.layers.kernels import (
    Product,
    fused_attention,
    int8_is_fast,
    int8_weights,
    product_of,
    single_token_attention,
)
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

    The constructor takes the weights out of `llama` layer by layer, to save memory; `llama` is then empty. A weight
    that is packed is in memory twice if it is tied, as the embedding table and as the output product.

    dtype: of the products (default: that of the weights). quantize: "int8" or None. rows: how many texts are continued
    at once; one alone is decoded by the loops of numba_step.py, if they cover the model. tell: is given a line about
    their compilation, or about what they lack. The residual stream is at least float32; on the CPU, so are the inputs
    of attention.
    """

    @torch.no_grad()
    def __init__(
        self,
        llama: Llama,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        rows: int = 1,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        if quantize not in (None, *QUANTIZATIONS):
            raise ValueError(f"quantize is {quantize!r}; it must be one of {', '.join(QUANTIZATIONS)}")
        if llama.config.attention_type != "softmax":
            raise ValueError(f"{llama.config.attention_type} attention cannot be quantized; leave out --quantize")
        self.config, table = llama.config, llama.tok_embeddings.weight
        dtype = dtype or table.dtype
        self.decoder: CompiledDecoder | None = None
        self.tell = tell
        if rows == 1 and covers(self.config, table.device, dtype, quantize):
            if (lack := missing()) is None:
                self.decoder = CompiledDecoder(self.config, tell)
            else:
                self.tell_of_half_speed(lack)
        self.graphs = CudaDecoder(self.config) if cuda_decoder.covers(self.config, table.device) else None

        def matrix(*linears: nn.Linear) -> Matrix:
            parts = [linear.weight.detach().to(dtype) for linear in linears]
            weight = torch.cat(parts) if len(parts) > 1 else parts[0]
            return int8_weights(weight) if quantize == "int8" else (weight, None)

        widened = False

        def product(weight: Tensor, scale: Tensor | None) -> Product:
            nonlocal widened
            widened |= scale is not None and not int8_is_fast(weight, rows)
            return product_of(weight, scale, self.decoder is None, rows)  # the loops read the plain weights

        self.layers = []
        blocks, llama.layers = list(llama.layers), nn.ModuleList()
        while blocks:
            block: Any = blocks.pop(0)
            attention, feed_forward = block.attention, block.feed_forward
            qkv = matrix(attention.compute_query, attention.compute_key, attention.compute_value)
            output, gate_up = matrix(attention.compute_output), matrix(feed_forward.w1, feed_forward.w3)
            down = matrix(feed_forward.w2)
            self.layers.append(
                InferenceLayer(
                    block.attention_norm,
                    product(*qkv),
                    product(*output),
                    block.ffn_norm,
                    product(*gate_up),
                    product(*down),
                )
            )
            if self.decoder is not None:
                self.decoder.add_block(block.attention_norm, block.ffn_norm, (qkv, output, gate_up, down))
        self.tok_embeddings, self.norm = llama.tok_embeddings, llama.norm
        vocabulary = matrix(llama.output)
        llama.output = nn.Identity()  # type: ignore[assignment]
        self.output = product(*vocabulary)
        if widened:
            tell("notice: int8 is slower than bf16 on this GPU, so rounded weights are kept in bf16 and save no memory")
        if self.decoder is not None:
            self.decoder.add_head(self.norm, vocabulary)
            if not self.decoder.compiled.exists():
                self.has_loops()  # compiles them now, before the text begins

    def has_loops(self) -> bool:
        """Whether the compiled decoder can compute the next token. Loads it the first time."""
        if self.decoder is not None and self.decoder.loops is None:
            try:
                self.decoder.load()
            except NotCompiled as error:
                self.decoder = None
                self.tell_of_half_speed(str(error))
        return self.decoder is not None

    def tell_of_half_speed(self, reason: str) -> None:
        """Tells why torch computes what the compiled decoder would compute."""
        self.tell(f"notice: text comes at about half the speed, because {reason}")

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Llama.forward`."""
        if attention_mask is None and tokens.shape[1] == 1 and cache is not None and cache.length:
            if (found := self.next_step(tokens, cache)) is not None:
                return found
        config = self.config
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        mask = build_mask(tokens, attention_mask, cache, config, self.tok_embeddings.weight.dtype)
        table = None
        if config.position_embedding_type == "rotary":
            sizes = (config.head_dim, config.max_seq_len, config.rope_theta)
            table = rotary_rows(start, end, *sizes, tokens.device, config.rope_scaling)
        hidden = self.hidden_states(tokens, table, mask, None if cache is None else cache.append)
        if cache is not None:
            cache.length = end
        return self.output(hidden if targets is not None else last_token_state(hidden, attention_mask)[:, None]), hidden

    def next_step(self, tokens: Tensor, cache: KVCache) -> tuple[Tensor, Tensor] | None:
        """The result for one new token in each row (B, 1), from a decoder made for it. None: there is no such one."""
        if self.graphs is not None:
            try:
                return self.graphs(self.one_token, tokens, cache)
            except NotCaptured as error:
                self.graphs = None
                self.tell_of_half_speed(str(error))
        if len(tokens) == 1 and cache.real is None and self.has_loops():
            return self.decoder(at_least_float32(self.tok_embeddings(tokens))[0, 0], cache)  # type: ignore[misc]
        return None

    def hidden_states(self, tokens: Tensor, table: Tensor | None, mask: Tensor | None, append: Append | None) -> Tensor:
        """tokens (B, T) -> the states after the final norm (B, T, D).

        table: of `rotary_rows` for the T positions. mask: of `build_mask`. append: of the cache, see `KVCache.append`.
        """
        H, K, T = self.config.n_heads, self.config.kv_heads, tokens.shape[1]
        x = at_least_float32(self.tok_embeddings(tokens))  # (B, T, D)
        for layer_id, layer in enumerate(self.layers):
            heads = layer.query_key_value(layer.attention_norm(x)).unflatten(-1, (-1, self.config.head_dim))
            if heads.device.type == "cpu":
                heads = at_least_float32(heads)  # the CPU's attention is slow in half precision
            rotated = heads[:, :, : H + K] if table is None else rotate(heads[:, :, : H + K], table)
            rotated = rotated.transpose(1, 2)  # (B, H + K, T, hd)
            query, key, value = rotated[:, :H], rotated[:, H:], heads[:, :, H + K :].transpose(1, 2)
            if append is not None:
                key, value = append(layer_id, key, value)  # (B, K, S, hd)
            if T == 1 and append is not None:
                mixed = single_token_attention(query, key, value, mask)  # (B, H, 1, hd)
            else:
                mixed = fused_attention(query, key, value, mask, causal=self.config.causal)  # (B, H, T, hd)
            x = x + layer.output(mixed.transpose(1, 2).flatten(2))
            gate, up = layer.gate_up(layer.ffn_norm(x)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return self.norm(x)

    def one_token(self, tokens: Tensor, table: Tensor, mask: Tensor, append: Append) -> tuple[Tensor, Tensor]:
        """tokens (B, 1) -> logits (B, 1, V) and hidden states (B, 1, D). The parameters are as in `hidden_states`."""
        hidden = self.hidden_states(tokens, table, mask, append)
        return self.output(hidden), hidden

    new_cache: Any = Llama.new_cache


def fast_model(
    llama: Llama,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    rows: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> LanguageModel:
    """The fastest form of a model for inference; do not use `llama` afterwards.

    It is an `InferenceLlama`, which explains the parameters; for differential attention, the Llama itself with products
    in `dtype`. Raises ValueError if differential attention is to be quantized.
    """
    if llama.config.attention_type == "softmax" or quantize is not None:
        return InferenceLlama(llama, dtype, quantize, rows, tell)
    device = llama.tok_embeddings.weight.device
    dtype = dtype or llama.tok_embeddings.weight.dtype
    if dtype != torch.float32:  # cast here once, and not by autocast for each token
        for module in llama.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    llama.forward = autocast(device, dtype)(llama.forward)  # type: ignore
    return llama.eval()
