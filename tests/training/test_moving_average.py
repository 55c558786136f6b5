"""The moving average of the weights against its recursion; runs with every regularizer."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from fitting import assert_same, classifier, losses, plain, some_texts, state_of, task
from minillama.text.batches import to_batch
from minillama.training.evaluation import forward
from minillama.training.loop import train
from minillama.training.regularizers import MovingAverage, Smart, symmetric_kl
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings
from programs import Crash


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
    batch = to_batch(some_texts(), [0, 1, 2, 3, 4], 0)
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
    ids = torch.tensor([row.ids for row in some_texts((4, 4))])

    def run(one):
        torch.manual_seed(0)
        return one(ids)

    assert average.penalty(model, run, run(model)).tolist() == [0.0, 0.0]  # the same weights


EVERYTHING = {"smart": (1.0, 0.05, 0.1, 0.05), "average": (1.0,), "r_drop": 1.0}


def fitted(folder, option="finetune", stop_after=None, dtype=torch.float32, micro=None, monkeypatch=None, **changes):
    """Trains in `folder`; with stop_after, breaks off after so many steps."""
    torch.manual_seed(1)
    model = classifier(option=option, dropout=0.2)
    chosen = task(
        some_texts((3, 4, 5, 2, 3, 4, 2)),
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
