"""Rotary embedding against complex arithmetic, and its two properties: norms stay, only relative positions count."""

from __future__ import annotations

import pytest
import torch

from rope import apply_rotary_emb, reshape_for_broadcast, rotary_table, rotate, rotate_in_real_numbers


def turned_by_complex_numbers(x: torch.Tensor, theta: float) -> torch.Tensor:
    """The pair (2i, 2i+1) at position p as one complex number, times exp(1j * p * theta^(-2i/hd)), in float64."""
    seq_len, head_dim = x.shape[1], x.shape[-1]
    frequencies = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    angles = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequencies
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None, :]
    return torch.view_as_real(turned).flatten(-2)


def random_query_and_key(seq_len: int = 12, head_dim: int = 8, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, seq_len, 4, head_dim, generator=generator, dtype=torch.float64)
    key = torch.randn(2, seq_len, 2, head_dim, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_complex_multiplication(theta, head_dim, dtype):
    query, key = random_query_and_key(40, head_dim, dtype)
    turned = apply_rotary_emb(query, key, head_dim, 64, theta)
    for got, x in zip(turned, (query, key), strict=True):
        assert got.dtype == dtype and got.shape == x.shape
        # The angles are float32: at position 40 they are off by up to 40 * 2^-24, and a few roundings more.
        torch.testing.assert_close(got.double(), turned_by_complex_numbers(x, theta), atol=2e-5, rtol=0)


def test_theta_is_10000_unless_given():
    query, key = random_query_and_key()
    got = apply_rotary_emb(query, key, 8, 16)
    assert torch.equal(got[0], apply_rotary_emb(query, key, 8, 16, 10000.0)[0])
    assert not torch.equal(got[0], apply_rotary_emb(query, key, 8, 16, 20000.0)[0])


def test_first_position_is_not_turned():
    query, key = random_query_and_key()
    turned_query, turned_key = apply_rotary_emb(query, key, 8, 16)
    assert torch.equal(turned_query[:, 0], query[:, 0]) and torch.equal(turned_key[:, 0], key[:, 0])
    assert not torch.isclose(turned_query[:, 1], query[:, 1]).all(-1).any()


def test_the_norm_of_every_pair_is_kept():
    query, key = random_query_and_key(30, 16, torch.float64)
    for got, x in zip(apply_rotary_emb(query, key, 16, 32), (query, key), strict=True):
        norms = [t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (got, x)]
        torch.testing.assert_close(norms[0], norms[1], atol=1e-6, rtol=1e-6)


def test_scores_depend_on_relative_positions_only():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    turned_query, turned_key = apply_rotary_emb(query.expand(1, 20, 1, 16), key.expand(1, 20, 1, 16), 16, 20)
    scores = turned_query[0, :, 0] @ turned_key[0, :, 0].T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert scores[0].std() > 0.1


def test_result_does_not_depend_on_the_length_of_the_table():
    query, key = random_query_and_key()
    short, long = (apply_rotary_emb(query, key, 8, length) for length in (12, 500))
    assert torch.equal(short[0], long[0]) and torch.equal(short[1], long[1])


def test_bfloat16_input_meets_a_float32_table():
    query = torch.ones(1, 300, 1, 8, dtype=torch.bfloat16)
    turned, _ = apply_rotary_emb(query, query, 8, 300)
    wanted = turned_by_complex_numbers(query, 10000.0).to(torch.bfloat16)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, wanted, atol=2**-7, rtol=0)
    assert not torch.equal(turned[:, 256], turned[:, 257])


def test_the_table_is_float32_under_another_default_dtype():
    rotary_table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        table = rotary_table(8, 300, 10000.0, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
        rotary_table.cache_clear()
    assert table.dtype == torch.complex64 and table.shape == (300, 4)
    angle = torch.tensor(257.0, dtype=torch.float64)
    assert table[257, 0].real.item() == pytest.approx(angle.cos().item(), abs=1e-6)
    assert table[257, 0].imag.item() == pytest.approx(angle.sin().item(), abs=1e-6)


def test_gradient_is_turned_back():
    query, key = random_query_and_key(dtype=torch.float64)
    query.requires_grad_()
    turned, _ = apply_rotary_emb(query, key, 8, 16)
    (gradient,) = torch.autograd.grad(turned, query, turned.detach())
    torch.testing.assert_close(gradient, query.detach(), atol=1e-6, rtol=0)


def test_a_table_made_under_inference_mode_serves_training():
    rotary_table.cache_clear()
    query, key = random_query_and_key()
    with torch.inference_mode():
        apply_rotary_emb(query, key, 8, 16)
    query.requires_grad_()
    apply_rotary_emb(query, key, 8, 16)[0].sum().backward()
    assert torch.isfinite(query.grad).all()


def test_a_sequence_as_long_as_the_context_is_allowed_and_one_longer_raises():
    query, key = random_query_and_key(12)
    apply_rotary_emb(query, key, 8, 12)
    with pytest.raises(ValueError, match="12 tokens is longer than the model's context of 11"):
        apply_rotary_emb(query, key, 8, 11)


def test_reshape_for_broadcast_puts_the_table_on_positions_and_features():
    table = torch.arange(12.0).reshape(3, 4)
    view = reshape_for_broadcast(table, torch.zeros(2, 3, 5, 4))
    assert view.shape == (1, 3, 1, 4)
    assert torch.equal(view[0, :, 0], table)


def test_a_table_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"shape \(3, 4\) does not fit x of shape \(2, 4, 5, 4\)"):
        reshape_for_broadcast(torch.zeros(3, 4), torch.zeros(2, 4, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_real_numbers_rotate_as_complex_ones_do(dtype):
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    table = rotary_table(8, 5, 10000.0, torch.device("cpu"))
    found = rotate_in_real_numbers(x, torch.view_as_real(table))
    assert found.dtype == dtype
    torch.testing.assert_close(found, rotate(x, table), atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
