"""Norms, attention, masks and the whole model, against torch's own and against slow loops."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from config import LlamaConfig, feed_forward_size
from conftest import tiny_config, tiny_llama
from llama import (
    Attention,
    FeedForward,
    KVCache,
    LayerNorm,
    Llama,
    RMSNorm,
    last_token_state,
    load_pretrained,
)
from minillama.decoding import sampling as generation
from minillama.layers import kernels as kernels_module
from minillama.layers.masks import position_mask

DOUBLE_TOLERANCE = 1e-10
SHIFT_TOLERANCE = 2e-5  # a shifted row meets other angles of the float32 rotary tables

conventions = pytest.mark.parametrize(
    ("norm", "causal"), [(norm, causal) for norm in ("layernorm", "rmsnorm") for causal in (False, True)]
)
kernels = pytest.mark.parametrize("kernel", ["fused", "manual", "pieces"])


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


# Attention


def attention_by_loops(query, key, value, visible):
    """softmax(q k^T / sqrt(hd)) v, one query at a time over the keys it may see."""
    result = torch.zeros_like(query)
    B, H, T, hd = query.shape
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = visible[b, t].nonzero().flatten()
                scores = torch.stack([query[b, h, t] @ key[b, h, s] / math.sqrt(hd) for s in seen])
                weights = scores.exp() / scores.exp().sum()
                result[b, h, t] = sum(w * value[b, h, s] for w, s in zip(weights, seen, strict=True))
    return result


@pytest.mark.parametrize("kernel", ["manual", "fused", "pieces"])
@pytest.mark.parametrize("mask", ["none", "random"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_a_loop_over_the_visible_keys(kernel, mask, causal):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 5, 8, dtype=torch.float64)
    attention = Attention(tiny_config(causal=causal, attention_kernel=kernel)).eval()
    if mask == "none":
        given, visible = None, torch.ones(2, 5, 5).tril() if causal else torch.ones(2, 5, 5)
    else:
        visible = (torch.rand(2, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
        given = visible[:, None]
    got = attention.attend(query, key, value, given)
    torch.testing.assert_close(got, attention_by_loops(query, key, value, visible), atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_manual_and_fused_attention_agree_in_outputs_and_gradients(causal, n_kv_heads, padding):
    fused = tiny_llama(causal=causal, n_kv_heads=n_kv_heads).double()
    ids, mask = random_ids(3, 9), None
    if padding:
        ids, mask = padded([ids[0], ids[1, :4], ids[2, :1]], padding)
    results = []
    for model in (fused, with_kernel(fused, "manual")):
        logits, hidden = model(ids, ids, attention_mask=mask)
        gradients = torch.autograd.grad(logits.square().mean() + hidden.square().mean(), list(model.parameters()))
        results.append((logits, hidden, *gradients))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=DOUBLE_TOLERANCE, rtol=DOUBLE_TOLERANCE)


def test_the_config_chooses_the_kernel(monkeypatch):
    called = []
    for owner, path in ((Attention, "compute_query_key_value_scores"), (kernels_module, "fused_attention")):
        real = getattr(owner, path)
        monkeypatch.setattr(
            owner, path, lambda *a, path=path, real=real, **more: called.append(path) or real(*a, **more)
        )
    for kernel in ("manual", "fused"):
        tiny_llama(attention_kernel=kernel, n_layers=1)(random_ids(1, 3))
    assert called == ["compute_query_key_value_scores", "fused_attention"]


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_grouped_heads_equal_full_heads_with_repeated_weights(n_kv_heads):
    grouped = tiny_llama(n_kv_heads=n_kv_heads).double()
    full = Llama(replace(grouped.config, n_kv_heads=4)).double().eval()
    state = grouped.state_dict()
    for name in state:
        if "compute_key" in name or "compute_value" in name:
            heads = state[name].unflatten(0, (n_kv_heads, -1))
            state[name] = torch.stack([heads[h * n_kv_heads // 4] for h in range(4)]).flatten(0, 1)
    full.load_state_dict(state)
    ids = random_ids(2, 7)
    torch.testing.assert_close(grouped(ids)[1], full(ids)[1], atol=DOUBLE_TOLERANCE, rtol=0)


@kernels
def test_only_bidirectional_attention_sees_later_tokens(kernel):
    ids = random_ids(1, 8)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 64
    for causal in (True, False):
        model = tiny_llama(causal=causal, attention_kernel=kernel)
        before, after = model(ids)[1], model(changed)[1]
        assert torch.equal(before[:, :5], after[:, :5]) == causal
        assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


# Padding


@conventions
@kernels
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(7, 3, 1, 5), (2, 9)])
@torch.no_grad()
def test_a_row_alone_equals_the_row_padded_among_others(norm, causal, kernel, side, lengths):
    model = tiny_llama(norm=norm, causal=causal, attention_kernel=kernel)
    rows = [random_ids(1, length, seed=length)[0] for length in lengths]
    ids, mask = padded(rows, side)
    last, hidden = model(ids, attention_mask=mask)
    every, _ = model(ids, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        last_alone, hidden_alone = model(row[None])
        every_alone, _ = model(row[None], row[None])
        torch.testing.assert_close(hidden[i, mask[i]], hidden_alone[0], atol=SHIFT_TOLERANCE, rtol=SHIFT_TOLERANCE)
        torch.testing.assert_close(every[i, mask[i]], every_alone[0], atol=SHIFT_TOLERANCE, rtol=SHIFT_TOLERANCE)
        torch.testing.assert_close(last[i], last_alone[0], atol=SHIFT_TOLERANCE, rtol=SHIFT_TOLERANCE)


@conventions
@kernels
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_hidden_states_of_real_tokens_do_not_depend_on_what_pads_hold(norm, causal, kernel, side):
    model = tiny_llama(norm=norm, causal=causal, attention_kernel=kernel)
    rows = [random_ids(1, length, seed=length)[0] for length in (6, 2)]
    ids, mask = padded(rows, side, pad_id=0)
    others, _ = padded(rows, side, pad_id=63)
    zeros, threes = (model(batch, attention_mask=mask) for batch in (ids, others))
    assert torch.equal(zeros[1][mask], threes[1][mask])
    assert torch.equal(zeros[0], threes[0])


@conventions
@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(norm, causal):
    model = tiny_llama(norm=norm, causal=causal)
    ids = random_ids(2, 6)
    plain = model(ids, ids)
    for mask in (torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.int64)):
        for got, wanted in zip(model(ids, ids, attention_mask=mask), plain, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_id_that_also_serves_as_padding_counts_where_the_mask_says_so():
    model = tiny_llama()
    row = torch.tensor([5, 0, 7, 0])
    ids, mask = padded([row, random_ids(1, 6)[0]], "right", pad_id=0)
    torch.testing.assert_close(model(ids, attention_mask=mask)[0][0], model(row[None])[0][0], atol=1e-5, rtol=1e-5)


@conventions
@kernels
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_bring_no_nan_forward_or_backward(norm, causal, kernel, side):
    model = tiny_llama(norm=norm, causal=causal, attention_kernel=kernel)
    ids, mask = padded([random_ids(1, 5)[0], random_ids(1, 2)[0], torch.tensor([], dtype=torch.int64)], side)
    assert not mask[2].any()
    logits, hidden = model(ids, ids, attention_mask=mask)
    assert torch.isfinite(logits).all() and torch.isfinite(hidden).all()
    (logits.square().mean() + hidden.square().mean()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


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


def test_half_precision_on_the_cpu_goes_in_pieces(monkeypatch):
    attention = Attention(tiny_config())
    taken = []
    for path in ("fused_attention", "attention_in_pieces"):
        monkeypatch.setattr(kernels_module, path, lambda *_, path=path, **more: taken.append(path))
    query = torch.zeros(1, 4, 8, 8)
    for given in (query, query.bfloat16(), query.half(), query.bfloat16()[:, :, :1]):
        attention.attend(given, given, given, None)
    assert taken == ["fused_attention"] + 3 * ["attention_in_pieces"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("at_once", [1, 300, 10**9])
def test_the_pieces_are_the_whole(monkeypatch, causal, at_once):
    monkeypatch.setattr(kernels_module, "SCORES_AT_ONCE", at_once)
    attention = Attention(tiny_config(causal=causal, attention_kernel="pieces")).double()
    query, key, value = torch.randn(3, 5, 4, 7, 8, dtype=torch.float64).unbind()
    real = torch.arange(7) < torch.tensor([[7], [1], [4], [6], [2]])
    for mask in (None, position_mask(real, 7, causal, query.device)):
        got = attention.attend(query, key, value, mask)
        torch.testing.assert_close(got, attention.compute_query_key_value_scores(query, key, value, mask))


# The config


def test_n_kv_heads_none_means_as_many_as_heads():
    config = LlamaConfig(n_heads=8, n_kv_heads=None)
    assert config.n_kv_heads == config.kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30}, "dim 30 is not a multiple of n_heads 4"),
        ({"dim": 12}, r"dim / n_heads = 3 is odd"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"n_layers": 2.0}, "n_layers is 2.0; it must be a whole number"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dim": 10**400}, "dim is 1000.*; it must be a whole number of 1 or more, below 2"),
        ({"n_heads": torch.zeros(40, 40)}, r"n_heads is tensor\(\[\[0"),
        *(
            ({name: value}, f"{name} is {shown}.*; it must be {allowed}")
            for name, allowed in (
                ("dropout", r"in \[0, 1\)"),
                ("layer_norm_eps", "a number above 0"),
                ("rope_theta", "a number above 0"),
            )
            for value, shown in (
                ("0.5", "'0.5'"),
                (torch.tensor(0.5), r"tensor\(0.5"),
                (torch.rand(40, 40), r"tensor\("),
                (True, "True"),
                (None, "None"),
                (math.nan, "nan"),
                (10**400, "1000"),
            )
        ),
        *(
            ({name: value}, f"{name} is {shown}.*; it must be True or False")
            for name in ("causal", "tie_embeddings", "use_cache")
            for value, shown in (("false", "'false'"), ("no", "'no'"), (0, "0"), (torch.tensor(True), "tensor"))
        ),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; it must be one of layernorm, rmsnorm"),
        ({"attention_kernel": "flash"}, "attention_kernel is 'flash'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
    ],
)
def test_a_config_that_cannot_be_raises(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        tiny_config(**changes)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 200


def test_a_whole_number_will_do_where_a_fraction_could_stand():
    assert tiny_config(rope_theta=500_000, dropout=0).rope_theta == 500_000


def test_config_to_dict_and_back():
    config = tiny_config(norm="rmsnorm", causal=True, rope_theta=500000.0, tie_embeddings=False, hidden_dim=48)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="does not know: colour, shape"):
        LlamaConfig.from_dict({"dim": 32, "shape": 1, "colour": 2})


def test_the_convention_in_words():
    assert tiny_config().convention == "LayerNorm, bidirectional attention"
    assert tiny_config(norm="rmsnorm", causal=True).convention == "RMSNorm, causal attention"


# The cache


def read_in_parts(model, ids, mask, parts):
    """Logits (B, T, V) of the tokens, read through a cache in parts of these lengths."""
    cache, at, found = model.new_cache(), 0, []
    for size in parts:
        part = slice(at, at + size)
        found.append(model(ids[:, part], ids[:, part], None if mask is None else mask[:, part], cache=cache)[0])
        at += size
    assert cache.length == at == ids.shape[1]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_one_pass_is_one_prefill_is_chunks_is_token_by_token(dtype, tolerance, kv_heads, padded, norm):
    model = tiny_llama(causal=True, n_kv_heads=kv_heads, norm=norm).to(dtype)
    ids = random_ids(3, 20)
    mask = None
    if padded:
        mask = torch.ones(3, 20, dtype=torch.bool)
        mask[0, :5] = mask[2, :9] = False
    whole = model(ids, ids, mask)[0]
    for parts in ([20], [7, 13], [1, 19], [12, 1, 1, 3, 3], [1] * 20):
        torch.testing.assert_close(read_in_parts(model, ids, mask, parts), whole, rtol=0, atol=tolerance)


def test_the_cache_of_a_real_model_agrees(asset):
    model = load_pretrained(asset("stories260K/stories260K_v1.bin")).double()
    ids = torch.randint(512, (2, 150), generator=torch.Generator().manual_seed(0))
    whole = model(ids, ids)[0]
    for parts in ([150], [100, 50], [1] * 150):
        torch.testing.assert_close(read_in_parts(model, ids, None, parts), whole, rtol=0, atol=1e-9)


def test_what_a_cache_forgets_leaves_no_trace_and_rows_can_be_taken():
    model, ids = tiny_llama(causal=True).double(), random_ids(2, 12)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    cache = model.new_cache()
    model(ids[:, :5], attention_mask=mask, cache=cache)
    model(random_ids(2, 4, seed=9), cache=cache)
    cache.keep(5)
    cache.take(torch.tensor([1, 0, 1]))
    got = model(ids[[1, 0, 1], 5:], ids[:, 5:], cache=cache)[0]
    long = torch.cat((mask, torch.ones(2, 7, dtype=torch.bool)), dim=1)
    torch.testing.assert_close(got, model(ids, ids, long)[0][[1, 0, 1], 5:], rtol=0, atol=1e-9)


def test_padding_that_a_cache_forgets_hides_nothing_and_no_more_than_there_is_is_kept():
    model, ids = tiny_llama(causal=True).double(), random_ids(2, 9)
    cache = model.new_cache()
    model(ids[:, :4], cache=cache)
    cache.keep(7)
    assert cache.length == 4
    hidden = torch.tensor([[True, False, False], [False, True, False]])
    model(random_ids(2, 3, seed=9), attention_mask=hidden, cache=cache)
    cache.keep(4)
    got = model(ids[:, 4:], ids[:, 4:], cache=cache)[0]
    torch.testing.assert_close(got, model(ids, ids)[0][:, 4:], rtol=0, atol=1e-9)


def test_key_value_heads_are_stored_once_and_no_more_than_there_is_room_for():
    model = tiny_llama(causal=True, n_kv_heads=2)
    cache = model.new_cache(capacity=9)
    model(random_ids(3, 4), cache=cache)
    assert cache.keys[1].shape == cache.values[0].shape == (3, 2, 9, 8) and cache.length == 4
    with pytest.raises(ValueError, match="4 tokens are cached and 6 more do not fit into 9; start again with the last"):
        model(random_ids(3, 6), cache=cache)
    assert cache.length == 4
    model(random_ids(3, 5), cache=cache)
    assert model.new_cache(10**9).capacity == model.new_cache().capacity == model.config.max_seq_len


def test_a_bidirectional_model_has_no_cache():
    model = tiny_llama(causal=False)
    assert model.new_cache() is None and tiny_llama(causal=True, use_cache=False).new_cache() is None
    with pytest.raises(ValueError, match="a bidirectional model cannot use a cache"):
        KVCache(model.config)


@kernels
@pytest.mark.parametrize(
    "choice",
    [
        {"causal": False},
        {"causal": True},
        {"causal": True, "position_embedding_type": "alibi"},
        {"causal": True, "sliding_window": 4},
        {"causal": True, "attention_type": "differential"},
    ],
)
def test_sequences_packed_into_one_row_compute_what_each_does_alone(kernel, choice):
    model = with_kernel(tiny_llama(**choice), kernel).eval()
    sequences = [random_ids(1, length, seed=length) for length in (7, 1, 12, 5)]
    segments = torch.cat([torch.full((length,), n) for n, length in enumerate((7, 1, 12, 5))])[None]
    same = segments[:, :, None] == segments[:, None, :]
    row = torch.cat(sequences, 1)
    logits, _ = model(row, targets=row, attention_mask=same)
    alone = torch.cat([model(ids, targets=ids)[0] for ids in sequences], 1)
    torch.testing.assert_close(logits, alone, atol=SHIFT_TOLERANCE, rtol=SHIFT_TOLERANCE)
    together, _ = model(row, targets=row)
    assert (together - alone).abs().max() > 0.1
