"""Answers to prompts: losses and scores, against sums by hand."""

from __future__ import annotations

import pytest
import torch

from fitting import a_llama, an_instruction, judged
from minillama.text.examples import Example, pack
from minillama.training.evaluation import answer_prompts, answer_scores


def answer_by_hand(model, example):
    """(summed loss of the answer and the end mark in nats, how many guessed right), token by token."""
    nats, right = 0.0, 0
    for t in range(example.prompt_length, len(example.ids)):
        with torch.no_grad():
            logits = model(torch.tensor([example.ids[:t]]))[0][0, -1].double()
        nats -= logits.log_softmax(-1)[example.ids[t]].item()
        right += int(logits.argmax() == example.ids[t])
    return nats, right


def test_the_loss_is_that_of_the_answers_given_their_own_prompts(tokenizer):
    task, model = an_instruction(tokenizer), a_llama()
    positions = [4, 9, 0, 7, 2]
    losses, right = task.losses(model, positions, torch.float32)
    wanted = [answer_by_hand(model, task.examples[i]) for i in positions]
    assert losses.tolist() == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
    assert right.tolist() == [hits for _, hits in wanted]
    assert task.targets(positions) == sum(len(e.ids) - e.prompt_length for e in (task.examples[i] for i in positions))


def test_packed_examples_have_the_losses_and_gradients_that_each_has_alone(tokenizer):
    task, model = an_instruction(tokenizer), a_llama()

    def gradients(batches):
        model.zero_grad()
        losses = []
        for positions in batches:
            found, _ = task.losses(model, positions, torch.float32)
            found.sum().backward()
            losses += found.tolist()
        return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    alone, wanted = gradients([[i] for i in range(11)])
    packed, found = gradients([list(range(11))])
    assert packed == pytest.approx(alone, rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * wanted[name].abs().max().item())
    assert len(pack(task.examples, 32).ids) < 11  # rows were shared


def test_what_is_in_the_prompt_changes_no_target_but_is_seen(tokenizer):
    task, model = an_instruction(tokenizer), a_llama()
    order = sorted(range(11), key=lambda i: -len(task.examples[i].ids))  # the longest is first in its row
    before, _ = task.losses(model, order, torch.float32)
    first = task.examples[order[0]]
    task.examples[order[0]] = Example("", "", (1, 50, *first.ids[2:]), first.prompt_length)
    after, _ = task.losses(model, order, torch.float32)
    assert after[0] != before[0]
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("answer_rows", [0, 3, 200])
def test_answers_are_judged_by_loss_exact_match_and_f1(tokenizer, batch_size, answer_rows):
    task, model = an_instruction(tokenizer, batch_size=batch_size, answer_rows=answer_rows), a_llama()
    score = judged(task, model)
    nats = sum(answer_by_hand(model, example)[0] for example in task.dev_examples)
    loss = nats / sum(example.targets for example in task.dev_examples)
    assert score.metrics["dev_loss"] == pytest.approx(loss, rel=1e-5)
    if not answer_rows:
        assert score.quality == pytest.approx(-loss, rel=1e-5) and set(score.metrics) == {"dev_loss"}
        assert task.judged_by == "dev loss"
        return
    rows = task.dev_examples if answer_rows > 7 else [task.dev_examples[i] for i in (0, 3, 6)]
    wanted = answer_scores(answer_prompts(model, rows, tokenizer, 1, 6), rows)
    assert (score.metrics["dev_exact_match"], score.metrics["dev_f1"]) == (wanted["exact_match"], wanted["f1"])
    assert score.quality == wanted["f1"] and task.judged_by == "dev F1" and "F1" in score.text


def test_every_example_is_learnt_once_an_epoch_in_an_order_of_its_own(tokenizer):
    task = an_instruction(tokenizer)
    plans = [task.plan(epoch) for epoch in (1, 2)]
    assert plans[0] != plans[1] and plans[0] == task.plan(1) and task.steps == 2 * 3 == sum(map(len, plans))
    for plan in plans:
        assert sorted(i for batch in plan for i in batch) == list(range(11))


def test_the_checksum_is_of_both_splits_and_of_where_the_answers_begin(tokenizer):
    whole = an_instruction(tokenizer)
    others = []
    for name in ("examples", "dev_examples"):
        for change in (lambda e: Example("", "", (*e.ids, 5), e.prompt_length), lambda e: Example("", "", e.ids, 1)):
            task = an_instruction(tokenizer)
            getattr(task, name)[2] = change(getattr(task, name)[2])
            others.append(task.checksum())
    assert an_instruction(tokenizer).checksum() == whole.checksum() and len({whole.checksum(), *others}) == 5
