"""Beam search against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from minillama.decoding.beam_search import beam_search
from minillama.decoding.sampling import generate
from models import PROMPTS, ConstantModel, CountingModel, seeded, tiny_llama

# Other decoders


def brute_force(model, prompt, length, vocab_size, length_penalty, eos):
    """The best score of all continuations that end in eos, or have the full length."""
    best = (-math.inf, None)
    for size in range(1, length + 1):
        for tail in itertools.product(range(vocab_size), repeat=size):
            if eos in tail[:-1] or (size < length and tail[-1] != eos):
                continue
            text = torch.cat((prompt, torch.tensor([tail])), dim=1)
            log_probabilities = model(text, text)[0].log_softmax(-1)[0]
            score = sum(float(log_probabilities[prompt.shape[1] - 1 + i, token]) for i, token in enumerate(tail))
            best = max(best, (score / size**length_penalty, tail))
    return best


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_a_beam_wide_enough_finds_the_best_of_all(length_penalty, seed):
    model = tiny_llama(seed=seed, causal=True, vocab_size=5, n_layers=1)
    prompt = torch.randint(5, (1, 3), generator=seeded(seed))
    score, tail = brute_force(model, prompt, 4, 5, length_penalty, eos=2)
    for use_cache in (True, False):
        found, its_score = beam_search(
            model, prompt, 4, beams=200, length_penalty=length_penalty, eos_ids=(2,), use_cache=use_cache
        )
        assert found[3:].tolist() == list(tail) and its_score == pytest.approx(score, rel=1e-5)


class Chain(CountingModel):
    """A model in which each token's probabilities depend on the token before alone; what has none is impossible."""

    def __init__(self, probabilities) -> None:
        super().__init__(max_seq_len=64)
        self.logits = torch.tensor(probabilities).clamp(min=1e-12).log()

    def __call__(self, tokens, attention_mask=None):
        self.windows.append(tokens.clone())
        return self.logits[tokens[:, -1:]], tokens


END, A, X = 0, 1, 2


NEVER = [1.0, 0, 0, 0]  # after the end, and after what does not come


@pytest.mark.parametrize(
    ("length_penalty", "beams", "after_a", "after_x", "after_3", "wanted", "passes"),
    [
        # A text ended, and one that goes on scores better as it is longer: log(.4) / 1 and log(.38) / 2^2.
        (2.0, 1, [0.4, 0, 0.39, 0.21], [0.98, 0.01, 0.01, 0], NEVER, [X, END], 2),
        # Shorter ones score better, but the likeliest has not ended yet; when it has, what is open is far behind.
        (-1.0, 2, [0.04, 0.03, 0.9, 0.03], [0.05, 0.1, 0.05, 0.8], [0.99, 0, 0.01, 0], [X, 3, END], 3),
        # One text that ended beats all that is open: no second one is waited for.
        (0.0, 2, [0.9, 0.05, 0.05, 0], [0.1, 0.5, 0.4, 0], NEVER, [END], 1),
        # Nor has what is open to be behind the second of those that ended.
        (0.0, 3, [0.3, 0.2, 0.5, 0], [0.9, 0.05, 0.05, 0], NEVER, [X, END], 2),
    ],
)
def test_a_beam_search_ends_when_nothing_open_can_beat_what_ended(
    length_penalty, beams, after_a, after_x, after_3, wanted, passes
):
    probabilities = [NEVER, after_a, after_x, after_3]
    model = Chain(probabilities)
    found, score = beam_search(model, torch.tensor([[A]]), 4, beams=beams, length_penalty=length_penalty, eos_ids=[END])
    chances = zip([A, *wanted], wanted, strict=False)
    log_probability = sum(math.log(probabilities[before][after]) for before, after in chances)
    assert found.tolist() == [A, *wanted] and len(model.windows) == passes
    assert score == pytest.approx(log_probability / len(wanted) ** length_penalty, rel=1e-5)


@pytest.mark.parametrize("length_penalty", [-2.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_ending_a_beam_search_early_changes_nothing(length_penalty, beams):
    """Against the search that always goes on to the end."""

    def searched(logits, new):
        texts, best = [(0.0, (A,))], (-math.inf, ())
        for size in range(1, new + 1):
            grown = [(s + float(logits[text[-1]][token]), (*text, token)) for s, text in texts for token in range(5)]
            grown.sort(reverse=True)
            best = max([best, *((s / size**length_penalty, text) for s, text in grown[:beams] if text[-1] == END)])
            texts = [(s, text) for s, text in grown if text[-1] != END][:beams]
        return max([best, *((s / new**length_penalty, text) for s, text in texts)])

    for seed in range(20):
        probabilities = (2 * torch.randn(5, 5, generator=seeded(seed))).softmax(-1)
        score, text = searched(probabilities.double().log(), 8)
        found, its_score = beam_search(
            Chain(probabilities.tolist()),
            torch.tensor([[A]]),
            8,
            beams=beams,
            length_penalty=length_penalty,
            eos_ids=[END],
        )
        assert tuple(found.tolist()) == text and its_score == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_beam_of_which_all_has_ended_is_the_best_of_it(beams):
    model = tiny_llama(causal=True, vocab_size=2, n_layers=1)
    prompt = torch.tensor([[1, 0]])
    found, score = beam_search(model, prompt, 5, beams=beams, eos_ids=(0, 1))
    with torch.no_grad():
        best = model(prompt)[0][0, -1].log_softmax(-1).max(-1)
    assert found.tolist() == [1, 0, int(best.indices)] and score == pytest.approx(float(best.values))


def test_one_beam_is_greedy():
    model = tiny_llama(causal=True)
    found, _ = beam_search(model, PROMPTS[:1], 12, beams=1)
    assert torch.equal(found, generate(model, PROMPTS[:1], 12, temperature=0.0)[0])
    assert torch.equal(beam_search(model, PROMPTS[:1], 0)[0], PROMPTS[0])


# Banned tokens


ALL_BUT_TWO = [1.0, 9.0, 2.0, 9.0, 0.5]  # 1 and 3 are banned


@pytest.mark.parametrize("beams", [1, 2, 3, 50])
def test_beams_hold_no_banned_token(beams):
    found, score = beam_search(
        ConstantModel(ALL_BUT_TWO), PROMPTS[:1] % 5, 3, beams=beams, banned_ids=(1, 3), eos_ids=(4,)
    )
    assert not {1, 3} & set(found[5:].tolist()) and math.isfinite(score)
