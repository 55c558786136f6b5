"""Attention, masks and padding, against slow loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import llama as llama_module
from llama import Attention, Llama
from minillama.layers import kernels as kernels_module
from models import padded, random_ids, tiny_config, tiny_llama, with_kernel

DOUBLE_TOLERANCE = 1e-10
SHIFT_TOLERANCE = 2e-5  # a shifted row meets other angles of the float32 rotary tables


conventions = pytest.mark.parametrize(
    ("norm", "causal"), [(norm, causal) for norm in ("layernorm", "rmsnorm") for causal in (False, True)]
)
kernels = pytest.mark.parametrize("kernel", ["fused", "manual", "pieces"])


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


def test_half_precision_on_the_cpu_goes_in_pieces(monkeypatch):
    attention = Attention(tiny_config())
    taken = []
    for module, path in ((kernels_module, "fused_attention"), (llama_module, "attention_in_pieces")):
        monkeypatch.setattr(module, path, lambda *_, path=path, **more: taken.append(path))
    query = torch.zeros(1, 4, 8, 8)
    for given in (query, query.bfloat16(), query.half(), query.bfloat16()[:, :, :1]):
        attention.attend(given, given, given, None)
    assert taken == ["fused_attention"] + 3 * ["attention_in_pieces"]


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
