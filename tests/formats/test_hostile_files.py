"""Checkpoint files that are cut short, damaged or hostile: refused in one line, at once."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch

from llama import load_pretrained
from minillama.formats.checkpoint import read_checkpoint
from models import course_content, huggingface_folder, saved
from reference import llama2c_arrays, v0_bytes, v1_bytes


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
    with pytest.raises(ValueError, match="hostile.pt is not a checkpoint this program knows"):
        load_pretrained(path)
    assert not marker.exists()


def test_an_object_that_is_no_plain_value_is_refused(tmp_path):
    content = course_content() | {"args": argparse.Namespace(lr=1.0)}
    with pytest.raises(ValueError, match="a checkpoint holds tensors and plain values only"):
        read_checkpoint(saved(tmp_path / "namespace.pt", content))


# Hostile files


def with_header(content: bytes, header: bytes) -> bytes:
    """A safetensors file with another header."""
    behind = 8 + struct.unpack_from("<Q", content)[0]
    return struct.pack("<Q", len(header)) + header + content[behind:]


def test_headers_that_lie_are_refused(tmp_path):
    folder = huggingface_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = struct.unpack_from("<Q", whole)[0]
    header = json.loads(whole[8 : 8 + size])
    name = "model.norm.weight"
    for lie in (
        {"shape": [1 << 40]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [-32]},
        {"shape": [31]},
        {"dtype": "F64"},
        {"dtype": "F99"},
        {"data_offsets": [0, 1 << 50]},
        {"data_offsets": [1 << 40, (1 << 40) + 128]},
        {"data_offsets": [-128, 0]},
    ):
        damaged = header | {name: header[name] | lie}
        path.write_bytes(with_header(whole, json.dumps(damaged).encode()))
        with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
            load_pretrained(folder)
    for length in (0, 1, len(whole), 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + whole[8:])
        with pytest.raises(ValueError, match="damaged"):
            load_pretrained(folder)


def test_mutated_headers_load_or_are_refused_in_one_line(tmp_path):
    """Safetensors and both kinds of JSON, damaged a few bytes at a time: only these errors may come out."""
    generator = random.Random(2)
    folder = huggingface_folder(tmp_path / "model")
    model, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = model.read_bytes(), config.read_bytes()
    header = 8 + struct.unpack_from("<Q", whole)[0]
    refused = 0
    for round_number in range(300):
        damaged, text = bytearray(whole), bytearray(settings)
        target, size = (damaged, header) if round_number % 2 else (text, len(settings))
        for _ in range(generator.choice([1, 1, 2, 5])):
            target[generator.randrange(size)] = generator.choice([generator.randrange(256), *b'0123456789-e[]{}",:'])
        model.write_bytes(damaged)
        config.write_bytes(text)
        try:
            load_pretrained(folder)
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
            refused += 1
    assert refused > 150
