"""ALiBi's slopes and biases, against the rule in words and against transformers' Bloom."""

from __future__ import annotations

import pytest
import torch

import reference
from minillama.layers.alibi import alibi_mask, alibi_slopes

CPU = torch.device("cpu")


def test_the_slopes_of_eight_heads_are_the_papers():
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 12, 16, 20, 24, 25, 31, 32])
def test_the_slopes_of_any_number_of_heads_are_the_rules_and_blooms(heads):
    assert alibi_slopes(heads) == pytest.approx(reference.slopes(heads), rel=1e-12)
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), theirs, rtol=1e-6, atol=0)


def test_what_is_added_is_the_distance_by_the_slope_or_hides():
    visible = torch.ones(2, 1, 2, 5, dtype=torch.bool).tril(3)
    visible[1, :, :, 0] = False
    found = alibi_mask(visible, [0.5, 0.25], 3, 5, 5, torch.float64, CPU)
    for b in range(2):
        for h, slope in enumerate((0.5, 0.25)):
            for t in range(2):
                for s in range(5):
                    seen = s <= t + 3 and (b == 0 or s > 0)
                    assert found[b, h, t, s] == (-slope * (t + 3 - s) if seen else -torch.inf)
    assert alibi_mask(None, [0.5, 0.25], 3, 5, 5, torch.float64, CPU).equal(found[:1])


def test_what_is_far_counts_by_its_whole_distance():
    found = alibi_mask(None, [0.5, 2**-8], 0, 300, 300, torch.float64, CPU)
    for h, slope in enumerate((0.5, 2**-8)):
        assert found[0, h, 299].tolist() == [-slope * (299 - s) for s in range(300)]


def test_beyond_the_context_it_raises():
    with pytest.raises(ValueError, match="a sequence of 6 tokens is longer than the model's context of 5"):
        alibi_mask(None, [1.0], 5, 6, 5, torch.float32, CPU)
