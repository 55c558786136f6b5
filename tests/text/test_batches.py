"""Rows tokenized, padded and cut into batches."""

from __future__ import annotations

import pytest
import torch

from minillama.text.batches import (
    by_length,
    cut_by_length,
    cut_in_batches,
    pad,
    prompt_parts,
    prompt_question,
    shuffled_batches,
    to_batch,
    tokenize_rows,
    word_ids,
)
from minillama.text.labelled import Row
from models import CFIMDB, SST

# Tokens


def test_a_row_too_long_loses_the_end_of_its_sentence_only(llama_tokenizer):
    rows = [Row(0, "a good film " * 20), Row(1, "short")]
    whole, none = tokenize_rows(rows, llama_tokenizer, 1000)
    assert none == 0
    done, cut = tokenize_rows(rows, llama_tokenizer, 12)
    assert cut == 1 and done[0].ids == (*whole[0].ids[:11], 2) and done[1].ids == whole[1].ids
    assert done[0].sentence == rows[0].sentence

    assert tokenize_rows(rows[1:], llama_tokenizer, len(whole[1].ids))[1] == 0  # just fits
    question = prompt_question(CFIMDB).rstrip()
    tail = tuple(llama_tokenizer.encode(question.lstrip(), bos=False, eos=False))
    done, cut = tokenize_rows(rows, llama_tokenizer, 20, question=question)
    assert cut == 1 and done[0].ids == (*whole[0].ids[: 20 - len(tail)], *tail)
    with pytest.raises(ValueError, match="context of 8 tokens has no room"):
        tokenize_rows(rows, llama_tokenizer, 8, question=question)


TEMPLATES = [
    "{sentence} All in all, it was",
    "Review: {sentence} It was",
    'They wrote "{sentence}" and meant',
    "{sentence}\nSentiment:",
    "A review\n\n{sentence}\n\nIs it {labels}?",
    "{sentence}",
    "{sentence}, so",
    "({sentence}) is {labels}:",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_tokenized_as_one_text_and_never_loses_a_part_of_the_template(any_tokenizer, template):
    def encode(text):
        return any_tokenizer.encode(text, bos=False, eos=False)

    before, behind = prompt_parts(template, SST)
    rows = [Row(0, "It's"), Row(1, "a fine, fine film about films and more " * 9 + "films.")]
    whole, cut = tokenize_rows(rows, any_tokenizer, 1000, before=before, question=behind)
    assert cut == 0 and [list(row.ids[1:]) for row in whole] == [encode(before + row.sentence + behind) for row in rows]
    done, cut = tokenize_rows(rows, any_tokenizer, 50, before=before, question=behind)
    assert cut == 1 and done[0] == whole[0] and len(done[1].ids) == 50
    text = any_tokenizer.decode(done[1].ids[1:])
    assert text.startswith(before + "a fine, fine film") and text.endswith(behind)
    few, _ = tokenize_rows(rows, any_tokenizer, 1000, before=before, question=behind, max_sentence_len=4)
    text = any_tokenizer.decode(few[1].ids[1:])
    assert text.startswith(before + "a") and text.endswith(behind) and len(text) < len(before + behind) + 30


def test_an_empty_sentence_leaves_no_second_space(llama_tokenizer):
    for before, behind, text in (
        ("", " It was", "It was"),
        ("Review: ", " It was", "Review: It was"),
        ('"', '" is', '"" is'),
    ):
        ((row,), _) = tokenize_rows([Row(0, "")], llama_tokenizer, 50, before=before, question=behind)
        assert list(row.ids) == llama_tokenizer.encode(text, bos=True, eos=False)


def test_a_word_is_tokenized_as_it_follows_another(any_tokenizer):
    for text in ("good", "not so good", "Sci/Tech"):
        whole = any_tokenizer.encode(f"This movie is {text}", bos=False, eos=False)
        before = any_tokenizer.encode("This movie is", bos=False, eos=False)
        assert before + word_ids(any_tokenizer, text) == whole


def test_max_sentence_len_cuts_the_sentence_before_anything_is_added(llama_tokenizer):
    rows = [Row(0, "one good film after another good film")]
    ids = tuple(llama_tokenizer.encode(rows[0].sentence, bos=False, eos=False))
    done, cut = tokenize_rows(rows, llama_tokenizer, 100, max_sentence_len=3)
    assert cut == 0 and done[0].ids == (1, *ids[:3], 2)


def test_each_row_is_tokenized_once(llama_tokenizer):
    class Counting:
        bos_id, eos_id, texts = 1, 2, []

        def encode(self, text, bos, eos):
            self.texts.append(text)
            return [7]

    rows = [Row(0, "a"), Row(1, "b"), Row(1, "a")]
    tokenize_rows(rows, Counting(), 50, question=" question")
    assert sorted(Counting.texts) == ["a question", "a question", "b question"]


# Batches


def test_padding_goes_to_either_side_and_is_told_by_a_mask():
    ids, mask = pad([[5, 6, 7], [8]], pad_id=3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]] and mask.tolist() == [[True] * 3, [True, False, False]]
    ids, mask = pad([[5, 6, 7], [8]], pad_id=3, side="left")
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]] and mask.tolist() == [[True] * 3, [False, False, True]]
    ids, mask = pad([[3, 3], [8, 9]], pad_id=3)  # an id that equals the pad's is still a token
    assert ids.tolist() == [[3, 3], [8, 9]] and mask is None


def some_rows(lengths):
    return [Row(i % 2, str(i), tuple(range(1, n + 1))) for i, n in enumerate(lengths)]


def test_a_batch_holds_its_rows_and_a_mask():
    rows = some_rows([3, 1, 2, 3])
    batch = to_batch(rows, [2, 0, 1], pad_id=9)
    assert batch.ids.tolist() == [[1, 2, 9], [1, 2, 3], [1, 9, 9]] and batch.labels.tolist() == [0, 0, 1]
    assert batch.mask.tolist() == [[True, True, False], [True] * 3, [True, False, False]]
    assert to_batch(rows, [0, 3], 9).mask is None
    assert cut_in_batches([4, 3, 2, 1, 0], 2) == [[4, 3], [2, 1], [0]]
    assert by_length(rows) == [0, 3, 2, 1]


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize("count, size", [(103, 8), (16, 8), (5, 8), (1, 1), (300, 3)])
def test_an_epochs_batches_hold_every_row_once_and_depend_on_seed_and_epoch_alone(bucketed, count, size):
    rows = some_rows([1 + 37 * i % 50 for i in range(count)])
    plan = shuffled_batches(rows, size, seed=5, epoch=2, bucketed=bucketed)
    assert sorted(i for batch in plan for i in batch) == list(range(count))
    assert len(plan) == -(-count // size) and sorted(map(len, plan), reverse=True)[:-1] == [size] * (len(plan) - 1)
    assert shuffled_batches(rows, size, seed=5, epoch=2, bucketed=bucketed) == plan
    if count > size:
        assert shuffled_batches(rows, size, seed=5, epoch=3, bucketed=bucketed) != plan
        assert shuffled_batches(rows, size, seed=6, epoch=2, bucketed=bucketed) != plan


def test_bucketed_batches_are_of_like_length_and_the_longest_comes_first():
    generator = torch.Generator().manual_seed(0)
    rows = some_rows(torch.randint(2, 90, (4000,), generator=generator).tolist())
    real = sum(len(row.ids) for row in rows)

    def computed(plan):
        return sum(len(batch) * max(len(rows[i].ids) for i in batch) for batch in plan)

    bucketed, random = (shuffled_batches(rows, 40, 1, 1, flag) for flag in (True, False))
    assert computed(bucketed) < 1.1 * real and computed(random) > 1.7 * real
    sizes = [len(batch) * max(len(rows[i].ids) for i in batch) for batch in bucketed]
    assert sizes[0] == max(sizes)
    assert sizes[1:] != sorted(sizes[1:], reverse=True)  # the others in random order


def set_partitions(items):
    """Every way to divide the items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in set_partitions(rest):
        yield [[first], *groups]
        for k, group in enumerate(groups):
            yield [*groups[:k], [first, *group], *groups[k + 1 :]]


@pytest.mark.parametrize("piece_cost", [1, 4, 9, 1000])
@pytest.mark.parametrize("most_rows", [None, 1, 3])
def test_no_division_of_a_batch_costs_less_than_the_pieces_of_similar_length(piece_cost, most_rows):
    positions, lengths = [10, 11, 12, 13, 14, 15, 16], [2, 9, 3, 9, 1, 5, 4]
    of = dict(zip(positions, lengths, strict=True))

    def cost(pieces):
        return sum(len(piece) * max(of[i] for i in piece) + piece_cost for piece in pieces)

    pieces = cut_by_length(positions, lengths, piece_cost, most_rows)
    assert sorted(i for piece in pieces for i in piece) == positions  # each row once
    allowed = [some for some in set_partitions(positions) if max(map(len, some)) <= (most_rows or 7)]
    assert max(map(len, pieces)) <= (most_rows or 7) and cost(pieces) == min(map(cost, allowed))
    assert pieces == [positions] or [of[i] for piece in pieces for i in piece] == sorted(lengths, reverse=True)
    assert cut_by_length(positions, lengths, piece_cost, most_rows) == pieces  # a resumed run takes the same


def test_a_batch_that_is_best_in_one_piece_keeps_its_order():
    assert cut_by_length([7, 5, 6], [3, 4, 3], piece_cost=2) == [[7, 5, 6]]
    assert cut_by_length([7, 5, 6], [3, 4, 3], piece_cost=2, most_rows=99) == [[7, 5, 6]]
    assert cut_by_length([7, 5, 6], [1, 4, 1], piece_cost=2) == [[5], [7, 6]]
