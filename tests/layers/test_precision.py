"""Precision: what autocast makes narrow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillama.layers.precision import autocast, bf16_is_native


def test_autocast_makes_matrix_products_narrow_and_leaves_the_loss_wide():
    linear = nn.Linear(8, 8)
    with autocast(torch.device("cpu"), torch.bfloat16):
        product = linear(torch.randn(2, 8))
        assert product.dtype == torch.bfloat16
        assert F.nll_loss(product.log_softmax(-1), torch.tensor([0, 1])).dtype == torch.float32
    with autocast(torch.device("cpu"), torch.float32):
        assert linear(torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    "capabilities, native",
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)],
)
def test_bf16_is_native_where_the_processor_says_so(monkeypatch, capabilities, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert bf16_is_native(torch.device("cpu")) is native
