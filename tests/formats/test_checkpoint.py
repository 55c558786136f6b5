"""Checkpoint files: written and read back, damaged in every way, and hostile ones."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
import random
import re
import signal
import stat
import struct
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from config import LlamaConfig, parameter_shapes
from conftest import tiny_llama
from llama import Llama, load_pretrained
from minillama.formats.checkpoint import (
    METADATA_KEY,
    read_checkpoint,
    read_fine_tuned,
    write_checkpoint,
    write_safetensors,
)
from minillama.formats.files import atomic_file, check_writable

IDS = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(0))
COURSE_ARGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
MATRICES = ("compute_query", "compute_key", "compute_value", "compute_output")


def course_content(model: Llama | None = None) -> dict:
    """What the course's files hold: no biases, sizes only."""
    model = model or tiny_llama(n_layers=1)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".bias")}
    arguments = {name: getattr(model.config, name) for name in COURSE_ARGS}
    return {"model": state, "model_args": arguments, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {}}


def saved(path: Path, content: object, **options) -> Path:
    torch.save(content, path, **options)
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# An independent writer of llama2.c's files


def llama2c_arrays(seed: int = 0, untied: bool = False, n_heads: int = 4, n_kv_heads: int = 2) -> dict:
    """Sizes and random weights as llama2.c calls them; each weight with a leading layer axis."""
    dim, hidden, layers, vocab, seq = 16, 20, 2, 11, 6
    kv = dim // n_heads * n_kv_heads
    shapes = {
        "embedding": (vocab, dim),
        "att_norm": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "ffn_norm": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
    }
    if untied:
        shapes["classifier"] = (vocab, dim)
    generator = np.random.default_rng(seed)
    arrays = {name: generator.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}
    return {"sizes": (dim, hidden, layers, n_heads, n_kv_heads, vocab, seq), "arrays": arrays}


def v0_bytes(sizes, arrays) -> bytes:
    *others, vocab, seq = sizes
    header = struct.pack("<7i", *others, -vocab if "classifier" in arrays else vocab, seq)
    unread_tables = np.full(seq * sizes[0] // sizes[3], np.nan, dtype="<f4")
    order = ("embedding", "att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm")
    body = b"".join(arrays[name].tobytes() for name in order) + unread_tables.tobytes()
    return header + body + (arrays["classifier"].tobytes() if "classifier" in arrays else b"")


def v1_bytes(sizes, arrays, version: int = 1) -> bytes:
    header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, "classifier" not in arrays).ljust(256, b"\0")
    order = ["att_norm", "ffn_norm", "norm", "embedding", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    if "classifier" in arrays:
        order.append("classifier")
    return header + b"".join(arrays[name].tobytes() for name in order)


def by_our_names(arrays) -> dict[str, np.ndarray]:
    named = {"tok_embeddings.weight": arrays["embedding"], "norm.weight": arrays["norm"]}
    named["output.weight"] = arrays.get("classifier", arrays["embedding"])
    layer_names = {"att_norm": "attention_norm", "ffn_norm": "ffn_norm"}
    layer_names |= {name: f"feed_forward.{name}" for name in ("w1", "w2", "w3")}
    layer_names |= {f"w{m.removeprefix('compute_')[0]}": f"attention.{m}" for m in MATRICES}
    for short, name in layer_names.items():
        for i, array in enumerate(arrays[short]):
            named[f"layers.{i}.{name}.weight"] = array
    return named


# Reading and writing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "rmsnorm", "causal": True, "rope_theta": 500000.0},
        {"tie_embeddings": False, "causal": True, "n_kv_heads": 1},
        {"norm": "rmsnorm", "hidden_dim": 40, "layer_norm_eps": 1e-3, "n_kv_heads": None},
    ],
)
def test_what_is_written_is_read_back(tmp_path, changes):
    model = tiny_llama(**changes)
    path = tmp_path / "model.pt"
    write_checkpoint(path, model.state_dict(), model.config, seed=3, score=torch.tensor(0.5))
    checkpoint = read_checkpoint(path)
    assert checkpoint.path == path and checkpoint.kind == "mini-llama"
    assert checkpoint.config == model.config
    assert same(checkpoint.state, model.state_dict())
    assert checkpoint.extra == {"format_version": 1, "kind": "llama", "seed": 3, "score": torch.tensor(0.5)}
    loaded = load_pretrained(str(path))
    assert loaded.config == model.config and not loaded.training
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == model.config.tie_embeddings
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_a_tied_weight_is_written_once(tmp_path):
    sizes = []
    for tied in (True, False):
        model = tiny_llama(tie_embeddings=tied)
        write_checkpoint(tmp_path / "model.pt", model.state_dict(), model.config)
        sizes.append((tmp_path / "model.pt").stat().st_size)
    assert sizes[1] - sizes[0] > 64 * 32 * 4 * 0.9


def test_a_course_checkpoint_is_layernorm_and_bidirectional_with_zero_biases(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    path = saved(tmp_path / "course.pt", course_content(model))
    checkpoint = read_checkpoint(path)
    assert checkpoint.kind == "course" and checkpoint.extra["iter_num"] == 7
    loaded = load_pretrained(path)
    assert (loaded.config.norm, loaded.config.causal, loaded.config.tie_embeddings) == ("layernorm", False, True)
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_norm_and_causality_can_be_overridden(tmp_path):
    path = saved(tmp_path / "course.pt", course_content())
    loaded = load_pretrained(path, norm="rmsnorm", causal=True)
    assert (loaded.config.norm, loaded.config.causal) == ("rmsnorm", True)
    content = course_content()
    content["model"]["norm.bias"] = torch.zeros(32)
    assert load_pretrained(saved(path, content), norm="rmsnorm").config.norm == "rmsnorm"
    content["model"]["norm.bias"] = torch.ones(32)
    with pytest.raises(ValueError, match="norm.bias is not zero, so the model is LayerNorm; leave out --norm"):
        load_pretrained(saved(path, content), norm="rmsnorm")
    with pytest.raises(ValueError, match="norm is 'batchnorm'; it must be one of"):
        load_pretrained(path, norm="batchnorm")


def test_the_compiled_prefix_is_taken_off(tmp_path):
    content = course_content()
    plain = read_checkpoint(saved(tmp_path / "plain.pt", content))
    content["model"] = {f"_orig_mod.{name}": tensor for name, tensor in content["model"].items()}
    assert same(read_checkpoint(saved(tmp_path / "compiled.pt", content)).state, plain.state)


@pytest.mark.parametrize("output", ["absent", "equal", "different"])
def test_a_course_checkpoint_is_untied_only_if_its_output_differs(tmp_path, output):
    content = course_content()
    embedding = content["model"]["tok_embeddings.weight"]
    del content["model"]["output.weight"]
    if output != "absent":
        content["model"]["output.weight"] = embedding.clone() if output == "equal" else embedding + 1
    model = load_pretrained(saved(tmp_path / "course.pt", content))
    assert model.config.tie_embeddings == (output != "different")
    assert torch.equal(model.output.weight, embedding + 1 if output == "different" else embedding)
    assert torch.equal(model.tok_embeddings.weight, embedding)


def test_two_different_tensors_for_one_tied_weight_raise(tmp_path):
    content = course_content()
    content["model_args"]["tie_embeddings"] = True
    content["model"]["output.weight"] = content["model"]["tok_embeddings.weight"] + 1
    with pytest.raises(ValueError, match=r"output\.weight"):
        load_pretrained(saved(tmp_path / "course.pt", content))


def test_parameter_shapes_are_those_of_the_model():
    for changes in ({}, {"norm": "rmsnorm", "n_kv_heads": 1, "hidden_dim": 24}, {"tie_embeddings": False}):
        model = tiny_llama(**changes)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert parameter_shapes(model.config) == shapes


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_llama2c_files_are_read(tmp_path, version, untied, n_heads, n_kv_heads):
    made = llama2c_arrays(untied=untied, n_heads=n_heads, n_kv_heads=n_kv_heads)
    path = tmp_path / "named_without_a_hint"
    path.write_bytes({"v0": v0_bytes, "v1": v1_bytes}[version](**made))
    checkpoint = read_checkpoint(path)
    assert checkpoint.kind == f"llama2.c {version}"
    assert checkpoint.config == LlamaConfig(
        dim=16,
        hidden_dim=20,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        vocab_size=11,
        max_seq_len=6,
        norm="rmsnorm",
        causal=True,
        tie_embeddings=not untied,
    )
    state = load_pretrained(path).state_dict()
    wanted = by_our_names(made["arrays"])
    assert state.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(state[name].numpy(), array, err_msg=name)


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
        (with_an_integer_tensor, "wrong.pt holds 'norm.weight', which is no tensor of weights"),
        (with_a_list, "wrong.pt holds 'norm.weight', which is no tensor of weights"),
        (without_model, 'holds no "model"; a course checkpoint is'),
        (without_arguments, 'holds no "model_args"'),
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
    with pytest.raises(ValueError, match='other.pt holds no "model"'):
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
        (b"\n", "bad.pt is no checkpoint this program knows"),
        (b"24k", "bad.pt is no checkpoint this program knows"),
        (b"not a checkpoint, but a text of some length\n" * 20, "bad.pt is no checkpoint this program knows"),
        (b"\0" * 1000, "bad.pt is no checkpoint this program knows"),
        (b"\xff" * 1000, "bad.pt is no checkpoint this program knows"),
    ],
    ids=["empty", "newline", "three bytes", "text", "zeros", "ones"],
)
def test_a_file_of_no_known_format_raises(tmp_path, content, message):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "start", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", struct.pack("<I", 0x616B3432), v1_bytes(**llama2c_arrays())]
)
def test_random_bytes_always_raise_value_error(tmp_path, start):
    generator = random.Random(0)
    path = tmp_path / "noise.pt"
    for length in [1, 3, 23, 24, 28, 60, 252, 256, 300, 2000] * 12:
        path.write_bytes(start + generator.randbytes(length))
        with pytest.raises(ValueError, match="noise.pt"):
            read_checkpoint(path)


def as_torch_zip() -> bytes:
    file = io.BytesIO()
    torch.save(course_content(), file)
    return file.getvalue()


def as_torch_before_zip() -> bytes:
    file = io.BytesIO()
    torch.save(course_content(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


FORMATS = pytest.mark.parametrize(
    "whole",
    [
        as_torch_zip(),
        as_torch_before_zip(),
        pickle.dumps({"model": {"a": [1.5] * 9, "b": 2**70}, "model_args": {"dim": 8, "name": "x" * 300}}, protocol=2),
        v0_bytes(**llama2c_arrays()),
        v0_bytes(**llama2c_arrays(untied=True)),
        v1_bytes(**llama2c_arrays()),
        v1_bytes(**llama2c_arrays(untied=True)),
    ],
    ids=["torch", "old torch", "pickle", "v0", "v0 untied", "v1", "v1 untied"],
)


@FORMATS
def test_a_file_cut_short_anywhere_raises_value_error(tmp_path, whole):
    path = tmp_path / "cut.pt"
    cuts = {*range(1, 65), 252, 255, 256, 257, *(len(whole) * i // 40 for i in range(1, 40)), len(whole) - 1}
    for cut in sorted(cut for cut in cuts if cut < len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut.pt"):
            load_pretrained(path)


@pytest.mark.parametrize("length", [4, 36, 37, 255])
def test_a_llama2c_file_cut_inside_its_header_says_so(tmp_path, length):
    path = tmp_path / "short.bin"
    path.write_bytes(v1_bytes(**llama2c_arrays())[:length])
    with pytest.raises(ValueError, match="short.bin is cut short inside its header"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("make", [as_torch_zip, as_torch_before_zip])
def test_a_torch_file_with_wrong_bytes_loads_or_raises_value_error(tmp_path, make):
    whole, path, generator = make(), tmp_path / "flipped.pt", random.Random(1)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 4])):
            damaged[generator.randrange(min(3000, len(whole)))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert "flipped.pt" in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("more", [1, 4, 4000])
def test_a_llama2c_file_with_bytes_too_many_raises(tmp_path, version, more):
    path = tmp_path / "long.bin"
    path.write_bytes({"v0": v0_bytes, "v1": v1_bytes}[version](**llama2c_arrays()) + b"\0" * more)
    message = {"v0": "long.bin is no checkpoint", "v1": r"long.bin has [\d,]+ bytes, its header asks for [\d,]+"}
    with pytest.raises(ValueError, match=message[version]):
        read_checkpoint(path)


@contextmanager
def at_most(seconds: float):
    """Raises TimeoutError inside the block once the time is up."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("version", ["v0", "v1"])
@pytest.mark.parametrize("value", [0, -1, 3, 7, 1 << 19, (1 << 31) - 1, -(1 << 31)])
@pytest.mark.parametrize("field", range(7))
def test_a_damaged_header_raises_at_once(tmp_path, version, field, value):
    if version == "v1" and field == 6 and value > 0:
        value = 0  # any context length goes with a v1 file, which holds nothing of that size
    content = bytearray({"v0": v0_bytes, "v1": v1_bytes}[version](**llama2c_arrays()))
    struct.pack_into("<i", content, 4 * field + (8 if version == "v1" else 0), value)
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with at_most(0.5), pytest.raises(ValueError, match="damaged.bin"):
        load_pretrained(path)


@pytest.mark.parametrize("version", [0, 3, -1])
def test_a_llama2c_file_of_another_version_is_refused_with_its_number(tmp_path, version):
    path = tmp_path / "quantised.bin"
    path.write_bytes(v1_bytes(**llama2c_arrays(), version=version))
    with pytest.raises(ValueError, match=f"quantised.bin is llama2.c version {version}; this program reads"):
        read_checkpoint(path)


def test_nan_in_a_llama2c_file_raises(tmp_path):
    made = llama2c_arrays()
    made["arrays"]["wk"][1, 2, 3] = np.nan
    path = tmp_path / "nan.bin"
    path.write_bytes(v1_bytes(**made))
    with pytest.raises(ValueError, match="layers.1.attention.compute_key.weight holds NaN"):
        load_pretrained(path)


# Hostile files


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", ["zip", "old torch", *range(2, 6)])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, way):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    content = course_content() | {"config": RunsCode(marker)}
    if isinstance(way, int):
        path.write_bytes(pickle.dumps({"model": {}, "config": RunsCode(marker)}, protocol=way))
        pickle.loads(path.read_bytes())
    else:
        saved(path, content, _use_new_zipfile_serialization=way == "zip")
        torch.load(path, weights_only=False)
    assert marker.exists()
    marker.rmdir()
    with pytest.raises(ValueError, match="hostile.pt is refused: unpickling it would run code, or it is damaged"):
        load_pretrained(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [0, 1])
def test_a_pickle_of_an_old_protocol_is_not_even_opened(tmp_path, protocol):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pt"
    path.write_bytes(pickle.dumps(RunsCode(marker), protocol=protocol))
    with pytest.raises(ValueError, match="hostile.pt is no checkpoint this program knows"):
        load_pretrained(path)
    assert not marker.exists()


def test_an_object_that_is_no_plain_value_is_refused(tmp_path):
    content = course_content() | {"args": argparse.Namespace(lr=1.0)}
    with pytest.raises(ValueError, match="a checkpoint holds tensors and plain values only"):
        read_checkpoint(saved(tmp_path / "namespace.pt", content))


# Writing files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("mode", "text"), [("w", "näh\n"), ("wb", "näh\n".encode())])
@pytest.mark.parametrize("exists", [True, False])
def test_atomic_file_replaces_the_file_when_the_block_ends(tmp_path, mode, text, exists):
    path = tmp_path / "out.txt"
    if exists:
        path.write_text("old")
    with atomic_file(path, mode) as file:
        file.write(text)
        assert path.exists() == exists
        assert not exists or path.read_text() == "old"
    assert path.read_bytes() == "näh\n".encode()
    assert names(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error, exists):
    path = tmp_path / "out.txt"
    if exists:
        path.write_text("old")
    with pytest.raises(error, match="on the way"), atomic_file(path) as file:
        file.write("half of the new")
        raise error("on the way")
    assert names(tmp_path) == (["out.txt"] if exists else [])
    assert not exists or path.read_text() == "old"


def test_an_error_while_saving_leaves_the_old_checkpoint(tmp_path):
    model, path = tiny_llama(n_layers=1), tmp_path / "model.pt"
    write_checkpoint(path, model.state_dict(), model.config)
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        write_checkpoint(path, model.state_dict(), model.config, note=lambda: None)
    assert path.read_bytes() == before and names(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_obeys_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "out.txt") as file:
            file.write("new")
    finally:
        after = os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) == mode
    assert after == umask


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_goes_on_pointing_and_its_target_is_replaced(tmp_path, dangling):
    target, link = tmp_path / "folder" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if not dangling:
        target.write_text("old")
    link.symlink_to(target)
    with atomic_file(link) as file:
        file.write("new")
    assert link.is_symlink() and link.readlink() == target
    assert target.read_text() == "new"
    assert names(tmp_path) == ["folder", "link.txt"] and names(target.parent) == ["target.txt"]


def test_check_writable_touches_nothing(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("old")
    check_writable(old, tmp_path / "new.txt", str(tmp_path / "newer.txt"))
    assert names(tmp_path) == ["old.txt"] and old.read_text() == "old"


def test_check_writable_names_the_path_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "gone" / "out.txt", tmp_path / "file" / "out.txt"):
        with pytest.raises(FileNotFoundError, match=f"{path}: there is no folder {path.parent}; make it first"):
            check_writable(tmp_path / "fine.txt", path)
    with pytest.raises(IsADirectoryError, match=f"{re.escape(str(tmp_path))} is a folder; give the name of a file"):
        check_writable(tmp_path)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(PermissionError, match="out.txt cannot be written: Permission denied; choose another folder"):
        check_writable(tmp_path / "out.txt")


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
        (eight_bits, "'norm.weight', which is no tensor of weights"),
        (infinite_eps, "layer_norm_eps is inf"),
    ],
)
def test_what_no_llama_can_be_built_from_is_refused_at_once(tmp_path, damage, message):
    content = course_content()
    damage(content)
    with pytest.raises(ValueError, match=message):
        load_pretrained(saved(tmp_path / "bad.pt", content))


def test_a_context_beyond_memory_costs_nothing_until_it_is_used(tmp_path):
    content = course_content()
    content["model_args"]["max_seq_len"] = 10**13
    logits, _ = load_pretrained(saved(tmp_path / "long.pt", content))(IDS)
    assert torch.isfinite(logits).all()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal device to write to")
def test_a_device_is_written_to_and_not_replaced():
    reader, writer = os.openpty()
    with atomic_file(os.ttyname(writer)) as file:
        file.write("text\n")
    assert os.read(reader, 100).strip() == b"text" and os.isatty(writer)
    os.close(reader)
    os.close(writer)


# Safetensors


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"norm": "rmsnorm", "causal": True}])
def test_safetensors_give_the_same_model_back(tmp_path, changes):
    model = tiny_llama(**changes)
    path = tmp_path / "model.any"
    write_safetensors(path, model.state_dict(), model.config)
    again = load_pretrained(path)
    assert again.config == model.config and same(again.state_dict(), model.state_dict())
    assert torch.equal(again(IDS)[0], model(IDS)[0])
    stored = safetensors.torch.load_file(path)
    assert ("output.weight" in stored) == (not model.config.tie_embeddings)
    assert stored.keys() == set(parameter_shapes(model.config)) - {"output.weight"} | stored.keys() & {"output.weight"}
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~umask()) and not list(tmp_path.glob(".*"))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_bf16_by_hand(tensor: torch.Tensor) -> torch.Tensor:
    """The upper half of float32's bits, to the nearest, a tie to the even."""
    bits = tensor.numpy().view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return torch.from_numpy(rounded.astype(np.uint32).view(np.float32))


def test_safetensors_round_to_bf16(tmp_path):
    model = tiny_llama()
    write_safetensors(tmp_path / "a", model.state_dict(), model.config, torch.bfloat16)
    write_safetensors(tmp_path / "b", model.state_dict(), model.config)
    for name, tensor in read_checkpoint(tmp_path / "a").state.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), to_bf16_by_hand(model.state_dict()[name]))
    assert (tmp_path / "a").stat().st_size < 0.6 * (tmp_path / "b").stat().st_size
    again = load_pretrained(tmp_path / "a")
    assert {p.dtype for p in again.parameters()} == {
        torch.float32
    } and again.output.weight is again.tok_embeddings.weight


def test_safetensors_of_one_model_are_the_same_bytes(tmp_path):
    """The library itself puts the metadata in an order of chance."""
    model, found = tiny_llama(n_layers=1), set()
    for _ in range(12):
        write_safetensors(tmp_path / "a", model.state_dict(), model.config)
        found.add((tmp_path / "a").read_bytes())
    assert len(found) == 1
    (content,) = found
    size = struct.unpack_from("<Q", content)[0]
    assert size % 8 == 0 and json.loads(content[8 : 8 + size])["__metadata__"]["format"] == "pt"


def test_a_compressed_torch_file_is_read(tmp_path):
    model = tiny_llama(n_layers=1, n_kv_heads=4)
    saved(tmp_path / "stored.pt", course_content(model))
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored:
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
            for entry in stored.infolist():
                small.writestr(entry.filename, stored.read(entry))
    assert same(
        load_pretrained(tmp_path / "small.pt").state_dict(), load_pretrained(tmp_path / "stored.pt").state_dict()
    )


def test_safetensors_whose_length_begins_like_a_pickle_are_read(tmp_path):
    model, path = tiny_llama(n_layers=1), tmp_path / "a.safetensors"
    write_safetensors(path, model.state_dict(), model.config)
    content = path.read_bytes()
    size = struct.unpack_from("<Q", content)[0]
    header = content[8 : 8 + size].rstrip().ljust(size + (0x80 - size) % 0x100)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    assert path.read_bytes()[0] == 0x80 and same(load_pretrained(path).state_dict(), model.state_dict())


def safetensors_file(path: Path, metadata: dict[str, str] | None, **tensors: torch.Tensor) -> Path:
    state = {name: t for name, t in tiny_llama().state_dict().items() if name != "output.weight"} | tensors
    safetensors.torch.save_file(state, path, metadata)
    return path


def described(**changes: object) -> dict[str, str]:
    content = {"format_version": 1, "kind": "llama", "model_args": tiny_llama().config.to_dict()} | changes
    return {"format": "pt", METADATA_KEY: json.dumps({k: v for k, v in content.items() if v is not None})}


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, 'holds no "model_args", so the model\'s sizes are unknown'),
        ({"format": "pt"}, 'holds no "model_args"'),
        (described(model_args=None), 'holds no "model_args"'),
        ({METADATA_KEY: "{"}, "is damaged or cut short"),
        ({METADATA_KEY: "[1]"}, "is damaged or cut short"),
        ({METADATA_KEY: "5"}, "is damaged or cut short"),
        (described(format_version=9), "has format version 9"),
        (described(kind="classifier"), "is a fine-tuned classifier"),
        (described(model_args=tiny_llama(dim=64).config.to_dict()), "its model_args ask for"),
    ],
)
def test_safetensors_that_are_not_ours_are_refused_in_one_line(tmp_path, metadata, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(safetensors_file(tmp_path / "a.safetensors", metadata))
    assert "\n" not in str(raised.value) and "a.safetensors" in str(raised.value)


def test_safetensors_with_ours_in_the_metadata_are_read(tmp_path):
    """What the refused ones above lack is nothing but what they say."""
    model = load_pretrained(safetensors_file(tmp_path / "a", described()))
    assert same(model.state_dict(), tiny_llama().state_dict())
    with pytest.raises(ValueError, match="norm.weight holds NaN"):
        load_pretrained(safetensors_file(tmp_path / "b", described(), **{"norm.weight": torch.full((32,), torch.nan)}))
    with pytest.raises(ValueError, match="'norm.weight', which is no tensor of weights"):
        load_pretrained(safetensors_file(tmp_path / "c", described(), **{"norm.weight": torch.ones(32).to(torch.int8)}))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.9999])
def test_safetensors_cut_short_are_refused(tmp_path, share):
    model = tiny_llama()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, model.state_dict(), model.config)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"a\.safetensors is .*(damaged or cut short|or was cut short)"):
        load_pretrained(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or cut short"):
        load_pretrained(path)


def test_safetensors_that_cannot_be_written_leave_the_old_file(tmp_path, monkeypatch):
    model, path = tiny_llama(), tmp_path / "a"
    path.write_bytes(b"before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, model.state_dict(), model.config)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a"]


# Wrappers, ends of texts


@pytest.mark.parametrize("where", ["front", "inside"])
@pytest.mark.parametrize("wrapper", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_that_wrappers_put_into_keys_are_taken_out(tmp_path, wrapper, where):
    def wrapped(name: str) -> str:
        front = f"{wrapper}._orig_mod.{name}"
        return front if where == "front" else name.replace("layers.0.", f"layers.0.{wrapper}.")

    content = course_content()
    plain = read_checkpoint(saved(tmp_path / "plain.pt", content))
    tensors = {wrapped(name): tensor for name, tensor in content["model"].items()}
    assert tensors.keys() != content["model"].keys()
    assert same(read_checkpoint(saved(tmp_path / "w.pt", content | {"model": tensors})).state, plain.state)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, described())
    assert same(read_checkpoint(path).state, plain.state)
    fine = {"kind": "classifier", "format_version": 1, "label_names": ["a", "b"]} | content
    assert same(read_fine_tuned(saved(tmp_path / "f.pt", fine | {"model": tensors})).state, content["model"])


def test_two_keys_that_become_one_are_refused(tmp_path):
    content = course_content()
    content["model"]["module.norm.weight"] = content["model"]["norm.weight"]
    with pytest.raises(ValueError, match="'norm.weight' and 'module.norm.weight', which are one tensor"):
        read_checkpoint(saved(tmp_path / "twice.pt", content))


def test_the_ids_at_which_a_text_ends_are_kept_with_the_model(tmp_path):
    model = tiny_llama()
    write_safetensors(tmp_path / "m.safetensors", model.state_dict(), model.config, stop_ids=(2, 7))
    write_checkpoint(tmp_path / "m.pt", model.state_dict(), model.config, stop_ids=[2, 7])
    write_safetensors(tmp_path / "none.safetensors", model.state_dict(), model.config)
    found = [read_checkpoint(tmp_path / name).stop_ids for name in ("m.safetensors", "m.pt", "none.safetensors")]
    assert found == [(2, 7), (2, 7), ()]
    write_checkpoint(tmp_path / "bad.pt", model.state_dict(), model.config, stop_ids=[2, 64])
    with pytest.raises(ValueError, match=r"bad.pt: stop_ids is \[2, 64\]; it must be an id from 0 to 63"):
        read_checkpoint(tmp_path / "bad.pt")
