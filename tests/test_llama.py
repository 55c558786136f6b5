"""Norms, the feed-forward part and the whole model, against torch's own and against slow loops."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from config import feed_forward_size
from llama import Attention, FeedForward, LayerNorm, Llama, RMSNorm, last_token_state
from minillama.decoding import sampling as generation
from models import random_ids, tiny_config, tiny_llama

conventions = pytest.mark.parametrize(
    ("norm", "causal"), [(norm, causal) for norm in ("layernorm", "rmsnorm") for causal in (False, True)]
)
kernels = pytest.mark.parametrize("kernel", ["fused", "manual", "pieces"])


# Norms


def norm_pair(kind: str, dim: int, eps: float):
    """Our norm and torch's, with the same random weights."""
    torch.manual_seed(0)
    ours = (LayerNorm if kind == "layernorm" else RMSNorm)(dim, eps)
    reference = (torch.nn.LayerNorm if kind == "layernorm" else torch.nn.RMSNorm)(dim, eps)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    reference.load_state_dict(ours.state_dict(), strict=True)
    return ours, reference


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_norm_equals_torchs_with_gradients(kind, eps, offset):
    ours, reference = norm_pair(kind, 24, eps)
    x = torch.randn(3, 5, 24) + offset
    results = []
    for norm in (ours, reference):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *norm.parameters()])])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norm_works_in_float32_or_wider_and_returns_the_inputs_dtype(kind, dtype):
    ours, reference = norm_pair(kind, 24, 1e-5)
    x = (300 * torch.randn(3, 5, 24)).to(dtype)  # squares that overflow float16
    got = ours(x)
    assert got.dtype == dtype
    wanted = reference.double()(x.double())
    rounded_once = 1e-14 if dtype == torch.float64 else 0.501 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, atol=min(rounded_once, 1e-5), rtol=rounded_once)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_starts_as_the_identity_on_normed_input(kind):
    norm = (LayerNorm if kind == "layernorm" else RMSNorm)(8, 1e-5)
    assert torch.equal(norm.weight, torch.ones(8))
    assert kind == "rmsnorm" or torch.equal(norm.bias, torch.zeros(8))


def test_norm_of_zeros_is_finite():
    for norm in (LayerNorm(8, 1e-5), RMSNorm(8, 1e-5)):
        assert torch.equal(norm(torch.zeros(2, 8)), torch.zeros(2, 8))


# Feed-forward


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "multiple_of", "wanted"),
    [(512, None, 32, 1376), (4096, None, 256, 11008), (288, None, 32, 768), (5, None, 1, 13), (64, 100, 32, 100)],
)
def test_feed_forward_size(dim, hidden_dim, multiple_of, wanted):
    assert feed_forward_size(dim, hidden_dim, multiple_of) == wanted
    if dim < 300:
        layer = FeedForward(dim, hidden_dim, multiple_of, 0.0)
        assert layer.w1.weight.shape == layer.w3.weight.shape == (wanted, dim)
        assert layer.w2.weight.shape == (dim, wanted)


def test_swiglu_gates_with_w1():
    torch.manual_seed(0)
    layer = FeedForward(8, 12, 4, 0.0).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    gate, up = x @ layer.w1.weight.T, x @ layer.w3.weight.T
    wanted = (gate / (1 + (-gate).exp()) * up) @ layer.w2.weight.T
    torch.testing.assert_close(layer.SwiGLU(x), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(x), wanted, atol=1e-12, rtol=0)


# The whole model


@conventions
def test_logits_are_the_last_positions_or_with_targets_all(norm, causal):
    model = tiny_llama(norm=norm, causal=causal)
    ids = random_ids(3, 6)
    last, hidden = model(ids)
    every, same_hidden = model(ids, torch.full((3, 6), -1))
    assert last.shape == (3, 1, 64) and every.shape == (3, 6, 64)
    assert hidden.shape == (3, 6, 32) and torch.equal(hidden, same_hidden)
    torch.testing.assert_close(last[:, 0], every[:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(every, hidden @ model.tok_embeddings.weight.T, atol=1e-5, rtol=1e-5)


@conventions
def test_hidden_states_are_after_the_final_norm(norm, causal):
    model = tiny_llama(norm=norm, causal=causal)
    with torch.no_grad():
        for parameter in model.norm.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
    hidden = model(random_ids(2, 6))[1]
    torch.testing.assert_close(hidden.square().mean(-1), torch.ones(2, 6), atol=1e-3, rtol=0)


def test_residual_projections_start_with_the_smaller_spread():
    torch.manual_seed(0)
    model = Llama(tiny_config(dim=128, vocab_size=256, n_layers=3, n_kv_heads=4))
    writes_into_the_stream = {"compute_output", "w2"}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        small = name.split(".")[-2] in writes_into_the_stream
        wanted = 0.02 / math.sqrt(6) if small else 0.02
        assert parameter.std().item() == pytest.approx(wanted, rel=0.04), name
        assert abs(parameter.mean().item()) < 1e-3, name


def test_embeddings_are_tied_or_not_as_the_config_says():
    tied, untied = tiny_llama(), tiny_llama(tie_embeddings=False)
    assert tied.output.weight is tied.tok_embeddings.weight
    assert untied.output.weight is not untied.tok_embeddings.weight
    assert not torch.isclose(untied.output.weight, untied.tok_embeddings.weight).all()
    parameters = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert parameters[1] - parameters[0] == 64 * 32
    tied(random_ids(1, 4))[0].sum().backward()
    assert (tied.tok_embeddings.weight.grad != 0).all(-1).all()


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_state_dict_has_the_fixed_keys(norm, tie_embeddings):
    model = tiny_llama(norm=norm, tie_embeddings=tie_embeddings, n_layers=2)
    model(random_ids(1, 4))
    wanted = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    for i in (0, 1):
        for projection in ("query", "key", "value", "output"):
            wanted.add(f"layers.{i}.attention.compute_{projection}.weight")
        for matrix in ("w1", "w2", "w3"):
            wanted.add(f"layers.{i}.feed_forward.{matrix}.weight")
        wanted |= {f"layers.{i}.attention_norm.weight", f"layers.{i}.ffn_norm.weight"}
    if norm == "layernorm":
        wanted |= {key.replace("norm.weight", "norm.bias") for key in wanted if key.endswith("norm.weight")}
    assert set(model.state_dict()) == wanted


@kernels
def test_dropout_acts_in_training_mode_only(kernel):
    model = tiny_llama(dropout=0.5, attention_kernel=kernel)
    plain = Llama(replace(model.config, dropout=0.0)).eval()
    plain.load_state_dict(model.state_dict())
    ids = random_ids(2, 6)
    assert torch.equal(model(ids)[1], plain(ids)[1])
    model.train()
    assert not torch.isclose(model(ids)[1], model(ids)[1]).all()


@pytest.mark.parametrize("place", ["dropout", "layers.1.attention.residual_dropout", "layers.1.feed_forward.dropout"])
def test_dropout_acts_at_each_of_its_places(place):
    model = tiny_llama(dropout=0.0).train()
    ids = random_ids(2, 6)
    assert torch.equal(model(ids)[1], model(ids)[1])
    model.get_submodule(place).p = 0.5
    assert not torch.equal(model(ids)[1], model(ids)[1])


@kernels
def test_attention_weights_are_dropped_in_training_mode_only(kernel):
    torch.manual_seed(0)
    attention = Attention(tiny_config(dropout=0.5, attention_kernel=kernel))
    query, key = torch.randn(2, 1, 2, 6, 8)
    ones = torch.ones(1, 2, 6, 8)
    attention.eval()
    torch.testing.assert_close(attention.attend(query, key, ones, None), ones)
    attention.train()
    assert (attention.attend(query, key, ones, None) - ones).abs().max() > 0.1


def test_a_bfloat16_model_stays_near_its_float32_self():
    model = tiny_llama(causal=True)
    ids = random_ids(2, 12)
    wanted = model(ids, ids)[0]
    got = model.bfloat16()(ids, ids)[0]
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0) > 0.999


def test_a_sequence_longer_than_the_context_raises():
    model = tiny_llama(max_seq_len=8)
    model(random_ids(1, 8))
    with pytest.raises(ValueError, match="9 tokens is longer than the model's context of 8"):
        model(random_ids(1, 9))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("changes", [{}, {"epsilon": 0.0}, {"attention_mask": None}, {"eos_ids": ()}])
def test_generate_hands_every_setting_to_the_decoding(temperature, changes):
    model, ids = tiny_llama(causal=True), random_ids(2, 4)
    mask = torch.tensor([[False, False, False, True], [True, True, True, True]])
    eos_ids = (model.generate(ids, 3, 0.0, attention_mask=mask)[0, 5].item(),)
    settings = {"temperature": temperature, "epsilon": 0.1, "attention_mask": mask, "eos_ids": eos_ids} | changes
    got, wanted = (
        decode(ids, 12, **settings, generator=torch.Generator().manual_seed(3))
        for decode in (model.generate, partial(generation.generate, model))
    )
    assert got.shape == (2, 16) and torch.equal(got, wanted)


def test_generate_defaults_to_temperature_1_and_epsilon_5_percent():
    model, ids = tiny_llama(causal=True), random_ids(4, 4)
    got = model.generate(ids, 20, generator=torch.Generator().manual_seed(3))
    wanted = model.generate(ids, 20, 1.0, 0.05, generator=torch.Generator().manual_seed(3))
    assert torch.equal(got, wanted)


# Shortcuts: what they skip changes nothing


@pytest.mark.parametrize("kernel", ["fused", "manual", "pieces"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_the_last_hidden_state_is_that_of_the_whole_pass_and_so_are_its_gradients(kernel, causal, padding):
    model = tiny_llama(causal=causal, attention_kernel=kernel).double()
    ids, mask = random_ids(3, 7), None
    if padding:
        real = torch.arange(7) < torch.tensor([[7], [1], [4]])
        mask = real if padding == "right" else real.flip(1)
    results = []
    for shortcut in (True, False):
        model.zero_grad()
        state = model.last_hidden(ids, mask) if shortcut else last_token_state(model(ids, attention_mask=mask)[1], mask)
        state.square().sum().backward()
        results.append([state, *(p.grad for p in model.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_norm_is_its_formula(dtype):
    norm = LayerNorm(24).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(3, 5, 24).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-6}[dtype]
    wide = x.to(torch.promote_types(dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), wanted.to(dtype), atol=tolerance, rtol=tolerance)
