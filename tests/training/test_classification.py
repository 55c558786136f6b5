"""Classification: losses, steps and accuracy of its rows."""

from __future__ import annotations

import pytest
import torch

from fitting import Bag, judged, some_rows
from minillama.training.classification import Classification
from minillama.training.evaluation import evaluate


@pytest.mark.parametrize("evaluate_train", [False, True])
def test_a_classifier_is_judged_by_its_accuracy_on_dev(evaluate_train):
    rows, dev, model = some_rows(13), some_rows(9, seed=1), Bag()
    task = Classification(rows, dev, epochs=2, batch_size=4, seed=0, evaluate_train=evaluate_train)
    score = judged(task, model)
    found = {"dev": evaluate(model, dev, 4)} | ({"train": evaluate(model, rows, 4)} if evaluate_train else {})
    wanted = {f"{split}_accuracy": one.accuracy for split, one in found.items()}
    wanted |= {f"{split}_macro_f1": one.macro_f1 for split, one in found.items()}
    wanted["dev_loss"] = found["dev"].loss
    assert score.metrics == wanted and f"loss {found['dev'].loss:.4f}" in score.text
    assert score.quality == found["dev"].accuracy and score.sample == ""
    assert ("train accuracy" in score.text) == evaluate_train and "dev accuracy" in score.text


def test_a_classifiers_losses_and_steps_are_those_of_its_rows():
    rows, model = some_rows(13), Bag()
    task = Classification(rows, rows, epochs=3, batch_size=4, seed=0)
    losses, right = task.losses(model, [5, 0, 12], torch.float32)
    for row, loss, hit in zip([rows[5], rows[0], rows[12]], losses, right, strict=True):
        log_probs = model.table[list(row.ids)].mean(0).double().log_softmax(-1)
        assert loss.item() == pytest.approx(-log_probs[row.label].item(), rel=1e-5)
        assert bool(hit) == (int(log_probs.argmax()) == row.label)
    assert task.steps == 3 * 4 and task.targets([5, 0]) == 2
    assert task.tokens([5, 0]) == len(rows[5].ids) + len(rows[0].ids)
    assert sorted(i for batch in task.plan(1) for i in batch) == list(range(13))
