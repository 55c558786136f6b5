"""Logits and gradients against the Llama of `transformers`, on random small shapes.

Two things differ between the implementations and are bridged here: the layout of query and key weights (interleaved
pairs in ours, split halves in theirs), and, for float64 only, two places where theirs drops to float32: its RMSNorm,
replaced by torch's, and the softmax of its eager attention, replaced by the `sdpa` attention.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from config import LlamaConfig
from llama import Llama

transformers = pytest.importorskip("transformers")

THEIR_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention.compute_query": "self_attn.q_proj",
    "attention.compute_key": "self_attn.k_proj",
    "attention.compute_value": "self_attn.v_proj",
    "attention.compute_output": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}


def their_name(name: str) -> str:
    """Our parameter's name in their state dict."""
    layer = ""
    if name.startswith("layers."):
        _, number, name = name.split(".", 2)
        layer = f"model.layers.{number}."
    return f"{layer}{THEIR_NAMES[name.removesuffix('.weight')]}.weight"


def to_split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of a query or key weight within each head: pairs (0, 1), (2, 3), ... become (0, hd/2), ..."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, hd / 2, 2, dim)
    return pairs.transpose(1, 2).flatten(0, 2)


def in_their_layout(config: LlamaConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights, or our gradients, by their names and in their layout."""
    theirs = {}
    for name, tensor in tensors.items():
        if "compute_query" in name:
            tensor = to_split_halves(tensor, config.n_heads)
        if "compute_key" in name:
            tensor = to_split_halves(tensor, config.kv_heads)
        theirs[their_name(name)] = tensor
    return theirs


def random_config(seed: int) -> LlamaConfig:
    """A small shape; over 24 seeds every value listed here occurs."""
    choose = random.Random(seed).choice
    n_kv_heads = [1, 2, 3, 4, 8][seed % 5]
    n_heads = n_kv_heads * choose([1, 2, 3])
    return LlamaConfig(
        vocab_size=choose([17, 50]),
        dim=n_heads * choose([2, 4, 6, 8]),
        n_layers=1 + seed % 3,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        max_seq_len=choose([24, 64]),
        layer_norm_eps=choose([1e-5, 1e-6, 1e-2]),
        multiple_of=choose([1, 8, 32]),
        hidden_dim=choose([None, 20]),
        norm="rmsnorm",
        causal=True,
        rope_theta=[10000.0, 500000.0, 1000.0][seed // 3 % 3],
        tie_embeddings=bool(seed // 2 % 2),
        attention_kernel=choose(["fused", "manual"]),
    )


def our_model(config: LlamaConfig, seed: int, dtype: torch.dtype) -> Llama:
    """Random weights that keep logits near 1, and norm weights that are not all one."""
    torch.manual_seed(seed)
    model = Llama(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def their_model(ours: Llama) -> torch.nn.Module:
    """Their Llama with our weights, in our dtype."""
    config, dtype = ours.config, ours.tok_embeddings.weight.dtype
    exact = dtype == torch.float64
    rotary = {"rope_type": "default", "rope_theta": config.rope_theta}
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=ours.layers[0].feed_forward.w1.out_features,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.layer_norm_eps,
        rope_theta=config.rope_theta,  # releases before 5
        rope_parameters=rotary,
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="sdpa" if exact else "eager",
    )
    model = transformers.LlamaForCausalLM(settings).eval()
    if exact:
        for name, module in list(model.named_modules()):
            if type(module).__name__ == "LlamaRMSNorm":
                model.set_submodule(name, torch.nn.RMSNorm(config.dim, eps=config.layer_norm_eps))
    model.to(dtype)
    model.load_state_dict(in_their_layout(config, ours.state_dict()), strict=True)
    return model


def gradients(model: torch.nn.Module, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def random_batch(config: LlamaConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, min(21, config.max_seq_len))
    return tuple(torch.randint(config.vocab_size, shape, generator=generator) for _ in range(2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("seed", range(24))
def test_logits_and_gradients_equal(seed, dtype, tolerance):
    config = random_config(seed)
    ours = our_model(config, seed, dtype)
    theirs = their_model(ours)
    ids, targets = random_batch(config, seed)

    our_logits, _ = ours(ids, targets)
    their_logits = theirs(ids, use_cache=False).logits
    assert our_logits.dtype == their_logits.dtype == dtype
    assert their_logits.std() > 0.1
    torch.testing.assert_close(our_logits, their_logits, atol=tolerance, rtol=0)

    our_gradients = in_their_layout(config, gradients(ours, our_logits, targets))
    their_gradients = gradients(theirs, their_logits, targets)
    assert set(our_gradients) == set(their_gradients)
    for name, gradient in their_gradients.items():
        assert gradient.abs().max() > 10 * tolerance, name
        torch.testing.assert_close(our_gradients[name], gradient, atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_real_tokens_equal_in_a_padded_batch(side):
    config = random_config(6)
    ours = our_model(config, 0, torch.float32)
    theirs = their_model(ours)
    ids, _ = random_batch(config, 0)
    mask = torch.ones_like(ids)
    mask[0, slice(None, 9) if side == "left" else slice(-9, None)] = 0
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask, use_cache=False).logits
        got, _ = ours(ids, ids, attention_mask=mask.bool())
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=0)


def test_the_layout_of_query_and_key_matters():
    config = LlamaConfig(
        vocab_size=17, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=24, norm="rmsnorm", causal=True
    )
    ours = our_model(config, 0, torch.float32)
    theirs = their_model(ours)
    theirs.load_state_dict({their_name(name): tensor for name, tensor in ours.state_dict().items()})
    ids, _ = random_batch(config, 0)
    assert (ours(ids, ids)[0] - theirs(ids, use_cache=False).logits).abs().max() > 1e-2


def test_the_random_shapes_cover_what_can_vary():
    configs = [random_config(seed) for seed in range(24)]
    assert {config.kv_heads for config in configs} == {1, 2, 3, 4, 8}
    assert {config.n_layers for config in configs} == {1, 2, 3}
    assert {config.rope_theta for config in configs} == {1000.0, 10000.0, 500000.0}
    assert {config.tie_embeddings for config in configs} == {True, False}
    assert {config.attention_kernel for config in configs} == {"fused", "manual"}
    assert {config.layer_norm_eps for config in configs} == {1e-5, 1e-6, 1e-2}
    assert {config.n_heads // config.kv_heads for config in configs} == {1, 2, 3}
    assert {config.head_dim for config in configs} == {2, 4, 6, 8}
