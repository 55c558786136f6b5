"""The loss of tokens in pieces, against torch's cross-entropy of all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minillama.layers import token_losses as module
from minillama.layers.precision import autocast
from minillama.layers.token_losses import token_losses

IGNORED = -100
CPU = torch.device("cpu")


def problem(dtype, V=37, D=8, B=3, T=11):
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (B, T))
    targets[0, 3:6] = IGNORED
    return hidden, weight, targets


def whole(hidden, weight, targets):
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    losses = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets), logits.argmax(-1) == targets


def with_gradients(function, hidden, weight, targets, dtype=torch.float32):
    with autocast(CPU, dtype):
        losses, hits = function(hidden, weight, targets)
    each = torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view_as(losses)  # tokens of different weight
    return losses, hits, *torch.autograd.grad((losses * each).sum(), (hidden, weight))


@pytest.mark.parametrize("at_once", [1, 5, 33, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_losses_hits_and_gradients_are_those_of_all_logits(monkeypatch, at_once, dtype, tolerance):
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", at_once)
    got, wanted = (with_gradients(function, *problem(dtype)) for function in (token_losses, whole))
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)
    assert not got[0][0, 3:6].any() and not got[1][0, 3:6].any() and not got[2][0, 3:6].any()


def test_under_autocast_losses_are_float32_and_gradients_close(monkeypatch):
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", 8)
    got, wanted = (with_gradients(f, *problem(torch.float32), torch.bfloat16) for f in (token_losses, whole))
    exact = with_gradients(whole, *problem(torch.float32))
    assert [one.dtype for one in got] == [one.dtype for one in wanted]
    assert not torch.equal(got[0], exact[0])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    for one, other, truth in zip(got[2:], wanted[2:], exact[2:], strict=True):
        assert (one - truth).norm() < 1.5 * (other - truth).norm() < 0.02 * truth.norm()


def test_a_weight_in_half_precision_gets_its_own_dtype():
    hidden, weight, targets = problem(torch.bfloat16)
    losses, _, *gradients = with_gradients(token_losses, hidden, weight, targets)
    assert losses.dtype == torch.float32 and {gradient.dtype for gradient in gradients} == {torch.bfloat16}


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, targets = problem(torch.float32)
    token_losses(hidden, weight.detach(), targets)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_far_logits_stay_finite():
    hidden, weight, targets = (x * 1e3 if x.dtype.is_floating_point else x for x in problem(torch.float32))
    losses, _, *gradients = with_gradients(token_losses, hidden, weight, targets)
    torch.testing.assert_close(losses, whole(hidden, weight, targets)[0])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_logits_of_all_tokens_are_never_held(monkeypatch):
    monkeypatch.setitem(module.TOKENS_AT_ONCE, "cpu", 4)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, one.numel() if isinstance(one, torch.Tensor) else 0)
            return out

    with Watch():
        with_gradients(token_losses, *problem(torch.float32))
    assert largest < 33 * 37
