"""The training loop: its losses, its best epoch, its schedule, and the reasons to stop."""

from __future__ import annotations

import math
import os
import re
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fitting import Bag, a_classifier, metrics, quiet, settings, some_rows, split
from minillama.cli.session import settings_of
from minillama.text.batches import shuffled_batches
from minillama.text.labelled import Row
from minillama.training import classification as tasks
from minillama.training.classification import Classification, row_losses
from minillama.training.distributed import Processes
from minillama.training.evaluation import Evaluation, evaluate
from minillama.training.interrupts import Stopped
from minillama.training.loop import Training
from minillama.training.progress import Progress
from minillama.training.run_directory import RunDirectory
from minillama.training.settings import Settings, learning_rate, make_optimizer
from minillama.training.task import PIECE_COST, Score, cut_batch
from optimizer import AdamW, decay_groups
from run_llama import parse


def with_dev_accuracies(monkeypatch, accuracies):
    """Makes dev accuracy what the test says, epoch after epoch."""
    remaining = iter(accuracies)
    monkeypatch.setattr(tasks, "evaluate", lambda *a, **k: Evaluation([], accuracy := next(remaining), accuracy))


def reference_loop(model, rows, chosen):
    """The plain loop: each row alone, one loss, one readable update."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=chosen.lr, fused=False)
    losses = []
    for epoch in range(1, chosen.epochs + 1):
        for positions in shuffled_batches(rows, chosen.batch_size, chosen.seed, epoch):
            picked = [model(torch.tensor([rows[i].ids]))[0, rows[i].label] for i in positions]
            optimizer.zero_grad()
            loss = -sum(picked) / len(picked)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("option", ["finetune", "lora"])
@pytest.mark.parametrize("micro, piece_cost", [(None, 300), (None, 2), (3, 300), (3, 2), (1, 300)])
def test_twenty_losses_equal_those_of_the_plain_loop_however_the_batches_are_cut(
    fit, monkeypatch, option, micro, piece_cost
):
    monkeypatch.setitem(PIECE_COST, "cpu", piece_cost)
    rows, chosen = some_rows(31), settings(epochs=5, batch_size=8, lr=1e-3, micro_batch_size=micro)
    wanted = reference_loop(a_classifier(option), rows, chosen)
    run = fit(a_classifier(option), rows, rows, chosen)
    got = [line["loss"] for line in metrics(run) if "loss" in line]
    assert len(got) == len(wanted) == 20
    assert got == pytest.approx(wanted, abs=1e-5)


def cut(lengths, world=1, micro=None, pads=True, batch=None):
    """The pieces of a batch of rows of these lengths."""
    rows = [Row(0, "", (4,) * length) for length in lengths]
    task = Classification(rows, rows, 1, len(rows), 1, bucketed=pads)
    return cut_batch(task, batch or list(range(len(rows))), torch.device("cpu"), world, micro)


def test_a_micro_batch_may_leave_a_remainder():
    for pads in (True, False):
        assert cut([5] * 8, micro=3, pads=pads) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_rows_of_similar_length_are_computed_together_if_that_saves_more_than_a_piece_costs():
    lengths = [90, 10] * 10
    assert cut(lengths) == [list(range(0, 20, 2)), list(range(1, 20, 2))]  # saves 800 tokens
    assert cut(lengths[:6]) == [list(range(6))]  # would save 240
    assert cut(lengths, pads=False) == [list(range(20))]
    assert cut(lengths, world=3) == [list(range(20))]  # a third for each process
    assert max(map(len, cut(lengths, micro=7))) == 7
    assert max(map(len, cut(lengths, micro=3, world=3))) == 9


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 1, 2])
def test_the_processes_share_every_row_once_in_equally_many_pieces(world, micro):
    pieces = cut([400, 1, 2, 400, 3, 1, 390], world, micro)
    found = [[Processes(rank, world).share(piece) for piece in pieces] for rank in range(world)]
    counted = [i for shares in found for mine, count in shares for i in mine[:count]]
    assert sorted(counted) == list(range(7)) and {len(shares) for shares in found} == {len(pieces)}
    assert all(0 < len(mine) <= (micro or 7) for shares in found for mine, _ in shares)
    assert Processes(2, 3).share([5, 6]) == ([5], 0)


def test_frozen_weights_stay(fit):
    model = Bag()
    fit(model, some_rows(), some_rows(), settings())
    assert torch.equal(model.frozen, torch.ones(2)) and not torch.equal(model.table, Bag().table)


@pytest.mark.parametrize(
    "accuracies, best", [([0.1, 0.3, 0.2], 2), ([0.3, 0.3, 0.1], 1), ([0.1, 0.2, 0.3], 3), ([None, None, None], 3)]
)
def test_the_best_epoch_is_kept_and_a_tie_without_losses_goes_to_the_earlier(fit, monkeypatch, accuracies, best):
    rows, model, weights, saved = some_rows(), Bag(), {}, []
    with_dev_accuracies(monkeypatch, accuracies)

    def log(line):
        weights[len(weights) + 1] = model.table.detach().clone()

    def seen(state, epoch, evaluation):
        saved.append((epoch, evaluation.quality))
        assert torch.equal(state["table"], weights[epoch])  # what is kept is that epoch's model

    fit(model, rows, rows, settings(epochs=3), log=log, seen=seen)
    assert len(weights) == 3 and not torch.equal(weights[1], weights[2])
    assert torch.equal(model.table, weights[best])
    assert saved[-1] == (best, accuracies[best - 1])
    assert not model.training


def test_a_tie_goes_to_the_lower_loss():
    def score(quality, loss):
        return Score(quality, "", {"dev_loss": loss})

    best = Progress(best_epoch=1, best_quality=0.5, best_loss=1.0)
    assert best.is_beaten_by(score(0.5, 0.9)) and best.is_beaten_by(score(0.6, 2.0))
    assert not best.is_beaten_by(score(0.5, 1.0)) and not best.is_beaten_by(score(0.4, 0.1))
    assert not best.is_beaten_by(score(0.5, None)) and not best.is_beaten_by(score(None, 0.1))
    assert Progress().is_beaten_by(score(None, None))


@pytest.mark.parametrize("patience, epochs", [(1, 3), (2, 6), (None, 7)])
def test_patience_counts_epochs_without_a_better_dev(fit, monkeypatch, patience, epochs):
    with_dev_accuracies(monkeypatch, [0.1, 0.3, 0.3, 0.4, 0.2, 0.4, 0.1])
    lines = []
    fit(Bag(), some_rows(), some_rows(), settings(epochs=7, patience=patience), log=lines.append)
    assert len([line for line in lines if line.startswith("epoch")]) == epochs
    assert any("stopped early" in line for line in lines) == (epochs < 7)


def trained(fit, seed, option):
    rows = some_rows(10)
    model = a_classifier(option, dropout=0.3)
    torch.manual_seed(seed)
    fit(model, rows, rows, settings(seed=seed, lr=1e-3))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("option", ["finetune", "lora"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(fit, option):
    first = trained(fit, 1, option)
    assert torch.equal(trained(fit, 1, option), first)
    assert not torch.equal(trained(fit, 2, option), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_what_float32_learns(fit, dtype):
    rows = [Row(i % 2, "", (5 + i % 2, 9, 10 + i % 3)) for i in range(24)]
    for kind in (torch.float32, dtype):
        model = a_classifier("lora", classes=2)
        fit(model, rows, rows, settings(epochs=4, lr=1e-2, dtype=kind, max_grad_norm=1.0))
        assert evaluate(model, rows, 4, dtype=kind).accuracy == 1.0
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_gradients_are_unscaled_before_they_are_clipped(fit):
    """No gradient here is as long as the limit, but each would be, scaled by 65536."""
    rows, weights = some_rows(8), []
    for limit in (None, 1e3):
        model = a_classifier()
        fit(model, rows, rows, settings(epochs=1, dtype=torch.float16, max_grad_norm=limit, lr=1e-3))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_clipping_is_over_all_parameters(fit):
    """The clipped gradient is far below AdamW's eps, so that nearly nothing moves; an unclipped one moves by lr."""
    rows = some_rows(4)
    for limit, moves in ((1e-12, False), (None, True)):
        model = a_classifier()
        before = [p.detach().clone() for p in model.parameters()]
        fit(model, rows, rows, settings(epochs=1, batch_size=4, lr=1.0, max_grad_norm=limit))
        moved = max((p - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True))
        assert (moved > 0.1) == moves


@pytest.mark.parametrize("micro", [None, 3])
def test_clipping_smoothing_and_decay_reach_the_weights(fit, micro):
    """Against torch's own loss, clipping and optimizer: its decay comes before the step, so it is applied by hand."""
    rows = some_rows(16)
    chosen = {"lr": 1e-3, "max_grad_norm": 0.05, "label_smoothing": 0.2, "weight_decay": 0.1}
    model, wanted = a_classifier(), a_classifier()
    matrices = [p for p in wanted.parameters() if p.requires_grad and p.dim() >= 2]
    optimizer = torch.optim.Adam([p for p in wanted.parameters() if p.requires_grad], lr=1e-3, eps=1e-6)
    norms = []
    for epoch in (1, 2):
        for positions in shuffled_batches(rows, 8, 3, epoch):
            optimizer.zero_grad()
            log_probs = torch.cat([wanted(torch.tensor([rows[i].ids])) for i in positions])
            labels = torch.tensor([rows[i].label for i in positions])
            F.cross_entropy(log_probs, labels, label_smoothing=0.2).backward()
            norms.append(nn.utils.clip_grad_norm_(wanted.parameters(), 0.05))
            for group in optimizer.param_groups:  # ours has eps outside the bias correction
                group["eps"] = 1e-6 / math.sqrt(1 - 0.999 ** len(norms))
            optimizer.step()
            with torch.no_grad():
                for p in matrices:
                    p.mul_(1 - 1e-3 * 0.1)
    assert min(norms) > 0.05  # clipping did bite
    fit(model, rows, rows, settings(epochs=2, batch_size=8, micro_batch_size=micro, **chosen))
    for (name, p), q in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_signal_in_the_last_moments_still_stops_the_run(fit, monkeypatch):
    save = RunDirectory.save

    def and_a_signal(self, state):
        save(self, state)
        if state["progress"]["finished"]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunDirectory, "save", and_a_signal)
    with pytest.raises(Stopped, match="stopped by SIGTERM; resume with --resume") as stopped:
        fit(Bag(), some_rows(), some_rows(), settings())
    assert stopped.value.number == signal.SIGTERM


def test_the_learning_rate_follows_its_schedule(fit):
    chosen = settings(epochs=3, batch_size=4, lr=0.1, schedule="cosine", warmup_steps=2, min_lr=0.01)
    run = fit(Bag(), some_rows(9), some_rows(), chosen)
    rates = [line["lr"] for line in metrics(run) if "lr" in line]
    assert rates == [learning_rate(step, 9, 0.1, "cosine", 2, 0.01) for step in range(9)]


def test_lora_plus_moves_every_b_by_its_own_rate(fit):
    """Against the plain formula, with an optimizer of its own for the B's."""
    rows = some_rows(12)
    chosen = settings(epochs=2, batch_size=4, lr=1e-3, schedule="cosine", weight_decay=0.1)
    model, plain = a_classifier("lora"), a_classifier("lora")
    fit(model, rows, rows, settings(**vars(chosen), lora_plus=16.0))
    model.load_state_dict(torch.load(fit.run("1").last_path, weights_only=True)["model"], strict=False)
    named = [(name, p) for name, p in plain.named_parameters() if p.requires_grad]
    kinds = [
        (1.0, 0.1, [p for name, p in named if not name.endswith("lora_B") and p.dim() == 2]),
        (1.0, 0.0, [p for name, p in named if p.dim() == 1]),
        (16.0, 0.1, [p for name, p in named if name.endswith("lora_B")]),
    ]
    optimizers = [(times, AdamW(p, weight_decay=decay, fused=False)) for times, decay, p in kinds]
    step = 0
    for epoch in (1, 2):
        for positions in shuffled_batches(rows, 4, chosen.seed, epoch):
            plain.zero_grad()
            for i in positions:
                (-plain(torch.tensor([rows[i].ids]))[0, rows[i].label] / len(positions)).backward()
            for times, optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = times * learning_rate(step, 6, 1e-3, "cosine")
                optimizer.step()
            step += 1
    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4, msg=name)


def test_the_option_lora_plus_is_of_lora_b_alone():
    options = parse(["--option", "lora", "--lora_plus", "16"])
    named = [(name, p) for name, p in a_classifier("lora").named_parameters() if p.requires_grad]
    chosen = settings_of(options, torch.float32)
    groups = decay_groups(named, 0.0, lambda name: chosen.lr_multiplier(name, 2))
    rates = {id(p): group["lr_multiplier"] for group in groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in named} == {
        name: 16.0 if name.endswith("lora_B") else 1.0 for name, _ in named
    }
    assert set(rates.values()) == {1.0, 16.0}


def test_layer_decay_lowers_the_rate_from_layer_to_layer():
    model = a_classifier()
    optimizer = make_optimizer(model, Settings(lr=1.0, layer_decay=0.5))
    rates = {id(p): group["lr_multiplier"] for group in optimizer.param_groups for p in group["params"]}
    layers = len(model.llama.layers)
    for name, parameter in model.named_parameters():
        if "tok_embeddings" in name:
            wanted = 0.5 ** (layers + 1)
        elif ".layers." in name:
            wanted = 0.5 ** (layers - int(name.split(".layers.")[1].split(".")[0]))
        else:
            wanted = 1.0
        if parameter.requires_grad:
            assert rates[id(parameter)] == wanted, name
    assert set(rates.values()) == {0.5**i for i in range(layers + 2)}


def test_label_smoothing_is_torchs():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(row_losses(logits.log_softmax(-1), labels, 0.2), wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_update_and_names_step_rate_and_checkpoint(fit, bad):
    class Breaks(Bag):
        def forward(self, ids, mask=None):
            training_calls = sum(training_ for training_, _ in self.seen)
            return super().forward(ids, mask) * (bad if self.training and training_calls == 4 else 1.0)

    model, rows = Breaks(), some_rows(9)
    message = r"the loss is -?(nan|inf) at step 5 \(epoch 2\), learning rate 0.05; the last good .*, of step 4"
    with pytest.raises(ValueError, match=message):
        fit(model, rows, rows, settings(save_every=2), name="a")
    state = torch.load(fit.tmp_path / "a" / "last.pt", weights_only=True)
    assert torch.equal(state["model"]["table"], model.table)
    assert state["progress"]["step"] == 4 and torch.isfinite(model.table).all()


def test_too_little_memory_is_told_in_one_line_with_what_to_try(fit):
    class Large(Bag):
        def forward(self, ids, mask=None):
            if len(ids) > 2:
                raise torch.OutOfMemoryError("Tried to allocate 1 GiB")
            return super().forward(ids, mask)

    with pytest.raises(ValueError, match="^4 rows at once .* memory of cpu; no checkpoint .*Try --micro_batch_size 2"):
        fit(Large(), some_rows(9), some_rows(2), settings(batch_size=4), name="large")
    fit(Large(), some_rows(9), some_rows(2), settings(batch_size=4, micro_batch_size=2), name="small")


def test_every_epoch_sees_every_row_once_in_another_order(fit):
    rows, model = some_rows(9), Bag()
    fit(model, rows, rows[:2], settings(epochs=3))
    shown = [ids for training_, batch in model.seen if training_ for ids in batch]
    starts = [[ids[0] for ids in shown[i : i + 9]] for i in (0, 9, 18)]
    assert len(shown) == 27
    assert sorted(starts[0]) == sorted(starts[1]) == sorted(starts[2]) == sorted(row.ids[0] for row in rows)
    assert starts[0] != starts[1] and starts[1] != starts[2]


def test_each_epoch_is_told_in_one_line_and_measured(fit):
    lines = []
    run = fit(Bag(), some_rows(), some_rows(7), settings(epochs=2, evaluate_train=True), log=lines.append)
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1: loss ") and "running train accuracy" in lines[0]
    assert ", train accuracy" in lines[0] and ", dev accuracy" in lines[0]
    assert re.search(r"\(best so far\), \d\d:\d\d left$", lines[0]) and " left" not in lines[1]
    found = metrics(run)
    assert [line["step"] for line in found] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"train_loss", "running_train_accuracy", "train_accuracy", "dev_accuracy", "dev_macro_f1"} <= set(found[3])
    sizes = [len(batch) for batch in shuffled_batches(some_rows(), 4, 3, 1)]
    assert sorted(sizes) == [3, 4, 4]
    rows_mean = sum(size * line["loss"] for size, line in zip(sizes, found, strict=False)) / 11
    assert found[3]["train_loss"] == pytest.approx(rows_mean)


def test_each_process_draws_dropout_masks_of_its_own(fit):
    task, chosen = split(settings(epochs=1), some_rows(4), some_rows(4))
    draws = []
    for rank in range(3):
        torch.manual_seed(7)
        Training(Bag(), task, chosen, fit.run(), Processes(rank), quiet)
        draws.append(torch.rand(3))
    torch.manual_seed(7)
    assert draws[0].equal(torch.rand(3))  # the main process draws as a run alone does
    assert not draws[1].equal(draws[0]) and not draws[2].equal(draws[1])
