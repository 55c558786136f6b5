"""Mixed weights against the formula in float64; both ends equal bit for bit."""

from __future__ import annotations

import pytest
import torch

from minillama.training.weight_mixing import interpolate
from models import tiny_llama

ENDS = [tiny_llama(seed=seed, causal=True).state_dict() for seed in (1, 2)]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_are_the_two_models_bit_for_bit(alpha):
    ends = [end | {"x": torch.tensor([value, -0.0, 3e38])} for end, value in zip(ENDS, (-0.0, 0.0), strict=True)]
    mixed, wanted = interpolate(*ends, alpha), ends[int(alpha)]
    assert mixed.keys() == wanted.keys()
    for name, tensor in mixed.items():
        assert torch.equal(tensor.view(torch.int32), wanted[name].view(torch.int32))


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_between_them_it_is_the_formula(alpha):
    before = [{name: tensor.clone() for name, tensor in end.items()} for end in ENDS]
    mixed = interpolate(*ENDS, alpha)
    for name, tensor in mixed.items():
        wanted = (1 - alpha) * ENDS[0][name].double() + alpha * ENDS[1][name].double()
        torch.testing.assert_close(tensor, wanted.float(), atol=1e-6, rtol=1e-6)
    assert all(torch.equal(end[name], old[name]) for end, old in zip(ENDS, before, strict=True) for name in end)


def test_what_is_equal_in_both_stays_bit_for_bit():
    end = {"w": torch.randn(1000)}
    for alpha in (0.1, 0.3, 0.7):
        assert torch.equal(interpolate(end, {"w": end["w"].clone()}, alpha)["w"], end["w"])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_what_is_tied_stays_tied(alpha):
    mixed = interpolate(*ENDS, alpha)
    assert mixed["output.weight"].data_ptr() == mixed["tok_embeddings.weight"].data_ptr()
    places = [tensor.data_ptr() for name, tensor in mixed.items() if name != "output.weight"]
    assert len(set(places)) == len(places)  # and nothing else is


def test_what_one_model_alone_ties_is_not_tied():
    apart = ENDS[1] | {"output.weight": ENDS[1]["output.weight"] + 1}
    mixed = interpolate(ENDS[0], apart, 0.5)
    torch.testing.assert_close(mixed["output.weight"], mixed["tok_embeddings.weight"] + 0.5)


def test_counters_are_not_mixed():
    assert interpolate({"n": torch.tensor(4)}, {"n": torch.tensor(7)}, 0.5)["n"] == 7


def test_models_that_do_not_fit_are_refused():
    one = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match="b is in only one of the two models"):
        interpolate(one, {"a": torch.zeros(2)}, 0.5)
    with pytest.raises(ValueError, match=r"b has shape \(3,\) in one model, \(4,\) in the other"):
        interpolate(one, one | {"b": torch.zeros(4)}, 0.5)
    with pytest.raises(ValueError, match="alpha is 1.5; it must be from 0 to 1"):
        interpolate(one, one, 1.5)
