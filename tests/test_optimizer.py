"""AdamW against a plain float64 account of its formula, and against torch's where the two agree."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch

from minillama.training.settings import learning_rate
from optimizer import AdamW, decay_groups, set_learning_rate

SHAPES = ((3, 4), (5,))


class PlainAdamW:
    """The formula, array by array: one object for each group."""

    def __init__(self, arrays, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True, clip=None):
        self.arrays = [np.array(array, dtype=np.float64) for array in arrays]
        self.m = [np.zeros_like(array) for array in self.arrays]
        self.v = [np.zeros_like(array) for array in self.arrays]
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.correct_bias, self.clip, self.t = correct_bias, clip, 0

    def step(self, gradients):
        self.t += 1
        b1, b2 = self.betas
        if self.clip is not None:
            norm = math.sqrt(sum((g**2).sum() for g in gradients))
            gradients = [g * min(1.0, self.clip / norm) for g in gradients]
        size = self.lr * math.sqrt(1 - b2**self.t) / (1 - b1**self.t) if self.correct_bias else self.lr
        for i, g in enumerate(gradients):
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
            self.arrays[i] = self.arrays[i] - size * self.m[i] / (np.sqrt(self.v[i]) + self.eps)
            self.arrays[i] = self.arrays[i] - self.lr * self.weight_decay * self.arrays[i]


def random_parameters(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def random_gradients(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def set_gradients(parameters, gradients) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype, copy=True)


def run(optimizer, parameters, steps, scale: float = 1.0) -> None:
    for step in steps:
        set_gradients(parameters, random_gradients(step, scale))
        optimizer.step()


SETTINGS = {
    "defaults": {},
    "decay": {"lr": 0.01, "weight_decay": 0.3},
    "betas": {"lr": 0.05, "betas": (0.5, 0.8), "eps": 1e-3},
    "no momentum": {"lr": 0.05, "betas": (0.0, 0.0)},
    "uncorrected": {"lr": 0.01, "correct_bias": False, "weight_decay": 0.1},
    "clipped": {"lr": 0.01, "max_grad_norm": 0.5, "eps": 0.1},
    "clipped rarely": {"lr": 0.01, "max_grad_norm": 4.0, "eps": 0.1, "weight_decay": 0.1},
    "large eps": {"lr": 0.1, "eps": 1.0},
    "more decay than fits": {"lr": 0.5, "weight_decay": 3.0},
}


def plain(parameters, settings) -> PlainAdamW:
    settings = {"clip" if key == "max_grad_norm" else key: value for key, value in settings.items()}
    return PlainAdamW([parameter.detach().numpy() for parameter in parameters], **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("fused", [True, False])
def test_equals_the_plain_formula(settings, dtype, tolerance, fused):
    parameters = random_parameters(dtype=dtype)
    reference = plain(parameters, settings)
    optimizer = AdamW(parameters, **settings, fused=fused)
    for step in range(20):
        gradients = random_gradients(step)
        set_gradients(parameters, gradients)
        optimizer.step()
        reference.step([gradient.numpy() for gradient in gradients])
        for got, wanted in zip(parameters, reference.arrays, strict=True):
            np.testing.assert_allclose(got.detach().numpy(), wanted, atol=tolerance, rtol=tolerance)


def test_the_defaults_are_the_contracts():
    group = AdamW(random_parameters()).param_groups[0]
    del group["params"]
    assert group == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.0,
        "correct_bias": True,
        "max_grad_norm": None,
    }
    assert isinstance(AdamW(random_parameters()), torch.optim.Optimizer)


def test_groups_keep_to_their_own_settings():
    groups = [random_parameters(seed) for seed in range(len(SETTINGS))]
    references = [plain(group, settings) for group, settings in zip(groups, SETTINGS.values(), strict=True)]
    optimizer = AdamW([{"params": group} | settings for group, settings in zip(groups, SETTINGS.values(), strict=True)])
    for step in range(10):
        for i, (group, reference) in enumerate(zip(groups, references, strict=True)):
            gradients = random_gradients(100 * i + step)
            set_gradients(group, gradients)
            reference.step([gradient.numpy() for gradient in gradients])
        optimizer.step()
    for group, reference in zip(groups, references, strict=True):
        for got, wanted in zip(group, reference.arrays, strict=True):
            np.testing.assert_allclose(got.detach().numpy(), wanted, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("eps", [0.0, 1e-14])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_equals_torchs_adamw_without_decay_at_a_vanishing_eps(eps, betas):
    ours, theirs = random_parameters(), random_parameters()
    settings = {"lr": 0.01, "betas": betas, "eps": eps, "weight_decay": 0.0}
    run(AdamW(ours, **settings), ours, range(30))
    run(torch.optim.AdamW(theirs, **settings), theirs, range(30))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


def test_one_step_equals_torchs_with_eps_scaled_by_the_correction():
    ours, theirs = random_parameters(), random_parameters()
    run(AdamW(ours, lr=0.01, eps=0.5 * math.sqrt(1 - 0.999)), ours, [0])
    run(torch.optim.AdamW(theirs, lr=0.01, eps=0.5, weight_decay=0.0), theirs, [0])
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_decay_comes_after_the_gradient_step():
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    parameter.grad = torch.tensor([5.0], dtype=torch.float64)
    AdamW([parameter], lr=0.1, eps=0.0, weight_decay=0.5).step()
    assert parameter.item() == pytest.approx((2.0 - 0.1) * (1 - 0.1 * 0.5), abs=1e-12)


def test_each_groups_gradients_are_clipped_to_its_own_norm():
    groups = [random_parameters(seed) for seed in range(3)]
    limits = (0.5, 1e-3, None)
    optimizer = AdamW([{"params": g, "max_grad_norm": m} for g, m in zip(groups, limits, strict=True)], lr=0.0)
    before = [random_gradients(i, 10.0) for i in range(3)]
    for group, gradients in zip(groups, before, strict=True):
        set_gradients(group, gradients)
    optimizer.step()
    for group, gradients, limit in zip(groups, before, limits, strict=True):
        flat, was = (torch.cat([t.flatten() for t in ts]) for ts in ([p.grad for p in group], gradients))
        assert flat.norm().item() == pytest.approx(limit or was.norm().item(), rel=1e-6)
        torch.testing.assert_close(flat / flat.norm(), was / was.norm(), atol=1e-9, rtol=0)


def test_gradients_under_the_limit_are_left_alone():
    parameters, gradients = random_parameters(), random_gradients(0)
    set_gradients(parameters, gradients)
    AdamW(parameters, max_grad_norm=1e6).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-3}, "learning rate is -0.001; it must be 0 or more"),
        ({"lr": math.nan}, "learning rate is nan"),
        ({"lr": math.inf}, "learning rate is inf"),
        ({"betas": (1.0, 0.999)}, r"betas are \(1.0, 0.999\); each must be in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"betas are \(0.9, -0.1\)"),
        ({"eps": -1e-8}, "eps is -1e-08; it must be 0 or more"),
        ({"eps": math.nan}, "eps is nan"),
        ({"weight_decay": -0.1}, "weight decay is -0.1; it must be 0 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be above 0, or None"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
    ],
)
def test_a_setting_out_of_range_raises(settings, message):
    with pytest.raises(ValueError, match=message):
        AdamW(random_parameters(), **settings)


@pytest.mark.parametrize("settings", [SETTINGS["decay"], SETTINGS["uncorrected"], SETTINGS["clipped"]])
def test_a_saved_and_reloaded_optimizer_continues_exactly(settings):
    straight = random_parameters(dtype=torch.float32)
    run(AdamW(straight, **settings), straight, range(12))

    parameters = random_parameters(dtype=torch.float32)
    optimizer = AdamW(parameters, **settings)
    run(optimizer, parameters, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    fresh = AdamW(resumed, lr=9.0)
    fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    run(fresh, resumed, range(5, 12))
    for got, wanted in zip(resumed, straight, strict=True):
        assert torch.equal(got, wanted)


def test_a_parameter_without_gradient_is_skipped():
    with_gradient, without = random_parameters()
    before = without.detach().clone()
    optimizer = AdamW([with_gradient, without], lr=0.1, weight_decay=0.5, max_grad_norm=1.0)
    with_gradient.grad = torch.ones_like(with_gradient)
    optimizer.step()
    assert torch.equal(without, before) and without not in optimizer.state
    assert optimizer.state[with_gradient]["step"] == 1


def test_a_parameter_that_joins_late_counts_its_own_steps():
    late, alone = random_parameters()[1], random_parameters()[1]
    other = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([other, late], lr=0.1)
    other.grad = torch.ones(2)
    optimizer.step()
    gradient = random_gradients(0)[1]
    late.grad, alone.grad = gradient.clone(), gradient.clone()
    optimizer.step()
    AdamW([alone], lr=0.1).step()
    assert torch.equal(late, alone)


def test_no_gradient_at_all_is_no_error():
    parameters = random_parameters()
    before = copy.deepcopy(parameters)
    AdamW(parameters, max_grad_norm=1.0, weight_decay=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_sparse_gradient_raises_and_changes_nothing(max_grad_norm):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; use torch.optim.SparseAdam"):
        AdamW(embedding.parameters(), max_grad_norm=max_grad_norm).step()
    assert torch.equal(embedding.weight, before)


def test_the_closure_runs_once_with_gradients_on_and_its_loss_is_returned():
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([parameter], lr=0.1)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        losses.append(loss)
        return loss

    returned = optimizer.step(closure)
    assert len(losses) == 1 and returned is losses[0] and returned.item() == 9.0
    assert parameter.item() == pytest.approx(2.9, abs=1e-5)
    assert optimizer.step() is None


def test_step_keeps_parameters_in_place_and_out_of_the_graph():
    parameters = random_parameters()
    addresses = [parameter.data_ptr() for parameter in parameters]
    run(AdamW(parameters, weight_decay=0.1), parameters, range(2))
    assert [parameter.data_ptr() for parameter in parameters] == addresses
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)


def test_the_fused_and_the_readable_update_agree():
    straight, fused = random_parameters(), random_parameters()
    settings = {"lr": 0.03, "weight_decay": 0.2, "max_grad_norm": 2.0}
    run(AdamW(straight, **settings, fused=False), straight, range(50))
    run(AdamW(fused, **settings, fused=True), fused, range(50))
    for got, wanted in zip(fused, straight, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_of_several_dtypes_go_together(fused):
    narrow, wide = random_parameters(dtype=torch.float32), random_parameters()
    optimizer = AdamW([*narrow, *wide], lr=0.01, fused=fused)
    for step in range(3):
        set_gradients(narrow, random_gradients(step))
        set_gradients(wide, random_gradients(step))
        optimizer.step()
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-6)


# Decay groups and the learning rate


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(5, 4))
    model[2].weight.requires_grad_(False)
    groups = decay_groups(model.named_parameters(), 0.3)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [{id(p) for p in group["params"]} for group in groups] == [
        {id(model[0].weight)},
        {id(model[0].bias), id(model[1].weight), id(model[1].bias)},
    ]
    assert len(decay_groups(torch.nn.LayerNorm(4).named_parameters(), 0.3)) == 1


def test_a_group_for_each_multiplier_gets_the_learning_rate_times_it():
    model = torch.nn.ModuleDict({"b": torch.nn.LayerNorm(4), "a": torch.nn.Linear(3, 4)})
    groups = decay_groups(model.named_parameters(), 0.3, lambda name: 8.0 if name.endswith("bias") else 1.0)
    optimizer = AdamW(groups)
    set_learning_rate(optimizer, 0.5)
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [
        (0.3, 0.5),
        (0.0, 0.5),
        (0.0, 4.0),
    ]
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(model["a"].weight)],
        [id(model["b"].weight)],
        [id(model["b"].bias), id(model["a"].bias)],
    ]
    plain = AdamW(model.parameters())
    set_learning_rate(plain, 0.5)
    assert plain.param_groups[0]["lr"] == 0.5


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate(step, 100, 2.0, "cosine", 10, 0.5) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.25) and rates[-1] == pytest.approx(0.5, abs=1e-3)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False)) and min(rates) > 0
    assert learning_rate(100, 100, 2.0, "cosine", 10, 0.5) == pytest.approx(0.5)
    assert {learning_rate(step, 5, 2.0) for step in range(5)} == {2.0}
    assert [learning_rate(step, 5, 2.0, "constant", 2) for step in range(4)] == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate(3, 3, 2.0, "cosine", 3) == 2.0  # all of it warm-up


def test_the_learning_rate_falls_linearly_in_the_last_share_of_the_steps():
    rates = [learning_rate(step, 100, 2.0, "linear", 10, 0.5, 0.4) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert set(rates[10:61]) == {2.0}
    assert rates[61:] == pytest.approx([2.0 - 1.5 * i / 40 for i in range(1, 41)])
    whole = [learning_rate(step, 100, 2.0, "linear", 10) for step in range(101)]  # falls from the end of the warm-up
    assert whole[10:] == pytest.approx([2.0 - 2.0 * i / 90 for i in range(91)])
    assert learning_rate(3, 3, 2.0, "linear", 3) == 2.0


def test_a_copied_optimizer_goes_on():
    parameters = random_parameters()
    optimizer = AdamW(parameters)
    run(optimizer, parameters, range(2))
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = again.param_groups[0]["params"]
        run(again, theirs, range(2, 4))
    run(optimizer, parameters, range(2, 4))
    assert all(torch.equal(ours, p) for ours, p in zip(theirs, parameters, strict=True))


def test_a_gradient_laid_out_otherwise_than_its_parameter():
    parameters = [torch.nn.Parameter(torch.ones(4, 5)) for _ in range(2)]
    gradient = torch.randn(5, 4).t()
    for parameter, fused in zip(parameters, (True, False), strict=True):
        parameter.grad = gradient
        AdamW([parameter], lr=0.1, fused=fused).step()
    torch.testing.assert_close(*parameters)
