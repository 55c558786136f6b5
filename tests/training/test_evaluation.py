"""Evaluation: predictions, scores, documents and answers, against scikit-learn and loops."""

from __future__ import annotations

import math
import re
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from fitting import Bag, some_rows
from lora import apply_lora
from minillama.text.examples import Example
from minillama.text.labelled import Row
from minillama.training.distributed import Processes
from minillama.training.evaluation import (
    Evaluation,
    answer_prompts,
    answer_scores,
    describe,
    describe_answers,
    describe_chance,
    describe_classes,
    evaluate,
    exact_match,
    score_documents,
    token_f1,
    wilson_interval,
)
from models import WeightCasts, tiny_llama
from reference import brute_force


@pytest.mark.parametrize("size", [1, 4, 30])
def test_predictions_stand_in_the_order_of_the_rows(size):
    rows, model = some_rows(13), Bag()
    result = evaluate(model, rows, size)
    by_hand = [model.table[list(row.ids)].mean(0).argmax().item() for row in rows]
    assert result.predictions == by_hand
    gold = [row.label for row in rows]
    assert result.accuracy == pytest.approx(accuracy_score(gold, by_hand))
    assert result.macro_f1 == pytest.approx(f1_score(gold, by_hand, average="macro"))
    assert result.confusion == confusion_matrix(gold, by_hand).tolist()


def test_a_class_that_no_row_has_counts_in_macro_f1_as_in_the_table_beneath():
    rows = [Row(label, f"{label} {i}", (label,)) for i, label in enumerate([0, 1, 0, 1])]
    result = evaluate(model_of_scores([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]), rows, 2)
    assert result.accuracy == 1.0 and result.macro_f1 == pytest.approx(2 / 3)
    table = describe_classes(result, rows, ["bad", "good", "unseen"])
    assert re.search(r"macro avg +\S+ +\S+ +(\S+)", table)[1] == f"{result.macro_f1:.3f}"


def model_of_scores(scores):
    """A model whose scores of a row are those of its first id."""

    class Model(torch.nn.Embedding):
        def forward(self, ids, mask=None):
            return super().forward(ids[:, 0]).log_softmax(-1)

    return Model.from_pretrained(torch.tensor(scores))


@pytest.mark.parametrize("bucketed", [True, False])
def test_batches_are_of_like_length_unless_the_order_of_the_file_is_asked_for(bucketed):
    rows, model = some_rows(12), Bag()
    evaluate(model, rows, 5, bucketed=bucketed)
    widths = [len(ids[0]) for _, ids in model.seen]
    order = rows if not bucketed else sorted(rows, key=lambda row: len(row.ids), reverse=True)
    assert widths == [max(len(row.ids) for row in order[i : i + 5]) for i in (0, 5, 10)]


def test_without_gold_labels_there_is_no_accuracy():
    rows = [Row(0, row.sentence, row.ids) for row in some_rows()]
    result = evaluate(Bag(), rows, 4)
    assert len(result.predictions) == 11 and result.accuracy is None and result.macro_f1 is None
    assert "no gold labels" in describe(result)
    assert describe(Evaluation([1], 0.5, 0.25)) == "accuracy 0.500, macro-F1 0.250"
    whole = Evaluation([1], 0.5, 0.25, 0.75)
    assert describe(whole) == describe(Evaluation([1], 0.5, 0.25))
    assert describe(whole, with_loss=True) == "accuracy 0.500, macro-F1 0.250, loss 0.7500"


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_needs_no_gradient_and_restores_the_mode(was_training):
    model = Bag().train(was_training)
    evaluate(model, some_rows(), 4)
    assert model.training is was_training and all(not training_ for training_, _ in model.seen)
    assert model.table.grad is None


def test_classes_are_told_with_a_confusion_matrix():
    rows = [Row(label, "", (1,)) for label in (0, 0, 1, 1, 1)]
    matrix = [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    text = describe_classes(Evaluation([0, 1, 1, 1, 0], 0.6, 0.5833, None, matrix), rows, ["bad", "good", "none"])
    assert "precision" in text and text.endswith("1  1  0   bad\n1  2  0   good\n0  0  0   none")
    assert describe_classes(Evaluation([0], None, None), [Row(0, "", (1,))], ["bad", "good"]) == ""


@pytest.mark.parametrize("right, count", [(0, 1), (1, 1), (0, 12), (12, 12), (7, 12), (242, 1101), (146, 245)])
def test_the_interval_is_wilsons(right, count):
    """Its ends p solve (right / count - p)^2 = z^2 p (1 - p) / count (J. Am. Stat. Assoc. 22, 1927)."""
    a = NormalDist().inv_cdf(0.975) ** 2 / count
    roots = np.roots([1 + a, -(2 * right / count + a), (right / count) ** 2])
    assert wilson_interval(right, count) == pytest.approx(sorted(roots.real), abs=1e-7)


def test_accuracy_is_held_against_chance_and_the_commonest_class():
    rows = [Row(label, "", (1,)) for label in (0, 2, 2, 2, 2)]
    text = describe_chance(Evaluation([0, 1, 1, 1, 2], 0.4, 0.5), rows, "abcd")
    assert text == "95 % interval 0.118 to 0.769, chance 0.250, commonest class 0.800 (c)"
    assert describe_chance(Evaluation([0], None, None), rows[:1], "abcd") == ""


def test_scores_that_are_no_numbers_are_refused():
    model = Bag()
    with torch.no_grad():
        model.table.fill_(math.nan)
    with pytest.raises(ValueError, match="dev: the model's scores hold NaN or infinity in torch.float32; the weights"):
        evaluate(model, some_rows(), 4, name="dev")


# How well a language model predicts documents


def some_documents(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [[1, *torch.randint(3, 64, (n - 1,), generator=generator).tolist()] for n in lengths]


@pytest.mark.parametrize("window, stride", [(8, 1), (8, 3), (8, 4), (8, 8), (1, 1), (7, 2), (32, 16)])
def test_documents_are_scored_as_token_by_token(window, stride):
    model = tiny_llama(causal=True)
    documents = some_documents(1, 2, 7, 8, 9, 10, 17, 25, 3, 1, 31)
    nats, count = score_documents(model, documents, window, stride)
    wanted, number = brute_force(model, documents, window, stride)
    assert count == number == sum(len(ids) - 1 for ids in documents)
    assert nats == pytest.approx(wanted, rel=1e-5)


def test_a_stride_of_one_gives_each_token_the_whole_window():
    model, (ids,) = tiny_llama(causal=True), some_documents(25)
    with torch.no_grad():
        wanted = sum(
            -model(torch.tensor([ids[max(0, t - 8) : t]]))[0][0, -1].log_softmax(-1)[ids[t]].item()
            for t in range(1, 25)
        )
    assert score_documents(model, [ids], 8, 1)[0] == pytest.approx(wanted, rel=1e-5)
    assert score_documents(model, [ids], 8, 8)[0] != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("at_once", [1, 9, 30, 8192])
def test_neither_neighbours_nor_padding_nor_order_matter_to_a_document(at_once):
    model, documents = tiny_llama(causal=True), some_documents(3, 25, 8, 2, 14)
    alone = sum(score_documents(model, [ids], 8, 4)[0] for ids in documents)
    assert score_documents(model, documents[::-1], 8, 4, tokens_at_once=at_once)[0] == pytest.approx(alone, rel=1e-6)


def test_no_batch_is_larger_than_was_asked_for():
    model, sizes = tiny_llama(causal=True), []
    model.register_forward_hook(lambda module, inputs, _: sizes.append(inputs[0].numel()))
    score_documents(model, some_documents(*range(1, 30)), 8, 4, tokens_at_once=40)
    assert 24 <= max(sizes) <= 40 and len(sizes) > 10


def test_documents_without_a_token_to_predict_cost_nothing():
    assert score_documents(tiny_llama(causal=True), some_documents(1, 1), 8, 4) == (0.0, 0)


def test_scores_of_documents_that_are_no_numbers_are_refused():
    model = tiny_llama(causal=True)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity in torch.float32; the weights are damaged"):
        score_documents(model, some_documents(5), 8, 4)


# Answers


@pytest.mark.parametrize(
    "predicted, gold, exact, f1",
    [
        ("the red ball.", "Red, ball!", 1, 1),
        ("A  red\nball", "an red ball", 1, 1),
        ("red ball", "ball red", 0, 1),
        ("a blue ball", "red ball", 0, 1 / 2),
        ("ball", "red ball", 0, 2 / 3),  # precision 1, recall 1/2
        ("under the big bed", "under bed", 0, 4 / 5),  # precision 2/3, recall 1
        ("no no no", "no", 0, 1 / 2),  # one in common: precision 1/3, recall 1
        ("no no yes", "no no maybe", 0, 2 / 3),  # two of three in common
        ("tom", "mia", 0, 0),
        ("", "mia", 0, 0),
        ("The", "a", 1, 1),  # nothing is left of either
        ("theatre", "atre", 0, 0),  # an article is a word
        ("Tom's", "toms", 1, 1),
        ("ZO\u00cb", "zo\u00eb", 1, 1),
    ],
)
def test_answers_are_compared_as_squad_does(predicted, gold, exact, f1):
    assert exact_match(predicted, gold) == exact
    assert token_f1(predicted, gold) == token_f1(gold, predicted) == pytest.approx(f1)


def test_scores_are_means_over_the_answers():
    gold = [Example("", answer) for answer in ("red ball", "Tom", "in the park")]
    answers = ["a red ball", "Mia", "the park"]
    assert answer_scores(answers, gold) == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 0 + 2 / 3) / 3})
    assert describe_answers(answers, gold) == "exact match 0.333, F1 0.556"


class Letters:
    """A tokenizer of ids for their own sake: 2 and 3 end an answer."""

    pad_id, stop_ids, unused_ids = 0, (2, 3), ()

    def decode(self, ids):
        return " ".join(map(str, ids)) + " "


def some_prompts(count=9):
    generator = torch.Generator().manual_seed(4)
    lengths = [1 + 5 * n % 8 for n in range(count)]
    prompts = [torch.randint(4, 64, (n,), generator=generator).tolist() for n in lengths]
    return [Example("", "", (*prompt, 9, 9, 2), len(prompt)) for prompt in prompts]


def answered_by_hand(model, example, limit):
    ids, made = list(example.ids[: example.prompt_length]), []
    for _ in range(limit):
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        if made[-1] in Letters.stop_ids:
            return " ".join(map(str, made[:-1]))
        ids.append(made[-1])
    return " ".join(map(str, made))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_prompts_are_answered_as_each_alone_up_to_its_end_mark(batch_size):
    model, prompts = tiny_llama(seed=2, causal=True).train(), some_prompts()
    with torch.no_grad():
        model.tok_embeddings.weight[2:4] *= 2  # end marks come often
    answers = answer_prompts(model, prompts, Letters(), batch_size, 6)
    model.eval()
    assert answers == [answered_by_hand(model, prompt, 6) for prompt in prompts]
    lengths = {len(answer.split()) for answer in answers}
    assert len(lengths) > 2 and 6 in lengths


def test_answering_in_half_precision_casts_each_weight_once_also_frozen_ones():
    model = apply_lora(tiny_llama(causal=True))
    matrices = [parameter for name, parameter in model.named_parameters() if parameter.dim() == 2]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with WeightCasts() as casts:
        answer_prompts(model, some_prompts(3), Letters(), 4, 6, dtype=torch.bfloat16)
    assert casts.count == len(matrices)  # the embedding is one of them, as the output
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


@pytest.mark.parametrize("fsdp", [False, True])
def test_processes_share_the_prompts_unless_they_share_the_model(monkeypatch, fsdp):
    model, prompts = tiny_llama(causal=True), some_prompts(5)
    wanted = answer_prompts(model, prompts, Letters(), 4, 3)
    parts = []
    monkeypatch.setattr(Processes, "gather", lambda self, what: [what, *parts])
    if fsdp:
        assert answer_prompts(model, prompts, Letters(), 4, 3, processes=Processes(1, 2, True)) == wanted
        return
    monkeypatch.setattr(
        Processes, "gather", lambda self, what: parts.append(dict(what)) or [dict.fromkeys(range(5), "")]
    )
    for rank in (0, 1):
        answer_prompts(model, prompts, Letters(), 4, 3, processes=Processes(rank, 2))
    assert not parts[0].keys() & parts[1].keys() and min(map(len, parts)) >= 2
    assert [(parts[0] | parts[1])[i] for i in range(5)] == wanted
