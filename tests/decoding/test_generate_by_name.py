"""`Llama.generate` with its settings by name: filters, the tokenizer's end tokens, and stop texts."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch

from conftest import ROOT
from llama import Llama, load_pretrained
from minillama.decoding import filters
from minillama.decoding.sampling import generate, stream
from models import PROMPTS, CountingModel, seeded, tiny_llama
from tokenizer import Tokenizer

BY_NAME = {
    "eta": (0.2, partial(filters.eta_filter, eta=0.2)),
    "top_k": (3, partial(filters.top_k_filter, k=3)),
    "top_p": (0.5, partial(filters.top_p_filter, p=0.5)),
    "min_p": (0.3, partial(filters.min_p_filter, p=0.3)),
    "typical_p": (0.4, partial(filters.typical_filter, mass=0.4)),
}


def drawn(model, **settings):
    """The new tokens (B, 12) of `stream`, which takes filters as functions."""
    return torch.stack(list(stream(model, PROMPTS, 12, generator=seeded(4), **settings)), dim=1)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_filter_by_name_is_the_filter_without_the_default_epsilon(name):
    model, (value, keep) = tiny_llama(causal=True), BY_NAME[name]
    got = model.generate(PROMPTS, 12, generator=seeded(4), **{name: value})
    assert torch.equal(got[:, :-12], PROMPTS)
    assert torch.equal(got[:, -12:], drawn(model, epsilon=0.0, filters=[keep]))
    assert not torch.equal(got[:, -12:], drawn(model, epsilon=0.0))


def test_an_epsilon_that_is_given_counts_beside_another_filter_even_if_it_is_the_default():
    model, keep = tiny_llama(causal=True), BY_NAME["min_p"][1]
    got = model.generate(PROMPTS, 12, 1.0, 0.05, min_p=0.3, generator=seeded(4))
    assert torch.equal(got[:, -12:], drawn(model, epsilon=0.05, filters=[keep]))
    given = [filter.func.__name__ for filter in filters.filters_by_name(0.05, min_p=0.3)]
    assert given == ["epsilon_filter", "min_p_filter"]
    assert [filter.func.__name__ for filter in filters.filters_by_name(min_p=0.3)] == ["min_p_filter"]
    assert [filter.func.__name__ for filter in filters.filters_by_name()] == ["epsilon_filter"]


def test_the_published_signature_is_unchanged():
    parameters = list(inspect.signature(Llama.generate).parameters.values())
    assert [one.name for one in parameters[:5]] == ["self", "idx", "max_new_tokens", "temperature", "epsilon"]
    assert (parameters[3].default, parameters[4].default) == (1.0, 0.05)


def test_the_repetition_penalty_goes_by_name():
    model = tiny_llama(causal=True)
    got = model.generate(PROMPTS, 12, 0.0, repetition_penalty=1.5)
    assert torch.equal(got[:, -12:], drawn(model, temperature=0.0, repetition_penalty=1.5))
    assert not torch.equal(got, model.generate(PROMPTS, 12, 0.0))


# The end


class Ends:
    """A tokenizer that has three end tokens, and writes a token as its number."""

    stop_ids = (5, 9, 1)
    unused_ids = ()

    @staticmethod
    def decode(ids):
        return "".join(f"<{i}>" for i in ids)


def test_a_row_ends_at_the_tokenizers_end_tokens_and_is_filled_with_the_first():
    prompts = torch.tensor([[3], [6], [2]])
    got = generate(CountingModel(), prompts, 6, temperature=0.0, tokenizer=Ends())
    assert got.tolist() == [[3, 4, 5, 5, 5, 5, 5], [6, 7, 8, 9, 5, 5, 5], [2, 3, 4, 5, 5, 5, 5]]
    got = generate(CountingModel(), prompts, 3, temperature=0.0, tokenizer=Ends(), eos_ids=())
    assert got.tolist() == [[3, 4, 5, 6], [6, 7, 8, 9], [2, 3, 4, 5]]  # eos_ids come first


def test_a_row_ends_with_a_stop_text_after_its_prompt():
    prompts, mask = torch.tensor([[0, 3], [7, 6]]), torch.tensor([[False, True], [True, True]])
    settings = {"temperature": 0.0, "tokenizer": Ends(), "attention_mask": mask}
    got = generate(CountingModel(), prompts, 4, stop=["4>", "7><8>"], **settings)
    assert got.tolist() == [[0, 3, 4, 5, 5, 5], [7, 6, 7, 8, 5, 5]]
    assert generate(CountingModel(), prompts, 2, stop="<3>", **settings).tolist() == [[0, 3, 4, 5], [7, 6, 7, 8]]


def test_a_stop_needs_the_tokenizer_and_a_text():
    with pytest.raises(ValueError, match="stop needs the tokenizer"):
        generate(CountingModel(), PROMPTS, 4, stop="x")
    with pytest.raises(ValueError, match="stop has an empty text"):
        generate(CountingModel(), PROMPTS, 4, stop=("x", ""), tokenizer=Ends())


def test_the_bundled_model_stops_by_itself():
    tokenizer = Tokenizer(ROOT / "data" / "mini-llama.model")
    model = load_pretrained(ROOT / "data" / "mini-llama.safetensors")
    prompt = torch.tensor([tokenizer.encode_prompt("The end.")])
    (row,) = model.generate(prompt, 200, temperature=0.0, tokenizer=tokenizer).tolist()
    (free,) = model.generate(prompt, 200, temperature=0.0).tolist()
    first = next(i for i, token in enumerate(free) if i and token in tokenizer.stop_ids)
    assert row[: first + 1] == free[: first + 1] and set(row[first + 1 :]) == {tokenizer.eos_id}
    assert set(free[first + 1 :]) != {tokenizer.eos_id}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number, 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"min_p": -1}, "min_p is -1; it must be above 0 and at most 1"),
        ({"typical_p": 2}, "typical_p is 2; it must be above 0 and at most 1"),
        ({"eta": 1.0}, r"eta is 1.0; it must be in \[0, 1\)"),
        ({"epsilon": float("nan")}, r"epsilon is nan; it must be in \[0, 1\)"),
    ],
)
def test_a_setting_out_of_its_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_llama().generate(PROMPTS, 3, **settings)
