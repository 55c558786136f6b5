"""The configuration of a model, and the values that it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from config import LlamaConfig
from models import tiny_config


def test_n_kv_heads_none_means_as_many_as_heads():
    config = LlamaConfig(n_heads=8, n_kv_heads=None)
    assert config.n_kv_heads == config.kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30}, "dim 30 is not a multiple of n_heads 4"),
        ({"dim": 12}, r"dim / n_heads = 3 is odd"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"n_layers": 2.0}, "n_layers is 2.0; it must be a whole number"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dim": 10**400}, "dim is 1000.*; it must be a whole number of 1 or more, below 2"),
        ({"n_heads": torch.zeros(40, 40)}, r"n_heads is tensor\(\[\[0"),
        *(
            ({name: value}, f"{name} is {shown}.*; it must be {allowed}")
            for name, allowed in (
                ("dropout", r"in \[0, 1\)"),
                ("layer_norm_eps", "a number above 0"),
                ("rope_theta", "a number above 0"),
            )
            for value, shown in (
                ("0.5", "'0.5'"),
                (torch.tensor(0.5), r"tensor\(0.5"),
                (torch.rand(40, 40), r"tensor\("),
                (True, "True"),
                (None, "None"),
                (math.nan, "nan"),
                (10**400, "1000"),
            )
        ),
        *(
            ({name: value}, f"{name} is {shown}.*; it must be True or False")
            for name in ("causal", "tie_embeddings", "use_cache")
            for value, shown in (("false", "'false'"), ("no", "'no'"), (0, "0"), (torch.tensor(True), "tensor"))
        ),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; it must be one of layernorm, rmsnorm"),
        ({"attention_kernel": "flash"}, "attention_kernel is 'flash'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type is 'learned'"),
    ],
)
def test_a_config_that_cannot_be_raises(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        tiny_config(**changes)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 200


def test_a_whole_number_will_do_where_a_fraction_could_stand():
    assert tiny_config(rope_theta=500_000, dropout=0).rope_theta == 500_000


def test_config_to_dict_and_back():
    config = tiny_config(norm="rmsnorm", causal=True, rope_theta=500000.0, tie_embeddings=False, hidden_dim=48)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="does not know: colour, shape"):
        LlamaConfig.from_dict({"dim": 32, "shape": 1, "colour": 2})


def test_the_convention_in_words():
    assert tiny_config().convention == "LayerNorm, bidirectional attention"
    assert tiny_config(norm="rmsnorm", causal=True).convention == "RMSNorm, causal attention"
