"""Decoding: the filter, one draw, and the loop over a real tiny model and over scripted ones."""

from __future__ import annotations

import collections
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import tiny_llama
from minillama.decoding.beam_search import beam_search
from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.filters import (
    distribution,
    epsilon_filter,
    eta_filter,
    min_p_filter,
    repetition_penalised,
    top_k_filter,
    top_p_filter,
    typical_filter,
)
from minillama.decoding.lookup import guessed, lookup_decoding
from minillama.decoding.sampling import check_settings, generate, next_token, stream

PROMPTS = torch.randint(64, (3, 5), generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counter:
    """A model without weights: the token after n is n + 1, past the last one 0. Remembers what it was asked."""

    def __init__(self, vocab_size: int = 10, max_seq_len: int = 8, certainty: float = 50.0) -> None:
        self.config = SimpleNamespace(max_seq_len=max_seq_len)
        self.vocab_size, self.certainty = vocab_size, certainty
        self.windows, self.masks, self.grad_modes = [], [], []

    def __call__(self, tokens, attention_mask=None):
        self.windows.append(tokens.clone())
        self.masks.append(None if attention_mask is None else attention_mask.clone())
        self.grad_modes.append(torch.is_grad_enabled())
        following = (tokens[:, -1:] + 1) % self.vocab_size
        logits = self.certainty * torch.nn.functional.one_hot(following, self.vocab_size).float()
        return logits, tokens


class Constant(Counter):
    """A model that gives every row the same logits, whatever it reads."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def __call__(self, tokens, attention_mask=None):
        return self.logits.expand(len(tokens), 1, -1), tokens


@torch.no_grad()
def greedy_by_hand(model, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Arg-max of a full forward pass over the last tokens that fit, step by step, for one row."""
    tokens = prompt.clone()
    for _ in range(new):
        logits, _ = model(tokens[None, -model.config.max_seq_len :])
        tokens = torch.cat((tokens, logits[0, -1].argmax()[None]))
    return tokens


# The filter


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.05, 0.2, 0.9])
def test_epsilon_keeps_the_probable_and_the_arg_max_row_by_row(epsilon):
    logits = 2 * torch.randn(50, 30, generator=seeded())
    kept = epsilon_filter(logits, epsilon)
    for row, result in zip(logits, kept, strict=True):
        probabilities = row.double().exp() / row.double().exp().sum()
        for token in range(30):
            if probabilities[token] >= epsilon or token == row.argmax():
                assert result[token] == row[token]
            else:
                assert result[token] == -torch.inf


def test_epsilon_filter_leaves_its_input_alone_and_takes_any_leading_shape():
    logits = torch.randn(2, 3, 7, generator=seeded())
    before = logits.clone()
    kept = epsilon_filter(logits, 0.3)
    assert torch.equal(logits, before)
    assert torch.equal(kept[1, 2], epsilon_filter(logits[1, 2], 0.3))


@pytest.mark.parametrize(("epsilon", "kept"), [(0.0, 16), (1 / 16, 16), (0.0626, 1), (0.9, 1)])
def test_of_a_uniform_distribution_epsilon_keeps_all_or_one(epsilon, kept):
    result = epsilon_filter(torch.zeros(3, 16), epsilon)
    assert torch.equal(torch.isfinite(result).sum(-1), torch.full((3,), kept))


def test_each_row_is_cut_by_its_own_distribution():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
    kept = torch.isfinite(epsilon_filter(logits, 0.1))
    assert kept.tolist() == [[True] * 4, [True, False, False, False]]


FILTERS = {
    "epsilon": [partial(epsilon_filter, epsilon=e) for e in (0.01, 0.2)],
    "eta": [partial(eta_filter, eta=e) for e in (1e-3, 0.05, 0.5)],
    "top_k": [partial(top_k_filter, k=k) for k in (1, 5, 29, 30, 100)],
    "top_p": [partial(top_p_filter, p=p) for p in (0.05, 0.5, 0.9, 0.999)],
    "min_p": [partial(min_p_filter, p=p) for p in (0.01, 0.3, 1.0)],
    "typical": [partial(typical_filter, mass=m) for m in (0.05, 0.5, 0.95)],
}
THEIRS = {
    "epsilon": ("EpsilonLogitsWarper", "epsilon"),
    "eta": ("EtaLogitsWarper", "epsilon"),
    "top_k": ("TopKLogitsWarper", "top_k"),
    "top_p": ("TopPLogitsWarper", "top_p"),
    "min_p": ("MinPLogitsWarper", "min_p"),
    "typical": ("TypicalLogitsWarper", "mass"),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_those_of_transformers_keep(name):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(200, 30, generator=seeded())
    for ours in FILTERS[name]:
        kind, option = THEIRS[name]
        theirs = getattr(processors, kind)(*ours.keywords.values())
        kept, wanted = ours(logits), theirs(None, logits.clone())
        assert torch.equal(torch.isfinite(kept), torch.isfinite(wanted)), ours
        assert torch.equal(kept[torch.isfinite(kept)], logits[torch.isfinite(kept)])


@pytest.mark.parametrize("filter_of", [partial(top_p_filter, p=0.75), partial(typical_filter, mass=0.75)])
def test_what_has_just_the_probability_asked_for_is_enough(filter_of):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log2() * math.log(2)
    assert logits.softmax(-1).tolist() == [0.5, 0.25, 0.125, 0.125]  # to the last bit
    assert torch.isfinite(filter_of(logits)).tolist() == [True, True, False, False]


def test_top_k_of_no_token_is_refused():
    with pytest.raises(ValueError, match="k is 0; it must be 1 or more"):
        top_k_filter(torch.zeros(1, 5), k=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 30.0])
def test_typical_sampling_keeps_the_set_of_transformers_in_thousands_of_rows(scale):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = scale * torch.randn(1000, 40, generator=seeded())
    logits[:100] = logits[:100].round()  # ties
    logits[100:200, ::2] = -torch.inf  # what another filter left
    cut_arg_max = False
    for mass in (1e-9, 0.01, 0.1, 0.2, 0.5, 0.9, 0.95, 0.999):
        kept = typical_filter(logits, mass)
        assert torch.equal(kept, processors.TypicalLogitsWarper(mass)(None, logits.clone()))
        assert torch.isfinite(kept).any(-1).all()
        cut_arg_max |= bool((kept.argmax(-1) != logits.argmax(-1)).any())
    assert cut_arg_max or scale == 30.0


def test_the_likeliest_token_goes_where_it_is_not_typical():
    logits = torch.tensor([0.4, *[0.1] * 6]).log()
    assert torch.isfinite(typical_filter(logits, 0.3)).tolist() == [False, *[True] * 6]  # ties stay together
    peaked = torch.tensor([100.0, 0.0, 0.0])
    assert torch.isfinite(typical_filter(peaked, 0.01)).tolist() == [True, False, False]
    after = distribution(logits[None], 1.0, [partial(typical_filter, mass=0.3), partial(top_k_filter, k=1)])
    assert after[0].tolist() == pytest.approx([0.0, *[1 / 6] * 6])  # top-k: of what typical sampling left


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_pure_and_never_cut_every_token(name):
    logits = torch.randn(2, 3, 30, generator=seeded())
    logits[0, 0] = torch.tensor([0.0, -torch.inf]).repeat(15)  # what another filter left
    before = logits.clone()
    for kept in (one(logits) for one in FILTERS[name]):
        assert torch.equal(logits, before) and kept.shape == logits.shape
        assert torch.isfinite(kept.amax(-1)).all()
        assert name == "typical" or torch.equal(kept.argmax(-1), logits.argmax(-1))
        assert not torch.isfinite(kept[0, 0, 1::2]).any()


def test_the_repetition_penalty_is_that_of_transformers():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, seen = torch.randn(4, 30, generator=seeded()), torch.randint(30, (4, 9), generator=seeded(1))
    for penalty in (0.8, 1.0, 1.7):
        wanted = processors.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
        torch.testing.assert_close(repetition_penalised(logits, seen, penalty), wanted)


# One draw


@pytest.mark.parametrize(
    ("temperature", "epsilon"), [(1.0, 0.0), (1.0, 0.05), (0.5, 0.05), (2.0, 0.05), (2.0, 0.1), (0.7, 0.3)]
)
def test_draws_follow_the_filtered_and_renormalised_distribution(temperature, epsilon):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5])
    draws = 40_000
    chosen = next_token(logits.expand(draws, -1), temperature, epsilon, seeded(1))
    counts = torch.bincount(chosen, minlength=8).double()

    probabilities = (logits.double() / temperature).softmax(0)
    probabilities[(probabilities < epsilon) & (probabilities < probabilities.max())] = 0.0
    expected = draws * probabilities / probabilities.sum()
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 30.0  # at most 7 degrees of freedom: one seed in ten thousand goes beyond


def test_epsilon_cuts_before_the_other_filters():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(500, -1)
    # Of .444, .333 and .222, which epsilon leaves, two have 0.75 together; of all four, three would.
    chosen = next_token(logits, 1.0, 0.15, seeded(), [partial(top_p_filter, p=0.75)])
    assert set(chosen.tolist()) == {0, 1}


def test_rows_draw_from_their_own_distributions():
    logits = torch.full((3, 4), -30.0)
    logits[[0, 1, 2], [2, 0, 3]] = 0.0
    assert next_token(logits, 1.0, 0.0, seeded()).tolist() == [2, 0, 3]


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 1e-8, 1e-30, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = 5 * torch.randn(200, 50, generator=seeded())
    assert torch.equal(next_token(logits, temperature, 0.0, seeded(1)), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1e-8, 0.7, 1.0])
def test_logits_of_any_dtype_are_drawn_from_as_in_float32(dtype, temperature):
    logits = torch.randn(200, 300, generator=seeded()).to(dtype)
    wanted = next_token(logits.float(), temperature, 0.01, seeded(1))
    assert torch.equal(next_token(logits, temperature, 0.01, seeded(1)), wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise_with_their_dtype(bad, temperature):
    logits = torch.zeros(2, 5, dtype=torch.bfloat16)
    logits[1, 3] = bad
    with pytest.raises(ValueError, match=r"logits \(torch.bfloat16\) hold NaN or infinity"):
        next_token(logits, temperature, 0.05)


def test_nan_weights_raise():
    model = tiny_llama()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"logits \(torch.float32\) hold NaN"):
        generate(model, PROMPTS, 2)


# The loop


@pytest.mark.parametrize("causal", [True, False])
def test_greedy_is_the_arg_max_step_by_step(causal):
    model = tiny_llama(causal=causal)
    got = generate(model, PROMPTS, 12, temperature=0.0)
    assert got.shape == (3, 17) and got.dtype == torch.int64
    for row, prompt in zip(got, PROMPTS, strict=True):
        assert torch.equal(row, greedy_by_hand(model, prompt, 12))
    assert len(set(got[:, 5:].flatten().tolist())) > 3


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("max_seq_len", [32, 8])
def test_a_ragged_left_padded_batch_is_each_prompt_alone(causal, max_seq_len):
    model = tiny_llama(causal=causal, max_seq_len=max_seq_len)
    prompts = [torch.randint(64, (length,), generator=seeded(length)) for length in (6, 1, 4)]
    ids, mask = torch.zeros(3, 6, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids[i, 6 - len(prompt) :], mask[i, 6 - len(prompt) :] = prompt, True
    got = generate(model, ids, 10, temperature=0.0, attention_mask=mask)
    assert torch.equal(got[:, :6], ids)
    assert torch.equal(got, generate(model, ids, 10, temperature=0.0, attention_mask=mask.long()))
    for row, prompt in zip(got, prompts, strict=True):
        assert torch.equal(row[6 - len(prompt) :], greedy_by_hand(model, prompt, 10))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_the_mask_grows_with_the_new_tokens_and_is_boolean(dtype):
    model = Counter()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=dtype)
    generate(model, torch.ones(2, 3, dtype=torch.int64), 2, temperature=0.0, attention_mask=mask)
    assert [m.tolist() for m in model.masks] == [
        [[False, True, True], [True, True, True]],
        [[False, True, True, True], [True, True, True, True]],
    ]
    assert all(m.dtype == torch.bool for m in model.masks)


@pytest.mark.parametrize("causal", [True, False])
def test_past_the_context_the_window_slides(causal):
    model = tiny_llama(causal=causal, max_seq_len=7)
    got = generate(model, PROMPTS, 15, temperature=0.0)
    for row, prompt in zip(got, PROMPTS, strict=True):
        assert torch.equal(row, greedy_by_hand(model, prompt, 15))


def test_the_window_holds_the_last_tokens_that_fit():
    model = Counter(max_seq_len=4)
    prompt = torch.tensor([[9, 9, 0, 1, 2, 3]])
    got = generate(model, prompt, 3, temperature=0.0)
    assert got.tolist() == [[9, 9, 0, 1, 2, 3, 4, 5, 6]]
    assert [window.tolist() for window in model.windows] == [[[0, 1, 2, 3]], [[1, 2, 3, 4]], [[2, 3, 4, 5]]]


def test_a_row_that_ended_repeats_eos_while_the_others_go_on():
    prompts = torch.tensor([[3], [0], [5]])
    got = generate(Counter(), prompts, 6, temperature=0.0, eos_ids=(5,))
    assert got.tolist() == [[3, 4, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5, 5], [5, 6, 7, 8, 9, 0, 1]]


def test_decoding_stops_once_every_row_ended():
    model = Counter()
    got = generate(model, torch.tensor([[3], [2]]), 7, temperature=0.0, eos_ids=(5,))
    assert len(model.windows) == 3
    assert got.tolist() == [[3, 4, 5, 5, 5, 5, 5, 5], [2, 3, 4, 5, 5, 5, 5, 5]]


def test_who_watches_is_told_what_was_chosen_also_of_a_row_that_ended():
    told = []
    prompts = torch.tensor([[3], [0]])
    settings = {"temperature": 0.0, "eos_ids": (5,)}
    steps = stream(Counter(), prompts, 3, watch=lambda logits, chosen: told.append(chosen.tolist()), **settings)
    assert [step.tolist() for step in steps] == [[4, 1], [5, 2], [5, 3]]
    assert told == [[4, 1], [5, 2], [6, 3]]


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_penalised_as_if_it_had_been_said(causal):
    model, prompts = tiny_llama(causal=causal), [torch.tensor([7, 9]), torch.tensor([3, 1, 4, 1, 5])]
    settings = {"temperature": 0.0, "repetition_penalty": 3.0}
    alone = [generate(model, prompt[None], 12, **settings)[0, len(prompt) :].tolist() for prompt in prompts]
    padding = next(token for token in alone[0] if token not in (7, 9))
    ids, mask = torch.full((2, 5), padding), torch.ones(2, 5, dtype=torch.bool)
    ids[0, 3:], ids[1], mask[0, :3] = prompts[0], prompts[1], False
    assert generate(model, ids, 12, attention_mask=mask, **settings)[:, 5:].tolist() == alone


def test_without_eos_id_nothing_ends_early():
    assert generate(Counter(), torch.tensor([[3]]), 4, temperature=0.0).tolist() == [[3, 4, 5, 6, 7]]


@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_the_prompt_comes_back_unchanged(max_new_tokens):
    prompts = PROMPTS.clone()
    got = generate(Counter(64), prompts, max_new_tokens)
    assert got.shape == (3, 5 + max_new_tokens)
    assert torch.equal(got[:, :5], PROMPTS) and torch.equal(prompts, PROMPTS)


def test_no_new_tokens_ask_the_model_nothing():
    model = Counter()
    generate(model, PROMPTS, 0)
    assert not model.windows


def test_temperature_and_epsilon_default_to_1_and_5_percent():
    logits = torch.tensor([2.0, 1.0, 0.0, -0.5, -5.0])
    got = generate(Constant(logits.tolist()), torch.zeros(1, 1, dtype=torch.int64), 200, generator=seeded())
    wanted = [next_token(logits[None], 1.0, 0.05, generator).item() for generator in [seeded()] for _ in range(200)]
    assert got[0, 1:].tolist() == wanted
    assert set(wanted) == {0, 1, 2, 3}


def test_a_generator_makes_draws_reproducible_and_leaves_the_global_one_alone():
    model = tiny_llama()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (generate(model, PROMPTS, 12, epsilon=0.0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_draws_follow_the_global_seed():
    model = tiny_llama()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(model, PROMPTS, 12, epsilon=0.0))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_greedy_draws_nothing():
    model = tiny_llama()
    state = torch.get_rng_state()
    generate(model, PROMPTS, 3, temperature=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    generate(model, PROMPTS, 3, temperature=1.0)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_stays_and_no_gradient_is_recorded(training):
    model = tiny_llama().train(training)
    got = generate(model, PROMPTS, 3)
    assert all(module.training == training for module in model.modules())
    assert not got.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    counter = Counter(64)
    generate(counter, PROMPTS, 2)
    assert counter.grad_modes == [False, False] and torch.is_grad_enabled()


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be 0 or more"),
        ({"temperature": -0.5}, r"temperature is -0.5; it must be 0 \(greedy\) or a finite number above"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"epsilon": -0.1}, r"epsilon is -0.1; it must be in \[0, 1\)"),
        ({"epsilon": 1.0}, "epsilon is 1.0"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be from 0.01 to 100"),
        ({"repetition_penalty": 1e38}, r"repetition_penalty is 1e\+38; it must be from 0.01 to 100"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty is 1e-38; it must be from 0.01 to 100"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
    ],
)
def test_a_setting_out_of_range_raises_before_the_model_is_asked(settings, message):
    model = Counter(64)
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, **({"max_new_tokens": 3} | settings))
    with pytest.raises(ValueError, match=message):
        check_settings(**({"max_new_tokens": 3, "temperature": 1.0, "epsilon": 0.05} | settings))
    assert not model.windows


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (4,), (1, 2, 3)])
@pytest.mark.parametrize("max_new_tokens", [0, 2])
def test_an_empty_prompt_or_one_of_another_shape_raises(shape, max_new_tokens):
    with pytest.raises(ValueError, match=r"idx has shape \(.*\); it must be \(batch, tokens\)"):
        generate(Counter(), torch.zeros(shape, dtype=torch.int64), max_new_tokens)


def test_a_right_padded_prompt_raises():
    mask = torch.tensor([[True, True, True, True, False], [True] * 5, [True] * 5])
    with pytest.raises(ValueError, match="a prompt ends in padding; pad prompts of unequal length on the left"):
        generate(tiny_llama(), PROMPTS, 3, attention_mask=mask)


@pytest.mark.parametrize("shape", [(3, 4), (3, 6), (2, 5), (5,)])
def test_a_mask_of_another_shape_raises(shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*, idx \(3, 5\); they must be the same"):
        generate(tiny_llama(), PROMPTS, 3, attention_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_largest_and_the_smallest_penalty_leave_finite_logits(penalty):
    assert generate(tiny_llama(), PROMPTS, 8, repetition_penalty=penalty).shape == (3, 13)


# With the cache and without


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "epsilon": 0.0},
        {"filters": (partial(top_k_filter, k=7), partial(top_p_filter, p=0.9))},
        {"repetition_penalty": 1.5},
        {"temperature": 0.0, "eos_ids": (3, 11)},
    ],
)
@pytest.mark.parametrize("max_seq_len", [32, 12])
def test_the_cache_changes_no_token(settings, max_seq_len):
    """Within the context, and past it."""
    model = tiny_llama(causal=True, max_seq_len=max_seq_len)
    mask = torch.ones_like(PROMPTS, dtype=torch.bool)
    mask[1, :3] = False
    with_cache, without = (
        generate(model, PROMPTS, 20, attention_mask=mask, generator=seeded(1), use_cache=use_cache, **settings)
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_each_token_is_computed_once_while_there_is_a_cache():
    model, sizes = tiny_llama(causal=True, max_seq_len=12), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    generate(model, PROMPTS, 10, temperature=0.0)
    assert sizes == [5] + [1] * 7 + [12] * 2


def test_the_stream_is_what_is_generated():
    model = tiny_llama(causal=True)
    steps = list(stream(model, PROMPTS, 9, generator=seeded(2)))
    assert torch.equal(torch.stack(steps, 1), generate(model, PROMPTS, 9, generator=seeded(2))[:, 5:])


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


class Chain(Counter):
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


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("context", [64, 8])  # 8: the window slides
def test_contrastive_search_takes_the_likely_that_is_not_alike(context, causal):
    model, text = tiny_llama(causal=causal, max_seq_len=context), PROMPTS[0].tolist()
    for _ in range(8):
        probabilities = model(torch.tensor([text[-context:]]))[0][0, -1].softmax(-1)
        scores = {}
        for token in probabilities.topk(3).indices.tolist():
            hidden = model(torch.tensor([[*text, token][-context:]]))[1][0].double()
            likeness = max(float(torch.cosine_similarity(hidden[-1], one, dim=0)) for one in hidden[:-1])
            scores[token] = 0.4 * float(probabilities[token]) - 0.6 * likeness
        text.append(max(scores, key=scores.get))
    greedy = generate(model, PROMPTS[:1], 8, temperature=0.0)[0]
    for use_cache in (True, False):
        search = partial(contrastive_search, model, PROMPTS[:1], 8, use_cache=use_cache)
        assert search(k=3, alpha=0.6).tolist() == text
        assert torch.equal(search(alpha=0.0), greedy)
        assert torch.equal(search(k=1), greedy)
    end = text[len(PROMPTS[0]) + 3]
    ended = contrastive_search(model, PROMPTS[:1], 8, k=3, eos_ids=(end,)).tolist()
    assert ended == text[: text.index(end, len(PROMPTS[0])) + 1]


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
    """Of three tokens, of which the first two are guessed right now and then."""
    model = tiny_llama(causal=True, vocab_size=4, n_layers=1)
    prompt, draws = torch.tensor([[1, 2, 3, 1, 2]]), 4000
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


class CachedCounter(Counter):
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
    prompt = torch.tensor([[0, 1, 2, 3, 0, 1]])  # guessed: 2, 3, 0, 1, all of it right
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
    assert guessed(text, 3) == wanted


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (partial(beam_search, max_new_tokens=1, beams=0), "beams is 0; it must be 1 or more"),
        (partial(contrastive_search, max_new_tokens=1, k=0), "k is 0 and alpha 0.6; k must be 1 or more"),
        (partial(contrastive_search, max_new_tokens=1, alpha=1.5), r"alpha must be|alpha in \[0, 1\]"),
        (partial(lookup_decoding, max_new_tokens=1, temperature=-1.0), "temperature is -1.0"),
        (partial(lookup_decoding, max_new_tokens=1, draft_tokens=-1), "draft_tokens is -1; it must be 0 or more"),
        (partial(lookup_decoding, max_new_tokens=1, longest_match=0), "longest_match is 0; it must be 1 or more"),
    ],
)
def test_decoders_refuse_what_is_out_of_range(decode, message):
    with pytest.raises(ValueError, match=message):
        decode(tiny_llama(causal=True), PROMPTS[:1])


@pytest.mark.parametrize("decode", [beam_search, contrastive_search, lookup_decoding])
def test_decoders_of_one_prompt_say_so(decode):
    with pytest.raises(ValueError, match="takes one prompt, not 3"):
        decode(tiny_llama(causal=True), PROMPTS, 3)


def test_guessing_needs_a_cache():
    with pytest.raises(ValueError, match="look-up decoding needs a causal model"):
        lookup_decoding(tiny_llama(causal=False), PROMPTS[:1], 3)


# Banned tokens


ALL_BUT_TWO = [1.0, 9.0, 2.0, 9.0, 0.5]  # 1 and 3 are banned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "epsilon": 0.0},
        {"temperature": 1e30, "epsilon": 0.0},
        {"temperature": 1e-9},
        {"temperature": 3.0, "repetition_penalty": 100.0},
        *(
            {"temperature": 2.0, "epsilon": 0.0, "filters": [filter_of]}
            for some in FILTERS.values()
            for filter_of in some
        ),
    ],
)
def test_banned_tokens_are_never_sampled(settings, dtype):
    model = Constant(ALL_BUT_TWO)
    model.logits = model.logits.to(dtype)
    prompts = torch.zeros(50, 1, dtype=torch.int64)
    made = generate(model, prompts, 6, banned_ids=(1, 3), generator=seeded(), **settings)
    typical = settings.get("filters", [None])[0] in FILTERS["typical"]  # may leave the likeliest out
    assert set(made.unique().tolist()) <= {0, 2, 4} and (typical or 2 in made)


@pytest.mark.parametrize("beams", [1, 2, 3, 50])
def test_beams_hold_no_banned_token(beams):
    found, score = beam_search(Constant(ALL_BUT_TWO), PROMPTS[:1] % 5, 3, beams=beams, banned_ids=(1, 3), eos_ids=(4,))
    assert not {1, 3} & set(found[5:].tolist()) and math.isfinite(score)


@pytest.mark.parametrize("k", [2, 5])
def test_contrastive_search_tries_no_banned_token_though_all_else_is_improbable(k):
    model = tiny_llama(vocab_size=5, causal=True)
    with torch.no_grad():
        model.norm.weight.mul_(500.0)  # so that most probabilities vanish
    found = contrastive_search(model, PROMPTS[:1] % 5, 12, k=k, alpha=0.99, banned_ids=(1, 3))
    assert not {1, 3} & set(found[5:].tolist())


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_guessing_draws_no_banned_token(temperature):
    model = tiny_llama(vocab_size=5, causal=True)
    found = lookup_decoding(model, PROMPTS[:1] % 5, 20, temperature=temperature, banned_ids=(1, 3), generator=seeded())
    assert not {1, 3} & set(found[5:].tolist())
