"""SMART against brute force in float64, and its gradient against differences; R-Drop by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fitting import classifier, losses, plain, some_texts, task
from minillama.text.batches import to_batch
from minillama.training.evaluation import forward
from minillama.training.regularizers import MovingAverage, Smart, random_state, replayed, shifted, symmetric_kl


def noise_of_the_position(monkeypatch):
    """Noise that a row gets in any batch, in the place of what is drawn."""

    def fixed(*shape, **kind):
        entries = torch.arange(shape[1] * shape[2], **kind).view(1, *shape[1:])
        return (1.7 * entries).sin().expand(shape).clone()

    monkeypatch.setattr(torch, "randn", fixed)


# SMART


def moved(model, ids, by):
    with shifted(model.llama.tok_embeddings, by):
        return model(ids)


@pytest.mark.parametrize("head", ["linear", "prompt"])
@pytest.mark.parametrize("classes, share", [(2, 0.98), (3, 0.7)])
def test_one_step_comes_near_the_worst_move_and_never_above(head, classes, share):
    """The maximum by steps of ascent from corner to corner, from each of eight beginnings, in float64; no corner
    drawn at random is above it."""
    model = classifier(head, classes=classes, layer_norm_eps=1e-3).double()
    ids, eps = torch.tensor([[5, 9, 13, 4]]), 1e-5
    with torch.no_grad():
        clean = model(ids)
    torch.manual_seed(1)

    def divergence(by):
        return symmetric_kl(moved(model, ids, by), clean)

    highest = 0.0
    for _ in range(8):
        by = (eps * torch.randn(1, 4, 8, dtype=torch.float64).sign()).requires_grad_()
        for _ in range(15 if classes > 2 else 3):
            by = (eps * torch.autograd.grad(divergence(by).sum(), by)[0].sign()).requires_grad_()
        highest = max(highest, divergence(by).item())
    with torch.no_grad():
        corners = [divergence(eps * torch.randn(1, 4, 8, dtype=torch.float64).sign()).item() for _ in range(200)]
    assert highest > max(corners) > 0
    found = [Smart(2.0, eps).penalty(model, ids.shape, lambda: model(ids), model(ids)).item() / 2.0 for _ in range(10)]
    assert max(found) <= highest * (1 + 1e-6) and sorted(found)[5] > share * highest
    assert min(found) > 3 * sum(corners) / len(corners)  # the step matters, not the noise alone


def test_symmetric_kl_is_both_ways_of_kl():
    log_p, log_q = (torch.randn(5, 4, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    one, other = (
        nn.functional.kl_div(a, b, log_target=True, reduction="none").sum(-1)
        for a, b in ((log_p, log_q), (log_q, log_p))
    )
    torch.testing.assert_close(symmetric_kl(log_p, log_q), one + other)


def test_the_move_stays_within_eps_whatever_the_noise(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "minillama.training.regularizers.shifted",
        lambda embedding, by: seen.append(by.detach()) or shifted(embedding, by),
    )
    losses(classifier(), task(smart=Smart(1.0, eps=1e-3, step=1e-2, noise=1.0)))
    first, worst = seen
    assert first.std() > 0.5 and worst.abs().max() <= 1e-3 and (worst.abs() == 1e-3).double().mean() > 0.5
    assert first.shape == worst.shape == (5, 5, 8)


def test_the_step_goes_up_from_the_noise(monkeypatch):
    """Far from where the divergence is least, a small step up raises it and one down lowers it."""
    model, rows = classifier(classes=3, layer_norm_eps=1e-3).double(), some_texts((4, 4, 4, 4), classes=3)
    seen = []
    monkeypatch.setattr(
        "minillama.training.regularizers.shifted",
        lambda embedding, by: seen.append(by.detach()) or shifted(embedding, by),
    )
    ids = torch.tensor([row.ids for row in rows])
    torch.manual_seed(0)
    Smart(1.0, eps=1.0, step=1e-3, noise=0.1).penalty(model, ids.shape, lambda: model(ids), model(ids))
    with torch.no_grad():
        at_noise, at_worst = (symmetric_kl(moved(model, ids, by), model(ids)) for by in seen)
    assert (at_worst > at_noise * (1 + 1e-4)).all()


def test_the_form_of_the_authors_program(monkeypatch):
    """The move has eps as its largest entry in each token; the targets of both divergences are constants."""
    model = classifier(classes=3, layer_norm_eps=1e-3).double()
    ids = torch.tensor([[5, 9, 13, 4], [7, 2, 2, 8]])
    smart = Smart(2.0, eps=0.3, step=1e-3, noise=1e-5, form="program")
    seen = []
    monkeypatch.setattr(
        "minillama.training.regularizers.shifted",
        lambda embedding, by: seen.append(by) or shifted(embedding, by),
    )
    clean = model(ids)
    found = smart.penalty(model, ids.shape, lambda: model(ids), clean)
    noise, move = seen
    (slope,) = torch.autograd.grad(symmetric_kl(moved(model, ids, noise), clean.detach()).sum(), noise)
    direction = noise + 1e-3 * slope
    torch.testing.assert_close(move, 0.3 * direction / direction.abs().max(-1, keepdim=True).values)
    assert torch.allclose(move.abs().amax(-1), torch.full((2, 4), 0.3, dtype=torch.float64))

    there = moved(model, ids, move)
    torch.testing.assert_close(found, 2.0 * symmetric_kl(there, clean))
    weights = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(found.sum(), weights, retain_graph=True)
    # KL's gradient with a constant target p, by log q: -p.
    outer = -2.0 * torch.cat([there.exp().detach(), clean.exp().detach()])
    wanted = torch.autograd.grad(torch.cat([clean, there]), weights, outer)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head", ["linear", "prompt"])
@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_the_gradient_is_that_of_the_divergence_at_the_move_found(monkeypatch, head, option):
    """By central differences in float64, the move kept (it is where the maximum is: arXiv 1911.03437, Algorithm 1)."""
    model = classifier(head, option, classes=3, layer_norm_eps=1e-3).double()
    rows = some_texts(classes=3)
    chosen, base = task(rows, smart=Smart(50.0, eps=0.05, step=0.1, noise=0.05)), task(rows)
    kept = []
    monkeypatch.setattr(
        "minillama.training.regularizers.shifted",
        lambda embedding, by: kept.append(by.detach()) or shifted(embedding, by),
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    term = losses(model, chosen).sum() - losses(model, base).sum()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(term, weights)])
    batch = to_batch(rows, list(range(5)), 0)

    @torch.no_grad()
    def value():
        clean = model(batch.ids, batch.mask)
        with shifted(model.llama.tok_embeddings, kept[1]):
            return 50.0 * symmetric_kl(model(batch.ids, batch.mask), clean).sum().item()

    assert value() == pytest.approx(term.item(), rel=1e-9) and term > 0
    draw = torch.Generator().manual_seed(0)
    for place in torch.randint(len(gradient), (25,), generator=draw).tolist():
        values, at = [], place
        for weight in weights:
            if at < weight.numel():
                break
            at -= weight.numel()
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                weight.view(-1)[at] += step
            values.append(value())
        with torch.no_grad():
            weight.view(-1)[at] += 1e-6
        assert gradient[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-6)
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_term_is_float32s(dtype):
    """In bfloat16 the products' rounding would change the distribution far more than a move of 1e-5 does."""
    model = classifier(dim=32, n_layers=2, n_heads=4)
    chosen = task(smart=Smart(1e6, eps=1e-5, step=1e-3, noise=1e-5))
    exact, rounded = ((losses(model, chosen, dtype=d) - plain(model, dtype=d)).detach() for d in (torch.float32, dtype))
    assert exact.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=1e-6)
    assert exact.min() > 1e-3
    batch = to_batch(some_texts(), list(range(5)), 0)
    torch.manual_seed(0)
    all_in_half = chosen.smart.penalty(
        model,
        batch.ids.shape,
        lambda: forward(model, batch.ids, batch.mask, dtype),
        forward(model, batch.ids, batch.mask, dtype),
    )
    # What this guards against; how much float16 rounds depends on the processor's kernels.
    assert (all_in_half - exact).abs().max() > (3 if dtype == torch.bfloat16 else 1.5) * exact.max()


def test_smart_compares_passes_under_one_dropout_mask():
    """A move of nearly nothing changes nearly nothing; two masks would."""
    model = classifier(dropout=0.4)
    tiny = task(smart=Smart(1.0, eps=1e-9, noise=1e-9))
    torch.testing.assert_close(losses(model, tiny), plain(model), atol=1e-6, rtol=0)
    torch.manual_seed(0)
    two = [forward(model, *to_batch(some_texts(), [0, 1, 2, 3, 4], 0)[:2], torch.float32) for _ in range(2)]
    assert symmetric_kl(*two).min() > 1e-3


def test_what_is_replayed_leaves_no_trace():
    torch.manual_seed(5)
    before = random_state(torch.device("cpu"))
    first, second = torch.randn(3), torch.randn(3)
    torch.set_rng_state(before[0])
    assert torch.equal(torch.randn(3), first)
    with replayed(before, torch.device("cpu")):
        assert torch.equal(torch.randn(3), first)
    assert torch.equal(torch.randn(3), second)


# R-Drop


def test_r_drop_is_two_cross_entropies_and_half_the_symmetric_kl():
    model = classifier(dropout=0.4)
    batch = to_batch(some_texts(), [0, 1, 2, 3, 4], 0)
    torch.manual_seed(0)
    one, other = (model(batch.ids, batch.mask).double() for _ in range(2))
    assert not torch.equal(one, other)
    kl = [
        nn.functional.kl_div(a, b, log_target=True, reduction="none").sum(-1) for a, b in ((one, other), (other, one))
    ]
    rows = torch.arange(5)
    wanted = -one[rows, batch.labels] - other[rows, batch.labels] + 2.5 * (kl[0] + kl[1]) / 2
    got = losses(model, task(r_drop=2.5)).double()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


# All of them


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_regularizer_nothing_is_other_than_before(dtype, smoothing):
    model = classifier(dropout=0.4)
    wanted, after = plain(model, dtype=dtype, smoothing=smoothing), torch.get_rng_state()
    assert torch.equal(losses(model, task(label_smoothing=smoothing), dtype=dtype), wanted)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("head, option", [*itertools.product(["linear", "prompt"], ["finetune", "lora"])])
def test_a_rows_loss_is_the_same_in_any_piece_of_the_batch(monkeypatch, head, option):
    noise_of_the_position(monkeypatch)
    model = classifier(head, option, classes=3).double()  # rounding decides which move is the worst
    chosen = task(some_texts(classes=3), smart=Smart(5.0, eps=0.1, step=0.2, noise=0.1), average=MovingAverage(2.0))
    chosen.average.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2)
    whole = losses(model, chosen)
    pieces = torch.cat([losses(model, chosen, piece) for piece in ([0], [1, 2], [3, 4])])
    torch.testing.assert_close(pieces, whole, atol=1e-9, rtol=1e-9)
    assert (whole - losses(model, task(some_texts(classes=3)))).min() > 1e-3
