"""Language modelling: losses and bits per byte, against sums by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fitting import LENGTH, a_llama, a_task, by_hand, judged, some_tokens
from minillama.text.corpus import Corpus, Text, evenly
from minillama.training.distributed import Processes
from minillama.training.language_modelling import LanguageModelling, evaluations
from models import some_stories


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
    assert [task.first_step(epoch) for epoch in (1, 2, 3, 4)] == [0, 4, 8, 10]
    assert [task.name(epoch) for epoch in (1, 2, 3)] == ["step 4", "step 8", "step 10"]


@pytest.mark.parametrize("every", [1, 3, 200])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 60])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_each_pass_ends_with_an_evaluation(passes, batch_size, every):
    """A pass ends with the step that takes its last window; also if a batch is larger than a pass."""
    length = 25
    steps = -(-passes * length // batch_size)
    found = evaluations(steps, every, passes, length, batch_size)
    ends = [0, *found]
    assert ends[-1] == steps and all(0 < b - a <= every for a, b in itertools.pairwise(ends))
    for number in range(1, passes + 1):
        (end,) = [
            step for step in range(1, steps + 1) if (step - 1) * batch_size < number * length <= step * batch_size
        ]
        assert int(found[end].removeprefix("epoch ")) >= number
    assert found[steps] == f"epoch {passes}"
    longer = evaluations(-(-(passes + 1) * length // batch_size), every, passes + 1, length, batch_size)
    same = {end: name for end, name in longer.items() if end < steps}
    assert same == {end: name for end, name in found.items() if end < steps}


def test_evaluations_within_a_pass_are_named_by_their_step():
    assert evaluations(9, 3, 2, 9, 2) == {
        2: "epoch 1, step 2", 5: "epoch 1", 7: "epoch 2, step 7", 9: "epoch 2",
    }  # fmt: skip
    assert evaluations(10, 4, None, 9, 2) == {4: "step 4", 8: "step 8", 10: "step 10"}


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
    assert score.quality is None and score.metrics == {} and score.text == "no held-out documents, so no score"
    assert score.sample


def test_the_sample_continues_the_prompt_alike_each_time(tokenizer):
    model = a_llama()
    samples = [judged(a_task(tokenizer, sample_prompt="the  big", seed=seed), model).sample for seed in (3, 3, 4)]
    assert samples[0] == samples[1] != samples[2]
    assert all(sample.startswith("the big") and "\n" not in sample for sample in samples)
    long_prompt = a_task(tokenizer, sample_prompt="the big cat " * 30)  # longer than the model's context
    assert judged(long_prompt, model).sample.startswith("the big cat the big")


def test_a_sample_prompt_that_is_no_text_is_refused_before_the_first_step(tokenizer):
    with pytest.raises(ValueError, match="is not UTF-8 text"):
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
