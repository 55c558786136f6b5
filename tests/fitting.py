"""A small classifier, and its training in a folder of its own."""

from __future__ import annotations

import torch
from torch import nn

from minillama.text.labelled import Row


class Bag(nn.Module):
    """The smallest model of the right shape: a mean of embeddings, and one score a class."""

    def __init__(self, classes=3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(20, classes, generator=generator))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.seen = []

    def forward(self, ids, mask=None):
        self.seen.append((self.training, ids.tolist()))
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        mean = (self.table[ids] * mask.unsqueeze(-1)).sum(1) / mask.sum(-1, keepdim=True)
        return mean.log_softmax(-1)


def some_rows(count=11, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator).tolist()  # noqa: E731
    return [Row(i % classes, f"row {i}", tuple(draw(0, 20, n))) for i, n in enumerate(draw(1, 9, count))]


def state_of(run):
    return torch.load(run.last_path, weights_only=True)


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert_same(dict(enumerate(a)), dict(enumerate(b)))
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
