"""Attention by torch's fused kernels: with key/value heads repeated or not, as the kernel needs."""

from __future__ import annotations

import pytest
import torch

from minillama.layers import kernels
from minillama.layers.kernels import fused_attention


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_grouped_heads_give_what_repeated_ones_do(native, masked, monkeypatch):
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, heads, 9, 8, generator=draw) for heads in (6, 2, 2))
    mask = torch.rand(2, 1, 9, 9, generator=draw) < 0.5 if masked else None
    if mask is not None:
        mask |= torch.eye(9, dtype=torch.bool)
    given = mask if mask is not None else torch.ones(9, 9, dtype=torch.bool).tril()
    scores = torch.einsum("bkgtd,bksd->bkgts", query.unflatten(1, (2, 3)), key) / 8**0.5
    weights = scores.masked_fill(~given[:, None] if mask is not None else ~given, -torch.inf).softmax(-1)
    wanted = torch.einsum("bkgts,bksd->bkgtd", weights, value).flatten(1, 2)
    monkeypatch.setattr(kernels, "takes_groups", lambda query, mask: native)
    torch.testing.assert_close(fused_attention(query, key, value, mask, causal=True), wanted, atol=1e-5, rtol=1e-5)


def test_on_cuda_only_unmasked_half_precision_takes_groups():
    def takes(dtype: torch.dtype, masked: bool, device: str) -> bool:
        mask = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device) if masked else None
        return kernels.takes_groups(torch.empty(1, 4, 3, 8, dtype=dtype, device=device), mask)

    assert takes(torch.bfloat16, False, "meta") and takes(torch.float16, False, "meta")
    assert not takes(torch.bfloat16, True, "meta") and not takes(torch.float32, False, "meta")
    assert takes(torch.float32, True, "cpu")
