from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

import training
from classifier import LlamaEmbeddingClassifier
from conftest import tiny_llama
from dataset import Row, batches
from lora import apply_lora
from optimizer import AdamW
from training import Evaluation, Settings, describe, evaluate, train


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


def settings(**changes):
    return Settings(**({"epochs": 2, "batch_size": 4, "lr": 0.05, "seed": 3} | changes))


def quiet(line):
    pass


def with_dev_accuracies(monkeypatch, accuracies):
    """Makes dev accuracy what the test says, epoch after epoch."""
    remaining = iter(accuracies)
    monkeypatch.setattr(training, "evaluate", lambda *a, **k: Evaluation([], accuracy := next(remaining), accuracy))


# Training


def test_a_step_is_the_mean_loss_of_the_rows_there_are_and_one_update():
    rows, model, by_hand = some_rows(11), Bag(), Bag()
    train(model, rows, rows, settings(epochs=1), log=quiet)
    optimizer = AdamW([by_hand.table], lr=0.05)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3)).tolist()
    sizes = []
    for batch in batches(rows, 4, 0, order):
        log_probs = by_hand(batch.ids, batch.mask)
        picked = [log_probs[i, label] for i, label in enumerate(batch.labels.tolist())]
        optimizer.zero_grad()
        (-sum(picked) / len(picked)).backward()
        optimizer.step()
        sizes.append(len(picked))
    assert sizes == [4, 4, 3]
    torch.testing.assert_close(model.table, by_hand.table, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.frozen, torch.ones(2))


@pytest.mark.parametrize(
    "accuracies, best", [([0.1, 0.3, 0.2], 2), ([0.3, 0.3, 0.1], 1), ([0.1, 0.2, 0.3], 3), ([None, None, None], 3)]
)
def test_the_best_epoch_is_kept_and_a_tie_goes_to_the_earlier(monkeypatch, accuracies, best):
    rows, model, weights, saved = some_rows(), Bag(), {}, []
    with_dev_accuracies(monkeypatch, accuracies)

    def log(line):
        weights[len(weights) + 1] = model.table.detach().clone()

    def save_best(epoch, evaluation):
        saved.append((epoch, evaluation.accuracy))
        assert torch.equal(model.table, weights[epoch])  # what is saved is that epoch's model

    result = train(model, rows, rows, settings(epochs=3), save_best=save_best, log=log)
    assert len(weights) == 3 and not torch.equal(weights[1], weights[2])
    assert torch.equal(model.table, weights[best])
    assert saved[-1] == (best, accuracies[best - 1]) and result.accuracy == accuracies[best - 1]
    assert not model.training


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(lora):
    rows = some_rows(10)

    def trained(seed):
        torch.manual_seed(seed)
        config = type("Config", (), {"llama": tiny_llama(seed=5), "num_labels": 3, "hidden_dropout_prob": 0.3})
        config.option = "lora" if lora else "finetune"
        torch.manual_seed(seed)
        model = LlamaEmbeddingClassifier(config)
        if lora:
            apply_lora(model, 2, 4.0)
        train(model, rows, rows, settings(seed=seed, lr=1e-3), log=quiet)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = trained(1)
    assert torch.equal(trained(1), first)
    assert not torch.equal(trained(2), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_what_float32_learns(dtype):
    rows = [Row(i % 2, "", (5 + i % 2, 9, 10 + i % 3)) for i in range(24)]
    accuracies = {}
    for precision in (torch.float32, dtype):
        torch.manual_seed(0)
        config = type("C", (), {"llama": tiny_llama(), "num_labels": 2, "hidden_dropout_prob": 0.0, "option": "lora"})
        model = LlamaEmbeddingClassifier(config)
        result = train(model, rows, rows, settings(epochs=4, lr=1e-2, dtype=precision), log=quiet)
        accuracies[precision] = result.accuracy
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert accuracies == {torch.float32: 1.0, dtype: 1.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_update_and_names_the_learning_rate(bad):
    model = Bag()
    with torch.no_grad():
        model.table[7] = bad
    before = model.table.detach().clone()
    rows = [Row(0, "", (1,)), Row(1, "", (7,))]
    with pytest.raises(ValueError, match=r"the loss is nan in epoch 1, row 0, at learning rate 0.05; try a lower --lr"):
        train(model, rows, rows, settings(), log=quiet)
    assert torch.equal(model.table.nan_to_num(), before.nan_to_num())


def test_every_epoch_sees_every_row_once_in_another_order():
    rows, model = some_rows(9), Bag()
    train(model, rows, rows[:2], settings(epochs=3), log=quiet)
    shown = [ids for training_, batch in model.seen if training_ for ids in batch]
    assert len(shown) == 27

    starts = [[ids[0] for ids in shown[i : i + 9]] for i in (0, 9, 18)]
    assert sorted(starts[0]) == sorted(starts[1]) == sorted(starts[2]) == sorted(row.ids[0] for row in rows)
    assert starts[0] != starts[1] != starts[2]


def test_each_epoch_is_told_in_one_line():
    lines = []
    train(Bag(), some_rows(), some_rows(), settings(epochs=2), log=lines.append)
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1: loss ") and "running train accuracy" in lines[0] and "macro-F1" in lines[0]
    assert lines[0].endswith("(best so far)")


# Evaluation


@pytest.mark.parametrize("size", [1, 4, 30])
def test_predictions_stand_in_the_order_of_the_rows(size):
    rows, model = some_rows(13), Bag()
    result = evaluate(model, rows, size)
    by_hand = [model.table[list(row.ids)].mean(0).argmax().item() for row in rows]
    assert result.predictions == by_hand
    gold = [row.label for row in rows]
    assert result.accuracy == pytest.approx(accuracy_score(gold, by_hand))
    assert result.macro_f1 == pytest.approx(f1_score(gold, by_hand, average="macro"))


@pytest.mark.parametrize("in_file_order", [True, False])
def test_batches_are_of_like_length_unless_the_order_of_the_file_is_asked_for(in_file_order):
    rows, model = some_rows(12), Bag()
    evaluate(model, rows, 5, in_file_order=in_file_order)
    widths = [len(ids[0]) for _, ids in model.seen]
    order = rows if in_file_order else sorted(rows, key=lambda row: len(row.ids), reverse=True)
    assert widths == [max(len(row.ids) for row in order[i : i + 5]) for i in (0, 5, 10)]


def test_without_gold_labels_there_is_no_accuracy():
    rows = [Row(0, row.sentence, row.ids) for row in some_rows()]
    result = evaluate(Bag(), rows, 4)
    assert len(result.predictions) == 11 and result.accuracy is None and result.macro_f1 is None
    assert "no gold labels" in describe(result)
    assert describe(Evaluation([1], 0.5, 0.25)) == "accuracy 0.500, macro-F1 0.250"


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_needs_no_gradient_and_restores_the_mode(was_training):
    model = Bag().train(was_training)
    evaluate(model, some_rows(), 4)
    assert model.training is was_training and all(not training_ for training_, _ in model.seen)
    assert model.table.grad is None


def test_scores_that_are_no_numbers_are_refused():
    model = Bag()
    with torch.no_grad():
        model.table.fill_(math.nan)
    with pytest.raises(ValueError, match="dev: the model's scores hold NaN or infinity in torch.float32; try --dtype"):
        evaluate(model, some_rows(), 4, name="dev")


# Precision


def test_autocast_makes_matrix_products_narrow_and_leaves_the_loss_wide():
    linear = nn.Linear(8, 8)
    with training.precision(torch.device("cpu"), torch.bfloat16):
        product = linear(torch.randn(2, 8))
        assert product.dtype == torch.bfloat16
        assert F.nll_loss(product.log_softmax(-1), torch.tensor([0, 1])).dtype == torch.float32
    with training.precision(torch.device("cpu"), torch.float32):
        assert linear(torch.randn(2, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    "capabilities, native",
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False)],
)
def test_bf16_is_native_where_the_processor_says_so(monkeypatch, capabilities, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert training.bf16_is_native(torch.device("cpu")) is native
