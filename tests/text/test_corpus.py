"""A corpus: training reads every window as often as its text weighs, and never a held-out one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from conftest import ROOT
from minillama.text.corpus import Corpus, Text, evenly, held_out_count, to_tensor
from minillama.text.documents import Tokens


def counting_tokens(lengths, first=0, name="t"):
    """Tokens that are numbered through, so that each tells where it stood; a byte of text for each."""
    starts = np.cumsum([0, *lengths]).astype("<u8")
    ids = np.arange(first, first + int(starts[-1]), dtype="<u4")
    return Tokens(ROOT / name, ids, starts, np.array(lengths, "<u8"), name)


@pytest.mark.parametrize(
    "held_out, documents, wanted",
    [(0, 9, 0), (3, 9, 3), (1, 9, 1), (0.5, 9, 4), (0.1, 100, 10), (0.01, 9, 1), (0.01, 1, 0), (0.99, 2, 1)],
)
def test_held_out_is_a_number_or_a_share(held_out, documents, wanted):
    assert held_out_count(held_out, documents) == wanted


@pytest.mark.parametrize("held_out", [0, 1, 2, 4, 0.3, 5])
def test_the_last_documents_of_a_text_are_held_out_across_its_files(held_out):
    lengths = [[20, 30, 10], [25], [15, 40]]
    files = [counting_tokens(one, 1000 * i) for i, one in enumerate(lengths)]
    text = Text("t", files, 4, held_out)
    documents = [
        set(tokens.ids[tokens.starts[d] : tokens.starts[d + 1]].tolist())
        for tokens in files
        for d in range(len(tokens.text_bytes))
    ]
    kept = documents[: len(documents) - held_out_count(held_out, 6)]
    out = documents[len(kept) :]
    seen = {int(i) for w in range(len(text.train)) for i in text.train.window(w)}
    judged = {int(i) for w in range(len(text.held_out)) for i in text.held_out.window(w)}
    assert seen and seen <= set().union(*kept) and judged <= set().union(*out) and bool(judged) == bool(out)
    assert text.held_out_tokens == text.held_out_bytes == sum(map(len, out))


def test_every_training_token_is_an_input_once_but_for_the_tail_of_the_text():
    files = [counting_tokens(lengths, 1000 * i) for i, lengths in enumerate([[10, 7, 20], [2], [3], [1, 12, 6]])]
    text = Text("t", files, 4, 2)
    mixture = Corpus([text], seed=0)
    # The last two documents are held out; what is left is one file's after the other's, short files and all.
    tokens = [int(i) for one, last in zip(files, (37, 2, 3, 1), strict=True) for i in one.ids[:last]]
    assert len(tokens) == 43 and text.training_windows == 10
    for i in range(text.training_windows):
        assert mixture.window(i).tolist() == tokens[4 * i : 4 * i + 5]


def test_a_folder_of_texts_shorter_than_a_window_is_read_as_one():
    files = [counting_tokens([3], 1000 * i) for i in range(20)]
    text = Text("t", files, 16, 0.3)
    assert text.training_windows == 2 and text.held_out_windows == 1
    assert text.train.window(1).tolist() == [1000 * (i // 3) + i % 3 for i in range(16, 33)]


def test_windows_as_a_tensor_are_wide_enough_for_every_id():
    window = np.array([65535, 0, 1], "<u2")
    assert to_tensor([window, window]).tolist() == [[65535, 0, 1]] * 2 and to_tensor([window]).dtype == torch.int64


@pytest.mark.parametrize(
    "lengths, held_out, message",
    [
        (
            [9, 9],
            2,
            "t has 2 documents, so 2 cannot be held out; separate documents by <|endoftext|>",
        ),
        ([9, 9], 50, "t has 2 documents, so 50 cannot"),
        ([4, 9], 1, "t is too short for windows of 4 tokens"),
        ([9, 4], 1, "t is too short for windows of 4 tokens"),
    ],
)
def test_a_text_too_short_is_refused(lengths, held_out, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Text("t", [counting_tokens(lengths)], 4, held_out)


def mixture(*sizes_and_weights, seed=0):
    """Texts of so many windows each."""
    texts = [
        Text(f"t{i}", [counting_tokens([4 * n + 1], 1000 * i)], 4, 0, weight)
        for i, (n, weight) in enumerate(sizes_and_weights)
    ]
    return Corpus(texts, seed)


def test_in_one_pass_each_window_comes_as_often_as_its_text_weighs():
    corpus_ = mixture((11, 1.0), (6, 2.0), (20, 0.3))
    assert corpus_.pass_length == 11 + 12 + 6
    for number in (0, 1, 7):
        order = corpus_.order(number).tolist()
        counts = Counter(order)
        assert len(order) == corpus_.pass_length
        assert [counts[i] for i in range(17)] == [1] * 11 + [2] * 6
        assert sum(counts[i] for i in range(17, 37)) == 6 and max(counts[i] for i in range(17, 37)) == 1
    assert order != sorted(order)


def test_a_small_weight_goes_through_all_windows_before_one_comes_again():
    corpus_ = mixture((20, 0.3), (5, 1.0))
    drawn = [int(i) for number in range(10) for i in corpus_.order(number) if i < 20]
    firsts = [i for number in range(3) for i in corpus_.order(number).tolist() if i < 20]
    assert len(firsts) == len(set(firsts)) == 18
    assert set(Counter(drawn).values()) == {3}
    chosen = [frozenset(int(i) for i in corpus_.order(number) if i < 20) for number in (0, 10, 20, 30)]
    assert len(set(chosen)) == 4  # each time through them in another order


def test_the_texts_are_mixed_within_a_pass():
    of_the_first = [i < 30 for i in mixture((30, 1.0), (30, 1.0)).order(0).tolist()]
    assert 5 < sum(of_the_first[:30]) < 25


@pytest.mark.parametrize("weight", [1.5, 0.3, 2.7, 0.05])
def test_over_many_passes_no_window_is_favoured(weight):
    corpus_ = mixture((10, weight))
    counts = Counter(int(i) for number in range(20) for i in corpus_.order(number))
    assert set(counts.values()) == {max(1, round(weight * 10)) * 2}


def test_even_the_smallest_weight_is_a_window_in_each_pass():
    corpus_ = mixture((10, 1e-6), (5, 1.0))
    assert corpus_.pass_length == 6 and sum(i < 10 for i in corpus_.order(3)) == 1
    assert mixture((10, 1e-6)).batch(0, 3)


def test_the_order_is_a_function_of_seed_and_pass():
    orders = {
        (seed, number): mixture((30, 1.0), seed=seed).order(number).tolist() for seed in (0, 1) for number in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    corpus_ = mixture((30, 1.0))
    back_and_forth = [corpus_.order(number).tolist() for number in (1, 0, 1)]
    assert back_and_forth == [orders[0, 1], orders[0, 0], orders[0, 1]]


def test_texts_of_one_size_are_shuffled_each_in_its_own_way():
    order = [int(i) for i in mixture((30, 0.5), (30, 0.5)).order(0)]
    assert sorted(i for i in order if i < 30) != sorted(i - 30 for i in order if i >= 30)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 40])
def test_batches_follow_the_passes_without_a_seam(batch_size):
    corpus_ = mixture((11, 1.0), (3, 2.0))
    drawn = [i for step in range(10) for i in corpus_.batch(step, batch_size)]
    passes = [int(i) for number in range(len(drawn) // 17 + 1) for i in corpus_.order(number)]
    assert drawn == passes[: len(drawn)] and all(type(i) is int for i in drawn)


def test_windows_to_judge_by_are_spread_evenly():
    stretch = Text("t", [counting_tokens([4 * 10, 1]), counting_tokens([4 * 21], 41)], 4, 0).train
    for count, wanted in ((100, 31), (31, 31), (30, 16), (8, 8), (1, 1)):
        found = evenly(stretch, count)
        assert len(found) == wanted
    assert [int(window[0]) for window in evenly(stretch, 8)] == [0, 16, 32, 48, 64, 80, 96, 112]


def test_a_weight_beyond_memory_is_refused():
    with pytest.raises(ValueError, match=r"t: a weight of 1e\+12 makes 1e\+13 windows in a pass, more than"):
        Text("t", [counting_tokens([41])], 4, 0, 1e12)


@pytest.mark.parametrize("held_out", [1.5, 2.01])
def test_a_part_of_a_document_cannot_be_held_out(held_out):
    with pytest.raises(ValueError, match=f"--held_out is {held_out}; it must be a share below 1, or a whole number"):
        held_out_count(held_out, 9)
