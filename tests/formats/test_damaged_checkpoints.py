"""Checkpoints with content that does not fit, and files that are no checkpoint."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from llama import load_pretrained
from minillama.formats.checkpoint import read_checkpoint
from models import course_content, saved

# Contents that do not fit


def without_query(content):
    del content["model"]["layers.0.attention.compute_query.weight"]


def under_a_name_of_its_own(content):
    content["model"] = {f"llama.{name}": tensor for name, tensor in content["model"].items()}


def without_embedding(content):
    del content["model"]["tok_embeddings.weight"]


def with_another_layer(content):
    content["model"]["layers.1.ffn_norm.weight"] = torch.ones(32)


def with_a_cut_matrix(content):
    content["model"]["layers.0.feed_forward.w2.weight"] = content["model"]["layers.0.feed_forward.w2.weight"][:, 1:]


def with_nan(content):
    content["model"]["layers.0.feed_forward.w1.weight"][3, 4] = torch.nan


def with_infinity(content):
    content["model"]["norm.weight"][0] = -torch.inf


def with_an_integer_tensor(content):
    content["model"]["norm.weight"] = torch.ones(32, dtype=torch.int64)


def with_a_list(content):
    content["model"]["norm.weight"] = [1.0] * 32


def without_model(content):
    del content["model"]


def without_arguments(content):
    del content["model_args"]


def with_an_unknown_field(content):
    content["model_args"]["colour"] = 1


def with_a_size_of_zero(content):
    content["model_args"]["n_heads"] = 0


def with_a_text_for_eps(content):
    content["model_args"]["layer_norm_eps"] = "small"


def with_a_tensor_for_theta(content):
    content["model_args"]["rope_theta"] = torch.ones(2)


def with_a_word_for_causal(content):
    content["model_args"]["causal"] = "false"


def with_a_word_for_tied(content):
    content["model_args"]["tie_embeddings"] = "no"


def with_a_number_beyond_float32(content):
    content["model"]["norm.weight"] = torch.full((32,), 1e300, dtype=torch.float64)


def with_a_tensor_for_format(content):
    content["format_version"] = torch.ones(2, dtype=torch.int64)


def with_a_table_for_format(content):
    content["format_version"] = torch.rand(40, 40)


def with_true_for_format(content):
    content["format_version"] = True


def with_a_table_for_kind(content):
    content["kind"] = torch.rand(40, 40)


def with_a_number_for_a_name(content):
    content["model_args"] |= {"colour": 1, 7: 2}


def with_a_newer_format(content):
    content["format_version"] = 2


def of_a_classifier(content):
    content["kind"] = "classifier"


def asking_for_a_larger_vocabulary(content):
    content["model_args"]["vocab_size"] = 65


def asking_for_another_layer(content):
    content["model_args"]["n_layers"] = 2


def asking_for_more_than_any_memory(content):
    content["model_args"]["vocab_size"] = 10**13


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_query, "tensor layers.0.attention.compute_query.weight is missing"),
        (without_embedding, "tensor tok_embeddings.weight is missing"),
        (
            under_a_name_of_its_own,
            "tensor tok_embeddings.weight is missing, and there is llama.layers.0.attention.compute_key.weight; ",
        ),
        (with_another_layer, r"tensor layers.1.ffn_norm.weight \(of 1\) belongs to no Llama of this config"),
        (with_a_cut_matrix, r"w2.weight has shape \(32, 95\), its model_args ask for \(32, 96\)"),
        (with_nan, "layers.0.feed_forward.w1.weight holds NaN or infinity"),
        (with_infinity, "norm.weight holds NaN or infinity"),
        (with_an_integer_tensor, "wrong.pt holds 'norm.weight', which is not a tensor of weights"),
        (with_a_list, "wrong.pt holds 'norm.weight', which is not a tensor of weights"),
        (without_model, 'has no "model"; a course checkpoint is'),
        (without_arguments, 'has no "model_args"'),
        (with_an_unknown_field, "fields that this program does not know: colour"),
        (with_a_size_of_zero, "n_heads is 0; it must be a whole number of 1 or more"),
        (with_a_text_for_eps, "wrong.pt: layer_norm_eps is 'small'; it must be a number above 0"),
        (with_a_tensor_for_theta, r"wrong.pt: rope_theta is tensor\(\[1., 1.\]\); it must be a number above 0"),
        (with_a_word_for_causal, "wrong.pt: causal is 'false'; it must be True or False"),
        (with_a_word_for_tied, "wrong.pt: tie_embeddings is 'no'; it must be True or False"),
        (with_a_number_beyond_float32, "norm.weight holds NaN or infinity.*float32"),
        (with_a_tensor_for_format, r"has format version tensor\(\[1, 1\]\); this program reads 1"),
        (with_a_table_for_format, r"has format version tensor\(.*; this program reads 1"),
        (with_true_for_format, "has format version True; this program reads 1"),
        (with_a_table_for_kind, r"is a fine-tuned tensor\(.*, not a language model"),
        (with_a_number_for_a_name, "fields that this program does not know: 7, colour"),
        (with_a_newer_format, "has format version 2; this program reads 1"),
        (of_a_classifier, "is a fine-tuned classifier, not a language model"),
        (
            asking_for_a_larger_vocabulary,
            r"tok_embeddings.weight has shape \(64, 32\), its model_args ask for \(65, 32",
        ),
        (asking_for_another_layer, "tensor layers.1.attention.compute_query.weight is missing"),
        (asking_for_more_than_any_memory, r"tok_embeddings.weight has shape \(64, 32\)"),
    ],
)
def test_content_that_does_not_fit_raises_with_the_name(tmp_path, damage, message):
    content = course_content()
    damage(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(saved(tmp_path / "wrong.pt", content))
    assert "wrong.pt" in str(raised.value) and str(raised.value).isprintable()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {}, {"model": torch.zeros(3)}, None, "text"])
def test_a_torch_file_of_something_else_raises(tmp_path, content):
    with pytest.raises(ValueError, match='other.pt has no "model"'):
        read_checkpoint(saved(tmp_path / "other.pt", content))


# Files that are no checkpoint


def test_a_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt: no such checkpoint; `python fetch_data.py checkpoint`"):
        load_pretrained(tmp_path / "gone.pt")


def test_a_folder_of_something_else_raises(tmp_path):
    with pytest.raises(ValueError, match="is a folder without Meta's params.json or Hugging Face's config.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.pt is empty"),
        (b"\n", "bad.pt is not a checkpoint this program knows"),
        (b"24k", "bad.pt is not a checkpoint this program knows"),
        (b"not a checkpoint, but a text of some length\n" * 20, "bad.pt is not a checkpoint this program knows"),
        (b"\0" * 1000, "bad.pt is not a checkpoint this program knows"),
        (b"\xff" * 1000, "bad.pt is not a checkpoint this program knows"),
    ],
    ids=["empty", "newline", "three bytes", "text", "zeros", "ones"],
)
def test_a_file_of_no_known_format_raises(tmp_path, content, message):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def damaged_layers(content):
    content["model_args"]["n_layers"] = 3_000_000


def huge_dim(content):
    content["model_args"]["dim"] = 2**42


def sparse(content):
    content["model"]["norm.weight"] = torch.ones(32).to_sparse()


def without_data(content):
    content["model"]["norm.weight"] = torch.ones(32, device="meta")


def of_one_value(content):
    content["model"]["norm.weight"] = torch.ones(1).expand(32)


def nested(content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        content["model"]["norm.weight"] = torch.nested.nested_tensor([torch.ones(16), torch.ones(16)])


def eight_bits(content):
    content["model"]["norm.weight"] = torch.ones(32).to(torch.float8_e4m3fn)


def infinite_eps(content):
    content["model_args"]["layer_norm_eps"] = math.inf


@pytest.mark.parametrize(
    "damage, message",
    [
        (damaged_layers, "tensors are too few for 3,000,000 layers"),
        (huge_dim, "one of the two is wrong"),
        (sparse, "'norm.weight', which is sparse or has no data"),
        (without_data, "'norm.weight', which is sparse or has no data"),
        (of_one_value, "'norm.weight', which is sparse or has no data"),
        (nested, "'norm.weight', which is sparse or has no data"),
        (eight_bits, "'norm.weight', which is not a tensor of weights"),
        (infinite_eps, "layer_norm_eps is inf"),
    ],
)
def test_what_no_llama_can_be_built_from_is_refused_at_once(tmp_path, damage, message):
    content = course_content()
    damage(content)
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved(tmp_path / "bad.pt", content))
