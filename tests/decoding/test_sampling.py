"""Sampling: one draw, and the loop over a real tiny model and over scripted ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillama.decoding.beam_search import beam_search
from minillama.decoding.contrastive_search import contrastive_search
from minillama.decoding.filters import top_k_filter, top_p_filter
from minillama.decoding.lookup import lookup_decoding
from minillama.decoding.sampling import check_settings, generate, next_token, stream
from models import PROMPTS, ConstantModel, CountingModel, seeded, tiny_llama


@torch.no_grad()
def greedy_by_hand(model, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Arg-max of a full forward pass over the last tokens that fit, step by step, for one row."""
    tokens = prompt.clone()
    for _ in range(new):
        logits, _ = model(tokens[None, -model.config.max_seq_len :])
        tokens = torch.cat((tokens, logits[0, -1].argmax()[None]))
    return tokens


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
    model = ConstantModel([0.0] * 5)
    model.logits = model.logits.bfloat16()
    steps = stream(model, torch.zeros(2, 1, dtype=torch.long), 3, temperature=temperature, watch=lambda *_: None)
    next(steps)
    model.logits[3] = bad
    with pytest.raises(ValueError, match=r"logits \(torch.bfloat16\) hold NaN or infinity"):
        next(steps)


class Waits(TorchFunctionMode):
    """A count of the questions that a GPU would be waited for. The results of `Tensor.cpu` are on the host."""

    asked = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist, Tensor.nonzero)

    def __init__(self) -> None:
        super().__init__()
        self.count, self.on_host = 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        on_host = any(args[0] is tensor for tensor in self.on_host) if args else False
        self.count += func is Tensor.cpu or (func in self.asked and not on_host)
        result = func(*args, **(kwargs or {}))
        if func is Tensor.cpu or on_host:
            self.on_host.append(result)
        return result


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"repetition_penalty": 1.3}])
def test_a_step_waits_for_a_gpu_once(settings):
    steps = stream(tiny_llama(causal=True), PROMPTS, 9, eos_ids=(2, 5), banned_ids=(7,), epsilon=0.0, **settings)
    with Waits() as waits:
        for taken in range(1, 6):
            next(steps)
            assert waits.count == taken


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
    model = CountingModel()
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
    model = CountingModel(max_seq_len=4)
    prompt = torch.tensor([[9, 9, 0, 1, 2, 3]])
    got = generate(model, prompt, 3, temperature=0.0)
    assert got.tolist() == [[9, 9, 0, 1, 2, 3, 4, 5, 6]]
    assert [window.tolist() for window in model.windows] == [[[0, 1, 2, 3]], [[1, 2, 3, 4]], [[2, 3, 4, 5]]]


def test_a_row_that_ended_repeats_eos_while_the_others_go_on():
    prompts = torch.tensor([[3], [0], [5]])
    got = generate(CountingModel(), prompts, 6, temperature=0.0, eos_ids=(5,))
    assert got.tolist() == [[3, 4, 5, 5, 5, 5, 5], [0, 1, 2, 3, 4, 5, 5], [5, 6, 7, 8, 9, 0, 1]]


def test_decoding_stops_once_every_row_ended():
    model = CountingModel()
    got = generate(model, torch.tensor([[3], [2]]), 7, temperature=0.0, eos_ids=(5,))
    assert len(model.windows) == 3
    assert got.tolist() == [[3, 4, 5, 5, 5, 5, 5, 5], [2, 3, 4, 5, 5, 5, 5, 5]]


def test_who_watches_is_told_what_was_chosen_also_of_a_row_that_ended():
    told = []
    prompts = torch.tensor([[3], [0]])
    settings = {"temperature": 0.0, "eos_ids": (5,)}
    steps = stream(CountingModel(), prompts, 3, watch=lambda logits, chosen: told.append(chosen.tolist()), **settings)
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
    assert generate(CountingModel(), torch.tensor([[3]]), 4, temperature=0.0).tolist() == [[3, 4, 5, 6, 7]]


@pytest.mark.parametrize("max_new_tokens", [0, 3])
def test_the_prompt_comes_back_unchanged(max_new_tokens):
    prompts = PROMPTS.clone()
    got = generate(CountingModel(64), prompts, max_new_tokens)
    assert got.shape == (3, 5 + max_new_tokens)
    assert torch.equal(got[:, :5], PROMPTS) and torch.equal(prompts, PROMPTS)


def test_no_new_tokens_ask_the_model_nothing():
    model = CountingModel()
    generate(model, PROMPTS, 0)
    assert not model.windows


def test_temperature_and_epsilon_default_to_1_and_5_percent():
    logits = torch.tensor([2.0, 1.0, 0.0, -0.5, -5.0])
    got = generate(ConstantModel(logits.tolist()), torch.zeros(1, 1, dtype=torch.int64), 200, generator=seeded())
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
    counter = CountingModel(64)
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
    model = CountingModel(64)
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, **({"max_new_tokens": 3} | settings))
    with pytest.raises(ValueError, match=message):
        check_settings(**({"max_new_tokens": 3, "temperature": 1.0, "epsilon": 0.05} | settings))
    assert not model.windows


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (4,), (1, 2, 3)])
@pytest.mark.parametrize("max_new_tokens", [0, 2])
def test_an_empty_prompt_or_one_of_another_shape_raises(shape, max_new_tokens):
    with pytest.raises(ValueError, match=r"idx has shape \(.*\); it must be \(batch, tokens\)"):
        generate(CountingModel(), torch.zeros(shape, dtype=torch.int64), max_new_tokens)


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
