"""Prompt lookup decoding: the same tokens and the same distribution in fewer passes."""

from __future__ import annotations

import collections
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from minillama.decoding.lookup import find_draft, lookup_decoding
from minillama.decoding.sampling import generate
from models import PROMPTS, CountingModel, seeded, tiny_llama


@pytest.mark.parametrize("max_seq_len", [64, 20])
def test_guessing_from_the_text_changes_no_greedy_token_and_saves_passes(max_seq_len):
    model, passes = tiny_llama(causal=True, max_seq_len=max_seq_len), []
    prompt = torch.tensor([[4, 9, 1, 4, 9, 1, 4, 9]])
    wanted = generate(model, prompt, 40, temperature=0.0)[0]
    model.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    assert torch.equal(lookup_decoding(model, prompt, 40), wanted)
    if max_seq_len == 64:
        assert len(passes) < 40
    end = int(wanted[20])
    first = wanted[8:].tolist().index(end) + 9
    assert torch.equal(lookup_decoding(model, prompt, 40, eos_ids=(end,)), wanted[:first])


def test_guessing_draws_from_the_same_distribution():
    """Three tokens; now and then find_draft guesses the first two rightly."""
    model = tiny_llama(causal=True, vocab_size=4, n_layers=1)
    prompt, draws = torch.tensor([[1, 2, 3, 1, 2]]), 2000
    generator = seeded(5)
    count = collections.Counter(
        tuple(lookup_decoding(model, prompt, 3, temperature=1.0, generator=generator)[5:].tolist())
        for _ in range(draws)
    )
    expected = {}
    for tail in itertools.product(range(4), repeat=3):
        text = torch.cat((prompt, torch.tensor([tail])), dim=1)
        with torch.no_grad():
            log_probabilities = model(text, text)[0].log_softmax(-1)[0]
        expected[tail] = draws * math.exp(sum(float(log_probabilities[4 + i, t]) for i, t in enumerate(tail)))
    assert sum(expected.values()) == pytest.approx(draws)
    likely = {tail: n for tail, n in expected.items() if n > 5}
    chi_square = sum((count[tail] - n) ** 2 / n for tail, n in likely.items())
    freedom = len(likely) - 1
    assert freedom > 10 and chi_square < freedom + 4 * math.sqrt(2 * freedom)


class CachedCounter(CountingModel):
    """The same, which reads token by token, as look-up decoding needs it."""

    def new_cache(self, capacity):
        cache = SimpleNamespace(length=0)
        cache.keep = lambda length: setattr(cache, "length", length)
        return cache

    def __call__(self, tokens, attention_mask=None, cache=None, targets=None):
        cache.length += tokens.shape[1]
        following = (tokens + 1) % self.vocab_size
        return self.certainty * torch.nn.functional.one_hot(following, self.vocab_size).float(), tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_taken_of_a_guess_behind_the_end(temperature):
    prompt = torch.tensor([[0, 1, 2, 3, 0, 1]])  # find_draft: 2, 3, 0, 1, all of it right
    model = CachedCounter(vocab_size=4, max_seq_len=32)
    assert lookup_decoding(model, prompt, 9, temperature=temperature)[6:].tolist() == [2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert lookup_decoding(model, prompt, 9, temperature=temperature, eos_ids=(3,))[6:].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ([1, 2, 3, 1, 2], [3, 1, 2]),
        ([1, 2], []),
        ([5], []),
        ([7, 7, 7], [7]),
        ([1, 2, 9, 2, 8, 1, 2], [9, 2, 8, 1, 2]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2]),
    ],
)
def test_a_guess_follows_the_last_and_longest_match(text, wanted):
    assert find_draft(text, 3) == wanted


def test_guessing_needs_a_cache():
    with pytest.raises(ValueError, match="look-up decoding needs a causal model"):
        lookup_decoding(tiny_llama(causal=False), PROMPTS[:1], 3)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_guessing_draws_no_banned_token(temperature):
    model = tiny_llama(vocab_size=5, causal=True)
    found = lookup_decoding(model, PROMPTS[:1] % 5, 20, temperature=temperature, banned_ids=(1, 3), generator=seeded())
    assert not {1, 3} & set(found[5:].tolist())
