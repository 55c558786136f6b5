"""The commonest class, the weights of classes, and the warnings of a model that is no better than one answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.dummy import DummyClassifier
from sklearn.utils.class_weight import compute_class_weight

from fitting import Bag, classifier, losses, settings, some_rows, some_texts, task
from minillama.text.labelled import Row
from minillama.training.class_shares import (
    class_weights,
    final_warning,
    one_class_warning,
    training_remedy,
)
from minillama.training.evaluation import Evaluation, commonest_class

LABELS = (2, 0, 2, 2, 1, 2, 0, 2, 2)
NAMES = ("bad", "fair", "good")


def rows_of(labels):
    return [Row(label, "", (1 + label, 5)) for label in labels]


def test_the_commonest_class_is_what_a_guess_without_looking_takes():
    rows = rows_of(LABELS)
    guess = DummyClassifier(strategy="most_frequent").fit([[0]] * 9, LABELS)
    assert commonest_class(rows) == (guess.predict([[0]])[0], guess.score([[0]] * 9, LABELS))
    assert commonest_class(rows_of((1, 0))) == (0, 0.5)


@pytest.mark.parametrize("labels", [LABELS, (0, 2, 2, 2), (0, 1, 2)], ids=["all", "a class without rows", "even"])
def test_class_weights_are_scikit_learns(labels):
    present = np.unique(labels)
    wanted = dict(zip(present, compute_class_weight("balanced", classes=present, y=labels), strict=True))
    found = class_weights(rows_of(labels), 3)
    assert found == pytest.approx([wanted.get(label, 0.0) for label in range(3)])
    assert sum(found[label] for label in labels) / len(labels) == pytest.approx(1.0)


def test_the_weighted_loss_and_its_gradient_are_torchs():
    """The whole training set as a batch: the sum of the weights, by which torch divides, is the number of rows."""
    rows, model = rows_of(LABELS), Bag()
    weights = class_weights(rows, 3)
    found, right = task(rows, class_weights=weights).losses(model, list(range(9)), torch.float32)
    logits = torch.stack([model.table[list(row.ids)].mean(0) for row in rows])
    wanted = F.cross_entropy(logits, torch.tensor(LABELS), weight=torch.tensor(weights))
    torch.testing.assert_close(found.sum() / 9, wanted)
    gradients = [torch.autograd.grad(loss, model.table, retain_graph=True)[0] for loss in (found.sum() / 9, wanted)]
    torch.testing.assert_close(*gradients)
    assert right.tolist() == (logits.argmax(-1) == torch.tensor(LABELS)).tolist()


@pytest.mark.parametrize("terms", [{"label_smoothing": 0.2}, {"r_drop": 2.0}], ids=str)
def test_a_weight_multiplies_all_terms_of_a_rows_loss(terms):
    model, weights = classifier(dropout=0.3), [0.5, 3.0]
    plain = losses(model, task(**terms))
    found = losses(model, task(**terms, class_weights=weights))
    assert torch.equal(found, plain * torch.tensor([weights[row.label] for row in some_texts()]))


def test_weighted_steps_do_not_depend_on_the_pieces_of_a_batch(fit):
    rows = some_rows(11)[:6] + some_rows(11)[6::3]
    weights = class_weights(rows, 3)
    models = [Bag(), Bag(), Bag()]
    for model, changes in zip(
        models, [{}, {"micro_batch_size": 1}, {"class_weights": None, "micro_batch_size": 1}], strict=True
    ):
        fit(model, rows, rows, settings(**{"class_weights": weights} | changes))
    torch.testing.assert_close(models[0].table, models[1].table)
    assert not torch.allclose(models[0].table, models[2].table, atol=1e-3)


def test_one_class_for_everything_is_told_with_its_share_and_what_to_try():
    rows = rows_of(LABELS)
    alone, remedy = Evaluation([0] * 9, 2 / 9, 0.1), training_remedy(weighted=False)
    told = one_class_warning(alone, rows, NAMES, remedy)
    assert (
        told
        == final_warning(alone, rows, NAMES, remedy)
        == (
            'dev: all 9 rows are predicted as "bad", the class of 22.2% of them; '
            "try more --epochs, a higher or lower --lr, or --class_weights balanced"
        )
    )
    assert "class_weights" not in training_remedy(weighted=True)
    assert 'as "0"' in one_class_warning(alone, rows, (), "")
    for other in (Evaluation([0] * 8 + [1], 2 / 9, 0.1), Evaluation([0] * 9, None, None)):
        assert one_class_warning(other, rows, NAMES, remedy) == ""


def test_an_accuracy_below_the_commonest_class_is_told_and_none_above_it():
    rows = rows_of(LABELS)
    told = final_warning(Evaluation([0, 1] * 4 + [2], 0.5, 0.1), rows, NAMES, "rest")
    assert told == 'dev accuracy 0.500 is below 0.667, the share of its commonest class, "good"; try rest'
    assert final_warning(Evaluation([0, 1] * 4 + [2], 6 / 9, 0.1), rows, NAMES, "rest") == ""
    assert final_warning(Evaluation([0] * 9, None, None), rows, NAMES, "rest") == ""


def test_a_run_warns_once_of_a_model_that_gives_one_answer(fit):
    model, lines = Bag(), []
    with torch.no_grad():
        model.table.zero_()
        model.table[:, 1] = 1.0
    fit(model, some_rows(), some_rows(6), settings(epochs=3, lr=1e-9, label_names=NAMES), log=lines.append)
    told = [line for line in lines if line.startswith("warning")]
    assert len(told) == 1 and 'all 6 rows are predicted as "fair", the class of 33.3% of them' in told[0]
    assert lines.index(told[0]) == 1  # after the first epoch
