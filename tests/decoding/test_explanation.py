"""The table that shows the alternatives to each token."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from minillama.decoding.explanation import Explanation
from minillama.decoding.filters import epsilon_filter, top_k_filter
from minillama.decoding.sampling import stream


class WordTokenizer:
    """Each word a token, and a space before it unless it is the first."""

    stop_ids = (9,)
    bos_id = 8

    def __init__(self, words):
        self.words = words

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


class Fixed:
    """A model that gives the same logits whatever it reads."""

    class config:  # noqa: N801
        max_seq_len = 64

    def __init__(self, probabilities):
        self.logits = torch.tensor(probabilities).log()

    def __call__(self, tokens, attention_mask=None):
        return self.logits.expand(len(tokens), 1, -1), tokens


PROBABILITIES = [0.4, 0.3, 0.2, 0.06, 0.04]
WORDS = ["the", "a", "<b>", "'&", "rare"]


def explained(temperature, *filters, steps=20):
    explanation = Explanation(WordTokenizer(WORDS), [0], temperature, filters)
    idx, generator = torch.tensor([[0]]), torch.Generator().manual_seed(0)
    settings = {"temperature": temperature, "epsilon": 0.0, "filters": filters, "generator": generator}
    ids = [int(chosen) for chosen in stream(Fixed(PROBABILITIES), idx, steps, watch=explanation.watch, **settings)]
    return explanation, ids


def test_each_step_tells_what_was_kept_and_what_was_cut():
    explanation, ids = explained(1.0, partial(epsilon_filter, epsilon=0.05), partial(top_k_filter, k=3))
    assert len(explanation.steps) == len(ids) == 20 and len(set(ids)) == 3
    for step, token in zip(explanation.steps, ids, strict=True):
        assert step.chosen.text == f"␣{WORDS[token]}"
        assert [one.text for one in step.kept] == ["␣the", "␣a", "␣<b>"] and step.kept_count == 3
        assert [one.text for one in step.cut] == ["␣'&", "␣rare"] and step.cut_count == 2
        assert step.cut_mass == pytest.approx(0.1)
        assert [one.before for one in step.kept] == pytest.approx([0.4, 0.3, 0.2])
        assert [one.after for one in step.kept] == pytest.approx([4 / 9, 3 / 9, 2 / 9])
        assert [one.after for one in step.cut] == [0, 0]


def test_probabilities_are_those_at_the_temperature():
    step = explained(0.5)[0].steps[0]
    assert step.kept[0].before == pytest.approx(0.16 / sum(p * p for p in PROBABILITIES))
    assert step.kept[0].before == step.kept[0].after and step.cut_count == 0


def test_at_temperature_0_the_likeliest_alone_is_kept():
    explanation, ids = explained(0.0)
    step = explanation.steps[0]
    assert set(ids) == {0} and step.kept_count == 1 and step.cut_count == 4
    assert (step.chosen.before, step.chosen.after) == (pytest.approx(0.4), 1.0)


def test_watching_changes_no_draw():
    ids = explained(1.0, partial(top_k_filter, k=3))[1]
    settings = {"epsilon": 0.0, "filters": [partial(top_k_filter, k=3)], "generator": torch.Generator().manual_seed(0)}
    assert ids == [int(chosen) for chosen in stream(Fixed(PROBABILITIES), torch.tensor([[0]]), 20, **settings)]


def test_the_table_has_a_line_for_each_token():
    explanation, _ = explained(1.0, partial(top_k_filter, k=3), steps=4)
    head, *lines = explanation.table().splitlines()
    assert head.startswith("token") and len(lines) == 4
    for line, step in zip(lines, explanation.steps, strict=True):
        assert line.startswith(step.chosen.text) and f"{step.chosen.after:7.3f}" in line
        assert line.endswith("| 2 with 0.100: ␣'& 0.060, ␣rare 0.040")


def test_the_chosen_token_is_shown_however_unlikely_it_is():
    explanation = Explanation(WordTokenizer([f"w{i}" for i in range(20)]), [0], 1.0, [])
    explanation.watch(-0.1 * torch.arange(20.0)[None], torch.tensor([17]))
    (step,) = explanation.steps
    assert [one.text for one in step.kept] == [*(f"␣w{i}" for i in range(8)), "␣w17"] and step.kept[-1] == step.chosen


def test_what_cannot_be_printed_is_shown_by_its_number():
    words = ["\x00a", "\x1b[31m", "\r", "\x85\u200b\xa0", "é\n"]
    explanation = Explanation(WordTokenizer(words), [0], 1.0, [])
    for token in range(5):
        explanation.watch(torch.zeros(1, 5), torch.tensor([token]))
    chosen = [step.chosen.text for step in explanation.steps]
    assert chosen == ["␣<0x00>a", "␣<0x1B>[31m", "␣<0x0D>", "␣<0x85><0x200B><0xA0>", "␣é⏎"]
    assert all(one.isprintable() or one == "\n" for one in explanation.table())


def test_spaces_and_line_ends_are_made_visible():
    explanation = Explanation(WordTokenizer(["a", "\n"]), [0], 1.0, [])
    explanation.watch(torch.tensor([[0.0, 5.0]]), torch.tensor([1]))
    assert explanation.steps[0].chosen.text == "␣⏎"
