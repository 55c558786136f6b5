"""Muon against a float64 account of its formula by singular values, its groups, and what is saved of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from models import random_ids, tiny_llama
from optimizer import AdamW, Muon, decay_groups, orthogonalized

SHAPES_OF_HIDDEN = ((6, 6), (4, 10), (10, 4), (4, 10))


def polynomial_of_singular_values(matrix: np.ndarray) -> np.ndarray:
    """U f(...f(S / |S|)) V^T with five applications of f."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (1, 4), (2, 3, 7)])
def test_the_products_apply_the_polynomial_to_the_singular_values(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(x).numpy().reshape(-1, *shape[-2:])
    for got, matrix in zip(found, x.numpy().reshape(found.shape), strict=True):
        np.testing.assert_allclose(got, polynomial_of_singular_values(matrix), atol=1e-6)


def test_most_singular_values_come_near_one_in_bfloat16_too():
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalized(x.to(dtype)).float())
        assert 0.6 < values.min() and values.max() < 1.25


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonalized(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_steps_equal_the_formula(dtype):
    draw = torch.Generator().manual_seed(1)
    lr, decay, momentum = 0.02, 0.3, 0.9
    hidden = [
        torch.nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype)) for s in SHAPES_OF_HIDDEN
    ]
    other = torch.nn.Parameter(torch.randn(7, 5, generator=draw, dtype=torch.float64).to(dtype))
    alone = torch.nn.Parameter(other.detach().clone())
    groups = [{"params": hidden, "hidden": True}, {"params": [other]}]
    optimizer = Muon(groups, momentum=momentum, dtype=dtype, lr=lr, weight_decay=decay)
    adamw = AdamW([alone], lr=lr, weight_decay=decay)
    wanted = [p.detach().double().numpy().copy() for p in hidden]
    memory = [np.zeros_like(array) for array in wanted]
    for _ in range(10):
        for p in (*hidden, other):
            p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(dtype)
        alone.grad = other.grad.clone()
        optimizer.step()
        adamw.step()
        for i, p in enumerate(hidden):
            gradient = p.grad.double().numpy()
            memory[i] = momentum * memory[i] + gradient
            direction = polynomial_of_singular_values(gradient + momentum * memory[i])
            wanted[i] = wanted[i] - lr * 0.2 * np.sqrt(max(p.shape)) * direction
            wanted[i] = wanted[i] * (1 - lr * decay)
            tolerance = 1e-6 if dtype == torch.float64 else 2e-4
            np.testing.assert_allclose(p.detach().numpy(), wanted[i], atol=tolerance)
    assert torch.equal(other, alone)  # AdamW's, exactly


def test_the_matrices_of_the_layers_are_hidden_and_nothing_else():
    model = tiny_llama(tie_embeddings=False)
    groups = decay_groups(model.named_parameters(), 0.1, hidden=True)
    names = {id(p): name for name, p in model.named_parameters()}
    by_kind = {(bool(g.get("hidden")), g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert by_kind[False, 0.1] == {"tok_embeddings.weight", "output.weight"}
    assert all("norm" in name for name in by_kind[False, 0.0])
    layers = len(model.layers)
    assert len(by_kind[True, 0.1]) == 7 * layers and not any("norm" in name for name in by_kind[True, 0.1])
    assert sum(map(len, by_kind.values())) == len(names)


def test_a_saved_optimizer_goes_on_bit_for_bit():
    def steps(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            (losses, _), _ = model(random_ids(2, 8, seed=seed), random_ids(2, 8, seed=seed + 1), losses=True)
            losses.mean().backward()
            optimizer.step()

    def made(model):
        return Muon(decay_groups(model.named_parameters(), 0.1, hidden=True), lr=0.01)

    model = tiny_llama()
    optimizer = made(model)
    steps(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = made(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, range(3, 6))
    steps(other, resumed, range(3, 6))
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
