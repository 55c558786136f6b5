"""tasks.py: what is learnt and how it is judged, against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT, some_stories, tiny_llama
from minillama.text.corpus import Corpus, Text, evenly
from minillama.text.documents import Tokens
from minillama.text.examples import Example, pack, tokenize_examples
from minillama.training import task as tasks
from minillama.training.answering import Instruction
from minillama.training.classification import Classification
from minillama.training.distributed import Processes
from minillama.training.evaluation import answer_prompts, answer_scores, evaluate
from minillama.training.language_modelling import LanguageModelling
from test_training import Bag, some_rows
from tokenizer import Tokenizer

LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer):
    return Tokenizer(tokenizer_model=small_tokenizer)


def some_tokens(tokenizer, documents):
    rows = [tokenizer.encode(document, bos=True, eos=True) for document in documents]
    starts = np.cumsum([0, *map(len, rows)]).astype("<u8")
    text_bytes = np.array([len(document.encode()) for document in documents], "<u8")
    ids = np.array(sum(rows, []), "<u2")
    return Tokens(ROOT, ids, starts, text_bytes, ids.tobytes().hex())


def a_task(tokenizer, *, texts=2, held_out=2.0, steps=10, **changes):
    found = [
        Text(f"t{i}", [some_tokens(tokenizer, some_stories(8, seed=i, words=12 + 12 * i))], LENGTH, held_out)
        for i in range(texts)
    ]
    settings = {"batch_size": 4, "eval_every": 4, "seed": 3, "sample_tokens": 5} | changes
    return LanguageModelling(Corpus(found, 3), tokenizer, steps, **settings)


def some_examples(tokenizer, count, seed=0):
    pairs = zip(some_stories(count, seed=seed, words=12), some_stories(count, seed=seed + 1, words=6), strict=True)
    return tokenize_examples(
        "a.jsonl", [Example(a[: 5 + 7 * i % 40].strip(), b[: 3 + 5 * i % 20]) for i, (a, b) in enumerate(pairs)],
        tokenizer, 32, 6,
    )[0]  # fmt: skip


def an_instruction(tokenizer, **changes):
    splits = some_examples(tokenizer, 11), some_examples(tokenizer, 7, seed=5)
    settings = {"epochs": 2, "batch_size": 4, "window": 32, "seed": 3, "max_new_tokens": 6} | changes
    return Instruction(*splits, tokenizer, **settings)


def a_llama(seed=0):
    return tiny_llama(seed=seed, vocab_size=320, causal=True)


def by_hand(model, window):
    """(summed loss in nats, how many guessed right), token by token in float64."""
    nats, right = 0.0, 0
    for t in range(1, len(window)):
        with torch.no_grad():
            logits = model(torch.tensor([window[:t].tolist()]))[0][0, -1].double()
        nats -= logits.log_softmax(-1)[int(window[t])].item()
        right += int(logits.argmax() == int(window[t]))
    return nats, right


def judged(task, model, **changes):
    return task.score(model, torch.float32, Processes(), lambda: None, "epoch 1", **changes)


# Language modelling


def test_losses_are_summed_over_the_tokens_of_each_window(tokenizer):
    task, model = a_task(tokenizer), a_llama()
    positions = task.plan(1)[0]
    losses, right = task.losses(model, positions, torch.float32)
    wanted = [by_hand(model, task.corpus.window(i)) for i in positions]
    assert losses.tolist() == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
    assert right.tolist() == [hits for _, hits in wanted]
    assert losses.requires_grad and losses.shape == (4,)
    assert task.targets(positions) == task.tokens(positions) == 4 * LENGTH


def test_half_precision_leaves_the_loss_in_float32(tokenizer):
    task, model = a_task(tokenizer), a_llama()
    exact, _ = task.losses(model, [0, 1], torch.float32)
    rounded, _ = task.losses(model, [0, 1], torch.bfloat16)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.1)


def test_an_epoch_is_as_many_steps_as_lie_between_two_judgements(tokenizer):
    task = a_task(tokenizer, steps=10)
    plans = [task.plan(epoch) for epoch in range(1, task.epochs + 1)]
    assert task.epochs == 3 and [len(plan) for plan in plans] == [4, 4, 2]
    assert [batch for plan in plans for batch in plan] == [task.corpus.batch(step, 4) for step in range(10)]
    assert a_task(tokenizer, steps=8).epochs == 2


def test_bits_per_byte_count_what_a_held_out_text_costs(tokenizer):
    task, model = a_task(tokenizer, texts=2), a_llama()
    score = judged(task, model)
    bits = []
    for i, text in enumerate(task.corpus.texts):
        windows = [text.held_out.window(w) for w in range(text.held_out_windows)]
        nats = sum(by_hand(model, window)[0] for window in windows) / (len(windows) * LENGTH)
        tokens = some_tokens(tokenizer, some_stories(8, seed=i, words=12 + 12 * i))
        cost = nats / math.log(2) * (len(tokens.ids) - int(tokens.starts[6])) / int(tokens.text_bytes[6:].sum())
        bits.append(cost)
        assert score.metrics[f"bits_per_byte_{text.name}"] == pytest.approx(cost, rel=1e-5)
        assert f"{text.name} {cost:.3f} (perplexity {math.exp(nats):.1f})" in score.text
    assert bits[0] != pytest.approx(bits[1], rel=1e-3)
    assert score.quality == -score.metrics["bits_per_byte"] == pytest.approx(-sum(bits) / 2, rel=1e-5)


def test_a_model_that_knows_nothing_takes_the_bits_of_its_vocabulary(tokenizer):
    model = a_llama()
    with torch.no_grad():
        model.tok_embeddings.weight.zero_()  # and the output, which is tied to it
    task = a_task(tokenizer, texts=1)
    text = task.corpus.texts[0]
    wanted = math.log2(320) * text.held_out_tokens / text.held_out_bytes
    assert judged(task, model).metrics["bits_per_byte"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_score_does_not_depend_on_the_batches(tokenizer, batch_size):
    wanted = judged(a_task(tokenizer), a_llama()).metrics
    assert judged(a_task(tokenizer, batch_size=batch_size), a_llama()).metrics == pytest.approx(wanted, rel=1e-5)


def test_several_processes_share_the_windows_and_sum_what_they_found(tokenizer, monkeypatch):
    task, model = a_task(tokenizer, batch_size=3), a_llama()
    wanted = judged(task, model).metrics
    sums = {0: [], 1: []}
    for rank in (0, 1):
        monkeypatch.setattr(Processes, "sum", lambda self, loss: sums[self.rank].append(loss) or [loss])
        task.score(model, torch.float32, Processes(rank, 2), lambda: None, "")
    assert len(sums[0]) == len(sums[1]) == 2  # a sum for each text
    assert all(0 < mine < mine + other for mine, other in zip(sums[0], sums[1], strict=True))
    together = iter([mine + other for mine, other in zip(sums[0], sums[1], strict=True)])
    monkeypatch.setattr(Processes, "sum", lambda self, loss: [next(together)])
    assert judged(task, model).metrics == pytest.approx(wanted, rel=1e-6)


def test_many_windows_are_judged_by_some_evenly_spread(tokenizer):
    task, model = a_task(tokenizer, texts=1, eval_windows=3), a_llama()
    text = task.corpus.texts[0]
    windows = evenly(text.held_out, 3)
    assert len(windows) <= 3 < text.held_out_windows
    nats = sum(by_hand(model, window)[0] for window in windows) / (len(windows) * LENGTH)
    wanted = nats / math.log(2) * text.held_out_tokens / text.held_out_bytes
    assert judged(task, model).metrics["bits_per_byte"] == pytest.approx(wanted, rel=1e-5)


def test_with_nothing_held_out_there_is_no_quality_but_a_sample(tokenizer):
    score = judged(a_task(tokenizer, held_out=0), a_llama())
    assert score.quality is None and score.metrics == {} and score.text == "nothing held out to judge by"
    assert score.sample


def test_the_sample_continues_the_prompt_alike_each_time(tokenizer):
    model = a_llama()
    samples = [judged(a_task(tokenizer, sample_prompt="the  big", seed=seed), model).sample for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]
    assert all(sample.startswith("the big") and "\n" not in sample for sample in samples)
    long_prompt = a_task(tokenizer, sample_prompt="the big cat " * 30)  # longer than the model's context
    assert judged(long_prompt, model).sample.startswith("the big cat the big")


def test_a_sample_prompt_that_is_no_text_is_refused_before_the_first_step(tokenizer):
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        a_task(tokenizer, sample_prompt="caf\udce9")


def test_judging_draws_nothing_from_the_runs_generator_and_leaves_training_mode(tokenizer):
    model = a_llama().train()
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    checks = []
    before = torch.get_rng_state()
    a_task(tokenizer).score(model, torch.float32, Processes(), lambda: checks.append(1), "")
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and modes and not any(modes) and checks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_checksum_is_of_all_that_is_learnt_and_judged_by(tokenizer):
    def checksum(document=None, weight=1.0, held_out=2.0, length=LENGTH):
        documents = some_stories(8, words=24)
        if document is not None:
            documents[document] = documents[document].replace("the", "one", 1)
        text = Text("t", [some_tokens(tokenizer, documents)], length, held_out, weight)
        return LanguageModelling(Corpus([text], 3), tokenizer, 10, 4, 4).checksum()

    others = [
        checksum(document=0),
        checksum(document=7),
        checksum(weight=2.0),
        checksum(held_out=3),
        checksum(length=7),
    ]
    assert checksum() == checksum() and len({checksum(), *others}) == 6


# Classification


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


def test_all_tasks_are_what_the_loop_asks_for(tokenizer):
    protocol = {name for name in vars(tasks.Task) if not name.startswith("_")} | set(tasks.Task.__annotations__)
    classification = Classification(some_rows(), some_rows(), epochs=1, batch_size=2, seed=0)
    for task in (a_task(tokenizer), classification, an_instruction(tokenizer)):
        assert all(hasattr(task, name) for name in protocol)


def test_a_model_inside_another_writes_the_sample(tokenizer):
    """As DistributedDataParallel wraps one."""

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *arguments, **settings):
            return self.module(*arguments, **settings)

    task, model = a_task(tokenizer), a_llama()
    assert judged(task, Wrapped(model)) == judged(task, model)


# Prompts and answers


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
