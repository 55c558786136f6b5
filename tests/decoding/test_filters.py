"""Filters of a distribution, against those of transformers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

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
from minillama.decoding.sampling import generate
from models import ConstantModel, seeded

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
    model = ConstantModel(ALL_BUT_TWO)
    model.logits = model.logits.to(dtype)
    prompts = torch.zeros(50, 1, dtype=torch.int64)
    made = generate(model, prompts, 6, banned_ids=(1, 3), generator=seeded(), **settings)
    typical = settings.get("filters", [None])[0] in FILTERS["typical"]  # may leave the likeliest out
    assert set(made.unique().tolist()) <= {0, 2, 4} and (typical or 2 in made)
