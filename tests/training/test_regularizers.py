"""smart.py: SMART against brute force in float64, its gradient against differences; averages by hand; one mask."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from classifier import LlamaEmbeddingClassifier, LlamaPromptClassifier
from conftest import Crash, tiny_llama
from fitting import assert_same, state_of
from lora import apply_lora
from minillama.text.batches import to_batch
from minillama.text.labelled import Row
from minillama.training.classification import Classification, row_losses
from minillama.training.evaluation import forward
from minillama.training.loop import Settings, train
from minillama.training.regularizers import MovingAverage, Smart, random_state, replayed, shifted, symmetric_kl
from minillama.training.run_directory import RunDirectory


class Words:
    def encode(self, name, bos, eos):
        return [{"bad": 7, "fair": 8, "good": 9}[name]]


def classifier(head="linear", option="finetune", classes=2, dropout=0.0, **sizes):
    llama = tiny_llama(**({"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "dropout": dropout} | sizes))
    config = SimpleNamespace(llama=llama, num_labels=classes, hidden_dropout_prob=dropout, option=option)
    torch.manual_seed(3)
    if head == "prompt":
        model = LlamaPromptClassifier(config, Words(), ["bad", "fair", "good"][:classes])
    else:
        model = LlamaEmbeddingClassifier(config)
        nn.init.normal_(model.classifier_head.weight)
    model = apply_lora(model, 2, 4.0) if option == "lora" else model
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model.train()


def some_rows(lengths=(4, 2, 5, 3, 3), classes=2):
    draw = torch.Generator().manual_seed(0)
    return [
        Row(i % classes, "", tuple(torch.randint(4, 20, (n,), generator=draw).tolist())) for i, n in enumerate(lengths)
    ]


def task(rows=None, **changes):
    rows = rows or some_rows()
    return Classification(rows, rows, **({"epochs": 2, "batch_size": 4, "seed": 3} | changes))


def losses(model, chosen, positions=(0, 1, 2, 3, 4), dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return chosen.losses(model, list(positions), dtype)[0]


def plain(model, positions=(0, 1, 2, 3, 4), dtype=torch.float32, seed=0, smoothing=0.0):
    """The loss without any regularizer, by the formula."""
    torch.manual_seed(seed)
    batch = to_batch(some_rows(), list(positions), 0)
    return row_losses(forward(model, batch.ids, batch.mask, dtype), batch.labels, smoothing)


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
    model, rows = classifier(classes=3, layer_norm_eps=1e-3).double(), some_rows((4, 4, 4, 4), classes=3)
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


@pytest.mark.parametrize("head", ["linear", "prompt"])
@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_the_gradient_is_that_of_the_divergence_at_the_move_found(monkeypatch, head, option):
    """By central differences in float64, the move kept (it is where the maximum is: arXiv 1911.03437, Algorithm 1)."""
    model = classifier(head, option, classes=3, layer_norm_eps=1e-3).double()
    rows = some_rows(classes=3)
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
    batch = to_batch(some_rows(), list(range(5)), 0)
    torch.manual_seed(0)
    all_in_half = chosen.smart.penalty(
        model,
        batch.ids.shape,
        lambda: forward(model, batch.ids, batch.mask, dtype),
        forward(model, batch.ids, batch.mask, dtype),
    )
    # What this guards against; how much float16 rounds depends on the processor's kernels.
    assert (all_in_half - exact).abs().max() > (3 if dtype == torch.bfloat16 else 1.5) * exact.max()


# Averages


def test_the_average_is_the_published_recursion():
    model = classifier(option="lora")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    average = MovingAverage(1.0)
    average.start(model)
    assert set(average.state()) == set(names) and all("lora_" in n or "classifier_head" in n for n in names)
    frozen = "llama.tok_embeddings.weight"
    assert average.model.get_parameter(frozen) is model.get_parameter(frozen)  # no second copy of it
    wanted = {name: model.get_parameter(name).detach().double() for name in names}
    for step in range(1, 21):
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).add_(0.1 * torch.randn_like(model.get_parameter(name)))
        average.update(model, step, 20)
        beta = 0.99 if step <= 2 else 0.999
        wanted = {name: beta * old + (1 - beta) * model.get_parameter(name) for name, old in wanted.items()}
    for name, tensor in average.state().items():
        torch.testing.assert_close(tensor.double(), wanted[name], atol=1e-6, rtol=1e-5)
        assert not torch.equal(tensor, model.get_parameter(name))


def test_a_beta_of_ones_own_holds_throughout():
    model = classifier()
    average = MovingAverage(1.0, 0.25)
    average.start(model)
    with torch.no_grad():
        model.classifier_head.weight.zero_()
    before = average.state()["classifier_head.weight"].clone()
    average.update(model, 1, 100)
    torch.testing.assert_close(average.state()["classifier_head.weight"], 0.25 * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["linear", "prompt"])
def test_model_and_average_are_compared_under_one_dropout_mask(head, dtype):
    model = classifier(head, dropout=0.4)
    chosen = task(average=MovingAverage(3.0))
    chosen.average.start(model)
    assert torch.equal(losses(model, chosen, dtype=dtype), plain(model, dtype=dtype))  # the same weights: no divergence
    with torch.no_grad():
        model.llama.layers[0].feed_forward.w2.weight.mul_(1.5)
    batch = to_batch(some_rows(), [0, 1, 2, 3, 4], 0)
    states = []
    for one in (model, chosen.average.model):
        torch.manual_seed(0)
        states.append(forward(one, batch.ids, batch.mask, dtype))
    term = losses(model, chosen, dtype=dtype) - plain(model, dtype=dtype)
    torch.testing.assert_close(term, 3.0 * symmetric_kl(*states), atol=2e-6, rtol=1e-4)
    assert term.max() > 1e-3
    term.sum().backward()
    assert all(p.grad is None for p in chosen.average.model.parameters())
    assert model.llama.layers[0].feed_forward.w2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_the_average_drops_what_the_model_drops_and_nothing_where_that_is_judged(training):
    model, average = classifier(dropout=0.4).train(not training), MovingAverage(1.0)
    average.start(model)
    model.train(training)
    ids = torch.tensor([row.ids for row in some_rows((4, 4))])

    def run(one):
        torch.manual_seed(0)
        return one(ids)

    assert average.penalty(model, run, run(model)).tolist() == [0.0, 0.0]  # the same weights


def test_smart_compares_passes_under_one_dropout_mask():
    """A move of nearly nothing changes nearly nothing; two masks would."""
    model = classifier(dropout=0.4)
    tiny = task(smart=Smart(1.0, eps=1e-9, noise=1e-9))
    torch.testing.assert_close(losses(model, tiny), plain(model), atol=1e-6, rtol=0)
    torch.manual_seed(0)
    two = [forward(model, *to_batch(some_rows(), [0, 1, 2, 3, 4], 0)[:2], torch.float32) for _ in range(2)]
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
    batch = to_batch(some_rows(), [0, 1, 2, 3, 4], 0)
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
    chosen = task(some_rows(classes=3), smart=Smart(5.0, eps=0.1, step=0.2, noise=0.1), average=MovingAverage(2.0))
    chosen.average.start(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2)
    whole = losses(model, chosen)
    pieces = torch.cat([losses(model, chosen, piece) for piece in ([0], [1, 2], [3, 4])])
    torch.testing.assert_close(pieces, whole, atol=1e-9, rtol=1e-9)
    assert (whole - losses(model, task(some_rows(classes=3)))).min() > 1e-3


EVERYTHING = {"smart": (1.0, 0.05, 0.1, 0.05), "average": (1.0,), "r_drop": 1.0}


def fitted(folder, option="finetune", stop_after=None, dtype=torch.float32, micro=None, monkeypatch=None, **changes):
    """Trains in `folder`; with stop_after, breaks off after so many steps."""
    torch.manual_seed(1)
    model = classifier(option=option, dropout=0.2)
    chosen = task(
        some_rows((3, 4, 5, 2, 3, 4, 2)),
        smart=Smart(*EVERYTHING["smart"]),
        average=MovingAverage(*EVERYTHING["average"]),
        r_drop=1.0,
        **changes,
    )
    run = RunDirectory(folder)
    run.path.mkdir(exist_ok=True)
    if stop_after is not None:
        metric, count = run.metric, itertools.count(1)

        def stops(step, **values):
            metric(step, **values)
            if next(count) == stop_after:
                raise Crash

        run.metric = stops
    settings = Settings(lr=1e-2, save_every=1, dtype=dtype, micro_batch_size=micro)
    save = lambda state, epoch, score: torch.save({"model": state}, run.best_path)  # noqa: E731
    torch.manual_seed(2)
    train(model, chosen, settings, run, write_best=save, log=lambda line: None)
    return run, model


@pytest.mark.parametrize("option, dtype", [("finetune", torch.float32), ("lora", torch.bfloat16)])
def test_a_run_with_every_regularizer_resumes_bit_for_bit(tmp_path, option, dtype):
    whole, straight = fitted(tmp_path / "whole", option, dtype=dtype)
    for stop_after in (2, 4):
        with pytest.raises(Crash):
            fitted(tmp_path / str(stop_after), option, stop_after, dtype)
        run, model = fitted(tmp_path / str(stop_after), option, dtype=dtype)
        ours, theirs = ({k: v for k, v in state_of(r).items() if k != "metrics_bytes"} for r in (run, whole))
        assert_same(ours, theirs)
        assert_same(model.state_dict(), straight.state_dict())
    average, weights = theirs["average"], theirs["model"]
    assert set(average) == set(weights) - {"llama.output.weight"}
    assert not any(torch.equal(average[name], weights[name]) for name in average if "norm" not in name)
    lines = [json.loads(line) for line in whole.metrics_path.read_text(encoding="utf-8").splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_the_average_is_told_of_every_step_from_1_to_the_last(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(MovingAverage, "update", lambda self, model, step, steps: told.append((step, steps)))
    fitted(tmp_path)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_run_without_an_average_saves_what_it_always_did(tmp_path):
    run = RunDirectory(tmp_path)
    save = lambda state, epoch, score: torch.save({"model": state}, run.best_path)  # noqa: E731
    train(classifier(), task(), Settings(lr=1e-3), run, write_best=save, log=lambda line: None)
    assert "average" not in state_of(run)
