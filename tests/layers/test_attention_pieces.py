"""Attention in pieces, against the readable path: outputs, gradients, groups of heads, masks and dropout."""

from __future__ import annotations

import pytest
import torch

from llama import Attention
from minillama.layers import attention_pieces
from minillama.layers.attention_pieces import attention_in_pieces
from minillama.layers.masks import position_mask
from models import tiny_config

B, H, T = 5, 4, 7


def heads(n, width=8, dtype=torch.float64):
    return torch.randn(B, n, T, width, dtype=dtype, requires_grad=True)


def with_gradients(mixed, inputs):
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return mixed, *torch.autograd.grad(mixed, inputs, weights.to(mixed.dtype))


def masks(causal):
    real = torch.arange(T) < torch.tensor([[7], [1], [4], [6], [2]])
    later = torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)
    return {
        "none": None,
        "padding": position_mask(real, T, causal, real.device),
        "added": torch.where(later, torch.randn(1, H, T, T, dtype=torch.float64), -torch.inf),
    }


@pytest.mark.parametrize("kind", ["none", "padding", "added"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "scores"), [(3, 1), (1, 300), (128, 10**9), (4, 170)])
def test_pieces_equal_the_readable_path_in_values_and_gradients(monkeypatch, kind, causal, key_heads, queries, scores):
    torch.manual_seed(0)
    monkeypatch.setattr(attention_pieces, "QUERIES_AT_ONCE", queries)
    monkeypatch.setattr(attention_pieces, "SCORES_AT_ONCE", scores)
    attention = Attention(tiny_config(causal=causal))
    query, key, value = inputs = heads(H), heads(key_heads), heads(key_heads, 6)
    mask = masks(causal)[kind]
    repeated = (x.repeat_interleave(H // key_heads, 1) for x in (key, value))
    wanted = with_gradients(attention.compute_query_key_value_scores(query, *repeated, mask), inputs)
    got = with_gradients(attention_in_pieces(*inputs, mask, causal=causal), inputs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_half_precision_stays_near_float64():
    inputs = heads(H), heads(2), heads(2)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    wanted = with_gradients(attention_in_pieces(*inputs, None, causal=True), inputs)
    got = with_gradients(attention_in_pieces(*halves, None, causal=True), halves)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_the_gradient_under_dropout_is_that_of_the_weights_that_were_kept():
    """Attention with a fixed draw is a plain function, so finite differences give its gradient."""
    torch.manual_seed(0)
    inputs = heads(H), heads(2), heads(2)

    def drawn(*inputs):
        torch.manual_seed(3)
        return attention_in_pieces(*inputs, None, causal=True, dropout=0.5)

    assert not torch.isclose(drawn(*inputs), attention_in_pieces(*inputs, None, causal=True)).all()
    few = tuple(x[:1, :, :3].detach().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(drawn, few)


def test_dropout_keeps_the_mean():
    query, key, value = torch.zeros(3, 1, 2, 64, 8)
    value += 1
    torch.manual_seed(0)
    mixed = attention_in_pieces(query, key, value, None, causal=False, dropout=0.25)
    assert mixed.mean() == pytest.approx(1, abs=0.02) and mixed.std() > 0.01
